#!/usr/bin/env bash
#SBATCH --job-name=generate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Synthetic scans from a trained generator, on all GPUs of a node: one task per GPU. The samples do not depend on their
# number.
#
#   bash slurm/generate.sh runs/generator fold=0 n=5000 out=shards/synthetic_busi/fold0     on a login node
#   bash slurm/generate.sh --nodes=4 runs/generator …            with options of sbatch, written with =
#   bash slurm/generate.sh --ntasks-per-node=2 --gpus-per-node=0 runs/generator …           without GPUs
#
# This first checks what can be checked without a GPU (`bushpc generate --check`, which loads the model), then submits.
# `sbatch slurm/generate.sh runs/generator …` submits without the check; put options of sbatch before the script.
# Paths are relative to the clone. A job that is preempted or runs out of time requeues itself and continues after the
# last finished batch. `scancel` ends it; the same command continues it.
set -euo pipefail
# Set where sbatch was given --export=NONE; srun would then give the ranks nothing of this script's environment.
unset SLURM_EXPORT_ENV
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/generate.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/generate.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/generate.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
# Your site's modules go here, e.g. `module load cuda`.

if [ -z "${SLURM_JOB_ID:-}" ]; then
  options=()
  while [[ "${1:-}" == -* ]]; do
    options+=("$1")
    shift
  done
  .venv/bin/bushpc generate --check "$@"
  exec sbatch "${options[@]}" slurm/generate.sh "$@"
fi

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# USR2 comes 60 s before the limit. The requeue then ends the ranks; batches are never half written.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR2
# --kill-on-bad-exit: a rank that dies ends the others, which would wait for it. The shell must be in `wait` to handle
# signals while srun runs.
srun --cpu-bind=cores --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  .venv/bin/bushpc generate "$@" &
wait $!
