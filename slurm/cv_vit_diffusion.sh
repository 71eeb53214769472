#!/usr/bin/env bash
#SBATCH --job-name=cv_vit_diffusion
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of ViT-conditioned diffusion on BUSI: one array of five cells, then the report. On the
# login node, before: bushpc weights pull model=vit_diffusion
#
#   sbatch slurm/cv_vit_diffusion.sh             from anywhere in the clone
#   bash slurm/cv_vit_diffusion.sh data=breast   on a login node; words are overrides
#
# The paper samples its larger datasets (Table 2), where Table 1 takes the auxiliary head:
#   sbatch slurm/cv_vit_diffusion.sh data=isic2018 model.inference=generative
#   sbatch slurm/cv_vit_diffusion.sh data=refuge2 model.inference=generative model.mask_classes=2
#   sbatch slurm/cv_vit_diffusion.sh data=brats2021 model.inference=generative model.mask_classes=3 model.channels=4
# Of several classes the first alone is scored so far: the disc, the enhancing tumour.
#
# This job only submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml.
# Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_vit_diffusion.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
exec .venv/bin/bushpc cv model=vit_diffusion data=busi cluster=a100 "$@"
