#!/usr/bin/env bash
#SBATCH --job-name=ablate_vit_diffusion
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# The ablation of the ViT diffusion paper's Table 3 on BUSI: six rows of five folds as one array, then the report. On
# the login node, before: bushpc weights pull model=vit_diffusion
#
#   sbatch slurm/ablate_vit_diffusion.sh             from anywhere in the clone
#   bash slurm/ablate_vit_diffusion.sh data=breast   on a login node; words are overrides
#
# Samplers and steps beside the auxiliary head, on one training; the second when the first one's run is done:
#   sbatch slurm/cv_vit_diffusion.sh name=X
#   sbatch slurm/ablate_vit_diffusion.sh grid=vit_diffusion_sampling train.weights_from=runs/X
#
# This job only submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml.
# Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/ablate_vit_diffusion.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc grid grid=vit_diffusion_components data=busi cluster=a100 "$@"
