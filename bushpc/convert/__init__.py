"""Weights of any origin → one file that a model starts from (`bushpc weights import`, `model.weights=`).

sources.py   a file, a package or a trained model → tensors and where they are from
match.py     their names → the names of a model's own tensors: by name, by prefix, by order
convert.py   both → a .safetensors file; bushpc.weight_file reads it
"""
