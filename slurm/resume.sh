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
# Slurm runs a copy of this script from its spool folder; the clone is then the folder where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/resume.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
bushpc=$PWD/.venv/bin/bushpc
cd "$here"
exec "$bushpc" resume "$@"
