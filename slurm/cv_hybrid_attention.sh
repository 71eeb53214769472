#!/usr/bin/env bash
#SBATCH --job-name=cv_hybrid_attention
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of the hybrid attention network on BUSI: one array of five cells, then the report.
#
#   sbatch slurm/cv_hybrid_attention.sh            from anywhere in the clone
#   bash slurm/cv_hybrid_attention.sh data=udiat   on a login node; words are overrides
#
# This job only submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml.
# Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_hybrid_attention.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc cv model=hybrid_attention data=busi cluster=a100 "$@"
