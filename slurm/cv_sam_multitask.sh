#!/usr/bin/env bash
#SBATCH --job-name=cv_sam_multitask
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of SAM multi-task on the union of BUSI, BrEaST and BUS-BRA: five cells, then the report.
#
#   sbatch slurm/cv_sam_multitask.sh                     from anywhere in the clone
#   bash slurm/cv_sam_multitask.sh data=breast           on a login node, with settings
#
# Stage the weights first:
#   bushpc weights pull model=sam_multitask
# The first job computes the outputs of SAM's frozen encoder and keeps them for all others in features/, next to the
# shards (loader.features_dir).
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_sam_multitask.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/cv_sam_multitask.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/cv_sam_multitask.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc cv model=sam_multitask data=precise cluster=a100 "$@"
