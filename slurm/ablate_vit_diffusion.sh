#!/usr/bin/env bash
#SBATCH --job-name=ablate_vit_diffusion
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Table 3 of the ViT diffusion paper on BUSI: six rows of five folds as one array, then the report. Before, on the login
# node:
#   bushpc weights pull model=vit_diffusion
#
#   sbatch slurm/ablate_vit_diffusion.sh             from anywhere in the clone
#   bash slurm/ablate_vit_diffusion.sh data=breast   on a login node, with settings
#
# The rows with TDC match persistence diagrams on the CPU from epoch 1 on, which takes longest while the predictions are
# still noise: for a sample of 256 pixels whose predicted noise is itself noise, 4 processor seconds at t = 50, 3 at 300
# and 1 at 600 (measured once, 2026-12-01). Give their ranks as many processors as there are (cluster.cpus_per_rank), or
# set model.topo_downsample=2.
#
# Samplers and steps on one training. Submit the second when the first run is done:
#   sbatch slurm/cv_vit_diffusion.sh name=X
#   sbatch slurm/ablate_vit_diffusion.sh grid=vit_diffusion_sampling train.weights_from=runs/X
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/ablate_vit_diffusion.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/ablate_vit_diffusion.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/ablate_vit_diffusion.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc grid grid=vit_diffusion_components data=busi cluster=a100 "$@"
