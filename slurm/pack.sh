#!/usr/bin/env bash
#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%x-%j.out
# Pack a dataset into shards on one compute node, with all its cores.
#
#   sbatch slurm/pack.sh breast FOLDER                 FOLDER as the publisher ships it
#   sbatch slurm/pack.sh phantom                       synthetic, needs no folder
#   bash slurm/pack.sh breast FOLDER excerpt=true      here, without Slurm; more words of `bushpc pack`
#
# If the job is preempted or runs out of time, submit it again: finished shards are kept.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: sbatch slurm/pack.sh DATASET [FOLDER] [KEY=VALUE ...]" >&2
  exit 2
fi
words=("data=$1")
shift
# A word without "=" is the folder. It may be relative to the folder of the call, so it is resolved first.
if [ $# -gt 0 ] && [[ $1 != *=* || -d $1 ]]; then
  words+=("src=$(realpath -m -- "$1")")
  shift
fi
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/pack.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/pack.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/pack.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc pack "${words[@]}" "$@"
