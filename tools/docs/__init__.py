"""The documentation as a site: `make docs`, which is `python -m tools.docs`.

docs/ + CONTRIBUTING.md, CHANGELOG.md … ─pages→ build/docs/pages ┐
settings, commands, errors, docstrings  ─reference, api→         ┴─sphinx→ build/docs/site

prose: words and long sentences that the pages may not have. pictures: those of docs/pictures.
"""
