#!/usr/bin/env bash
#SBATCH --job-name=cv_vit_diffusion
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Five-fold cross-validation of ViT-conditioned diffusion on BUSI: one array of five cells, then the report. Before,
# on the login node:
#   bushpc weights pull model=vit_diffusion
#
#   sbatch slurm/cv_vit_diffusion.sh             from anywhere in the clone
#   bash slurm/cv_vit_diffusion.sh data=breast   on a login node, with settings
#
# The paper samples on its larger datasets (Table 2); Table 1 uses the auxiliary head:
#   sbatch slurm/cv_vit_diffusion.sh data=isic2018 model.inference=generative
#   sbatch slurm/cv_vit_diffusion.sh data=refuge2 model.inference=generative model.mask_classes=2
#   sbatch slurm/cv_vit_diffusion.sh data=brats2021 model.inference=generative model.mask_classes=3 model.channels=4
# Of several classes each is scored; the tables have their mean, and one per class.
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/cv_vit_diffusion.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/cv_vit_diffusion.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/cv_vit_diffusion.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
exec .venv/bin/bushpc cv model=vit_diffusion data=busi cluster=a100 "$@"
