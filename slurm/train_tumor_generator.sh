#!/usr/bin/env bash
#SBATCH --job-name=train_tumor_generator
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# A stage of the tumor generator on BUSI, by default ControlNet and UNet in five folds as one array, then the report. On
# the login node, before: bushpc weights pull model=tumor_generator
#
#   sbatch slurm/train_tumor_generator.sh name=generator     from anywhere in the clone; words are overrides
#
# The generator of fold 0, adapted to another dataset; then as many synthetic scans as wanted:
#   bushpc export runs/generator exports/generator
#   sbatch slurm/train_tumor_generator.sh name=adapter data=udiat model.stage=lora model.base=exports/generator/fold0
#   bushpc generate runs/adapter fold=0 n=1000 out=shards/synthetic_udiat
#
# With a VAE of its own, which the paper's (5) names; each fold's generator takes that of its fold, which has seen none of
# its validation part:
#   sbatch slurm/train_tumor_generator.sh name=vae model=tumor_generator_vae
#   bushpc export runs/vae exports/vae
#   sbatch slurm/train_tumor_generator.sh name=generator model.base=exports/vae
#
# This job only submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml.
# Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/train_tumor_generator.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc cv model=tumor_generator data=busi cluster=a100 "$@"
