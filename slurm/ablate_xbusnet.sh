#!/usr/bin/env bash
#SBATCH --job-name=ablate_xbusnet
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Table 4 of the XBusNet paper on BrEaST: four rows of five folds as one array, then the report.
#
#   sbatch slurm/ablate_xbusnet.sh                      from anywhere in the clone
#   bash slurm/ablate_xbusnet.sh grid=xbusnet_prompt_sources   on a login node, with settings
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/ablate_xbusnet.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/ablate_xbusnet.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/ablate_xbusnet.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc grid grid=xbusnet_components data=breast cluster=a100 "$@"
