#!/usr/bin/env bash
#SBATCH --job-name=rivals_xbusnet
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Tables 1 and 2 of the XBusNet paper on BrEaST: every method that it compares with, as arrays, then the report.
#
#   sbatch slurm/rivals_xbusnet.sh                      from anywhere in the clone
#   bash slurm/rivals_xbusnet.sh rows=[unet]   on a login node, with settings
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/rivals_xbusnet.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/rivals_xbusnet.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/rivals_xbusnet.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc grid grid=xbusnet_rivals data=breast folds=published cluster=a100 "$@"
