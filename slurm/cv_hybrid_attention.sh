#!/usr/bin/env bash
#SBATCH --job-name=cv_hybrid_attention
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of the hybrid attention network on BUSI: one array of five cells, then the report.
#
#   sbatch slurm/cv_hybrid_attention.sh            from anywhere in the clone
#   bash slurm/cv_hybrid_attention.sh data=udiat   on a login node, with settings
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_hybrid_attention.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/cv_hybrid_attention.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/cv_hybrid_attention.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc cv model=hybrid_attention data=busi cluster=a100 "$@"
