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
# Slurm runs a copy of this script from its spool folder; the clone is then the folder where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/ablate_xbusnet.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc grid grid=xbusnet_components data=breast cluster=a100 "$@"
