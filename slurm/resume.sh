#!/usr/bin/env bash
#SBATCH --job-name=resume
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Go on with a run, whichever command made it: what is neither done nor in the queue is submitted.
#
#   sbatch slurm/resume.sh runs/<run>                           from anywhere in the clone
#   bash slurm/resume.sh runs/<run> --only failed cluster.mem_gb=128   on a login node
#
# This job only submits and ends at once.
set -euo pipefail
# The run is named from where sbatch was called, which need not be the clone's root.
here=$PWD
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/resume.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
bushpc=$PWD/.venv/bin/bushpc
cd "$here"
exec "$bushpc" resume "$@"
