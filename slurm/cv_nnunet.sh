#!/usr/bin/env bash
#SBATCH --job-name=cv_nnunet
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of nnU-Net on BUSI with the nnunetv2 package: one array of five cells, then the report.
# Install the package first: .venv/bin/pip install -c constraints.txt -e '.[nnunet]'
#
#   sbatch slurm/cv_nnunet.sh                                    from anywhere in the clone
#   bash slurm/cv_nnunet.sh data=breast train.iterations=50000   on a login node, with settings
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_nnunet.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/cv_nnunet.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/cv_nnunet.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc cv model=nnunet data=busi cluster=a100 "$@"
