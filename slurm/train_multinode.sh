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
# shared out by ZeRO-2.
#
#   sbatch slurm/train_multinode.sh fold=1 engine=ddp        words are overrides
#   sbatch --nodes=4 slurm/train_multinode.sh                other nodes, GPUs, partition, time: sbatch's own options
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=4 slurm/train_multinode.sh cluster=slurm
#
# Preempted, or out of time, the job saves and goes back into the queue by itself (--requeue; USR2 reaches the ranks
# 120 s before the limit, so make that more than a step and a save take). `scancel` ends it. The same command goes on
# from the last checkpoint; on another number of nodes, too, if it says name=… and the train.batch_size it had: the
# default grows with the ranks, four samples for each.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/train_multinode.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
# Your site's modules go here, e.g. `module load cuda`.

# Says why a link between GPUs or nodes failed, and is silent otherwise.
export NCCL_DEBUG=WARN
# A collective that fails or times out (2 x engine.hang_s) ends its rank instead of waiting for the job's limit.
# torch's own default; stated because modules and shell profiles switch it off for old versions.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# Then every rank writes which collectives it was in: they differ where one rank took another way.
export TORCH_FR_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE="$PWD/slurm-train-$SLURM_JOB_ID-nccl-rank"
# Only where ranks cannot connect: NCCL then took a network that does not lead to the other nodes (a container's
# bridge, the management network). `ip -brief address` on a node names them.
# export NCCL_SOCKET_IFNAME=ib0
# One thread pool per rank, as large as its share of the node; the default is all cores for each of the ranks.
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
# Compiled kernels lie on each node's own disk: many ranks in one shared folder wait for each other's file locks.
# /tmp is everybody's: a folder of this name that is not ours may hold someone else's compiled code. Each node looks at
# its own, so this runs in the ranks' tasks.
private_caches='
  cache="${TMPDIR:-/tmp}/bushpc-compiled-$UID"
  mkdir -m 700 "$cache" 2>/dev/null || [ -d "$cache" -a -O "$cache" -a ! -L "$cache" ] || cache="$(mktemp -d)"
  export TORCHINDUCTOR_CACHE_DIR="$cache/inductor" TRITON_CACHE_DIR="$cache/triton"
  exec "$@"'

# When the ranks have ended: back into the queue, if they stopped in order to go on. A shell that has a handler waits
# for srun to end before it minds the signal. Rank 0 writes the run's folder into the file, which both must see: TMPDIR
# may be another one in every task.
mkdir -p runs
run_file="$PWD/runs/.run-of-job-$SLURM_JOB_ID"
trap : TERM USR2
trap '.venv/bin/python -m bushpc.dispatch.come_back "$?" "$(cat "$run_file" 2>/dev/null)"; rm -f "$run_file"' EXIT

# --cpu-bind: a rank's cores are its own, near its GPU where the site's gres.conf names cores for GPUs.
# --cpus-per-task: since Slurm 22.05 srun does not take it over from the job.
# --kill-on-bad-exit: a rank that dies ends the others, which would wait for it in a collective.
# All GPUs of a node are visible to all its ranks, as NCCL's direct copies between them need; LOCAL_RANK chooses.
gpus="${SLURM_GPUS_PER_NODE:-0}"
srun --cpu-bind=cores --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  bash -c "$private_caches" bash \
  .venv/bin/bushpc train --run-file="$run_file" model=xbusnet data=breast fold=0 engine=zero2 cluster=a100 \
  cluster.nodes="$SLURM_NNODES" cluster.ranks_per_node="$((SLURM_NTASKS / SLURM_NNODES))" \
  cluster.gpus_per_node="${gpus##*:}" train.batch_size="$((4 * SLURM_NTASKS))" "$@"
