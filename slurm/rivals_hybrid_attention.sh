#!/usr/bin/env bash
#SBATCH --job-name=rivals_hybrid_attention
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Table 3 of the hybrid attention paper on BUSI: every method that it compares with, as arrays, then the report.
#
#   sbatch slurm/rivals_hybrid_attention.sh                      from anywhere in the clone
#   bash slurm/rivals_hybrid_attention.sh rows=[unet]   on a login node, with settings
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/rivals_hybrid_attention.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/rivals_hybrid_attention.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/rivals_hybrid_attention.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc grid grid=hybrid_attention_rivals data=busi cluster=a100 "$@"
