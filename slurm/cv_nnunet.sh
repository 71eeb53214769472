#!/usr/bin/env bash
#SBATCH --job-name=cv_nnunet
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of nnU-Net on BUSI, by its own package: one array of five cells, then the report. The clone
# needs the extra: .venv/bin/pip install -c constraints.txt -e '.[nnunet]'.
#
#   sbatch slurm/cv_nnunet.sh                                    from anywhere in the clone
#   bash slurm/cv_nnunet.sh data=breast train.iterations=50000   on a login node; words are overrides
#
# This job only submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml.
# Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_nnunet.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc cv model=nnunet data=busi cluster=a100 "$@"
