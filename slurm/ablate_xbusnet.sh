#!/usr/bin/env bash
#SBATCH --job-name=ablate_xbusnet
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# The ablation of XBusNet's Table 4 on BrEaST: four rows of five folds as one array, then the report with its table.
#
#   sbatch slurm/ablate_xbusnet.sh                      from anywhere in the clone
#   bash slurm/ablate_xbusnet.sh grid=xbusnet_prompt_sources   on a login node; words are overrides
#
# This job only submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml.
# Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/ablate_xbusnet.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc grid grid=xbusnet_components data=breast cluster=a100 "$@"
