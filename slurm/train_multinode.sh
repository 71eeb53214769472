#!/usr/bin/env bash
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# One fold of XBusNet on whole nodes with 8 x A100: one task per GPU, bf16 (engine.precision), gradients and optimizer
# sharded by ZeRO-2.
#
#   sbatch slurm/train_multinode.sh fold=1 engine=ddp        with settings
#   sbatch --nodes=4 slurm/train_multinode.sh                with options of sbatch
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=4 slurm/train_multinode.sh cluster=slurm
#
# A job that is preempted or runs out of time saves and requeues itself (--requeue). USR2 reaches the ranks 120 s
# before the limit; make that longer than a step and a save take. `scancel` ends the job. The same command continues at
# the last checkpoint. To continue on another number of nodes, give name=… and the old train.batch_size: the default is
# four samples per rank.
set -euo pipefail
# Set where sbatch was given --export=NONE; srun would then give the ranks nothing of this script's environment.
unset SLURM_EXPORT_ENV
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/train_multinode.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/train_multinode.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/train_multinode.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
# Your site's modules go here, e.g. `module load cuda`.

# Print why a link between GPUs or nodes failed, and nothing else.
export NCCL_DEBUG=WARN
# A collective that fails or times out (2 x engine.hang_s) ends its rank instead of waiting for the job's limit.
# This is torch's default; some modules and shell profiles switch it off.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# Every rank then writes which collectives it was in; a rank that took another branch differs.
export TORCH_FR_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE="$PWD/slurm-train-$SLURM_JOB_ID-nccl-rank"
# Set this only if ranks cannot connect: NCCL may have chosen a network that does not reach the other nodes (a
# container's bridge, the management network). `ip -brief address` on a node lists them.
# export NCCL_SOCKET_IFNAME=ib0
# Threads per rank: its share of the node. The default is all cores for every rank.
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# Compiled kernels go to each node's own disk, because many ranks in one shared folder wait for each other's file locks.
# Anybody can write to /tmp, so a folder of this name that is not ours could hold someone else's code and is not used.
# Every node checks its own folder, so this runs in the ranks' tasks.
private_caches='
  cache="${TMPDIR:-/tmp}/bushpc-compiled-$UID"
  mkdir -m 700 "$cache" 2>/dev/null || [ -d "$cache" -a -O "$cache" -a ! -L "$cache" ] || cache="$(mktemp -d)"
  export TORCHINDUCTOR_CACHE_DIR="$cache/inductor" TRITON_CACHE_DIR="$cache/triton"
  exec "$@"'

# When the ranks have ended, requeue the job if they stopped in order to continue. With a handler set, the shell waits
# for srun to end before it handles a signal. Rank 0 writes the run's folder into the file. The file must be visible
# from this shell and from rank 0, and TMPDIR may differ between tasks.
mkdir -p runs
run_file="$PWD/runs/.run-of-job-$SLURM_JOB_ID"
trap : TERM USR2
trap '.venv/bin/python -m bushpc.dispatch.requeue "$?" "$(cat "$run_file" 2>/dev/null)"; rm -f "$run_file"' EXIT

# --cpu-bind: every rank has its own cores, near its GPU if the site's gres.conf assigns cores to GPUs.
# --cpus-per-task: since Slurm 22.05 srun does not inherit it from the job.
# --kill-on-bad-exit: a rank that dies ends the others, which would wait for it in a collective.
# All GPUs of a node are visible to all its ranks, because NCCL copies between them directly; LOCAL_RANK chooses one.
gpus="${SLURM_GPUS_PER_NODE:-0}"
srun --cpu-bind=cores --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  bash -c "$private_caches" bash \
  .venv/bin/bushpc train --run-file="$run_file" model=xbusnet data=breast fold=0 engine=zero2 cluster=a100 \
  cluster.nodes="$SLURM_NNODES" cluster.ranks_per_node="$((SLURM_NTASKS / SLURM_NNODES))" \
  cluster.gpus="${gpus##*:}" train.batch_size="$((4 * SLURM_NTASKS))" "$@"
