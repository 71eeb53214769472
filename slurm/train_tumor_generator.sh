#!/usr/bin/env bash
#SBATCH --job-name=train_tumor_generator
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# A stage of the tumor generator on BUSI; the default is ControlNet and UNet, five folds as one array, then the report.
# Before, on the login node:
#   bushpc weights pull model=tumor_generator
#
#   sbatch slurm/train_tumor_generator.sh name=generator     from anywhere in the clone, with settings
#
# Adapt the generator of fold 0 to another dataset, then generate scans:
#   bushpc export runs/generator exports/generator
#   sbatch slurm/train_tumor_generator.sh name=adapter data=udiat model.stage=lora model.base=exports/generator/fold0
#   bushpc generate runs/adapter fold=0 n=1000 out=shards/synthetic_udiat
#
# Train the VAE of equation (5) first. Every fold's generator uses the VAE of its fold, which has seen none of the
# fold's validation part:
#   sbatch slurm/train_tumor_generator.sh name=vae model=tumor_generator_vae
#   bushpc export runs/vae exports/vae
#   sbatch slurm/train_tumor_generator.sh name=generator model.base=exports/vae
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/train_tumor_generator.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/train_tumor_generator.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/train_tumor_generator.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc cv model=tumor_generator data=busi cluster=a100 "$@"
