#!/usr/bin/env bash
#SBATCH --job-name=resume
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Continue a run that any command made: submit every cell that is neither done nor queued.
#
#   sbatch slurm/resume.sh runs/<run>                           from anywhere in the clone
#   bash slurm/resume.sh runs/<run> --only failed cluster.mem_gb=128   on a login node
#
# This job submits the others and ends.
set -euo pipefail
# The run's path is relative to where sbatch was called, which need not be the clone's root.
here=$PWD
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/resume.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/resume.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/resume.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
bushpc=$PWD/.venv/bin/bushpc
cd "$here"
exec "$bushpc" resume "$@"
