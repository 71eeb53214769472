#!/usr/bin/env bash
#SBATCH --job-name=downstream_tumor_generator
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# Training with synthetic scans: Tables 3 and 4 of the tumor generation paper. Three grids: classification,
# segmentation by a U-Net, segmentation by the paper's nnU-Net. Each has seven rows (nnU-Net six) of five folds, and a
# report.
#
#   sbatch slurm/downstream_tumor_generator.sh data.synthetic=synthetic      from anywhere in the clone
#   bash slurm/downstream_tumor_generator.sh data.synthetic=synthetic        on a login node, with settings
#   bash slurm/downstream_tumor_generator.sh udiat data.synthetic=of_udiat   train on UDIAT, test on BUSI and STU
#
# Before:
#   bushpc generate runs/GENERATOR fold=0 n=4200 out=synthetic/fold0         for every fold; for UDIAT n=1100 is enough
#   bushpc weights pull model=efficientnet
#   bushpc weights pull model=unet
# The generator of a fold must have trained on that fold's training part; n is eight scans per real one. Pack busi,
# udiat and stu, and install nnU-Net: .venv/bin/pip install -c constraints.txt -e '.[nnunet]'
#
# This job submits the others and ends. Partition, account and GPUs come from configs/cluster/*.yaml (cluster=NAME).
# Submit it again to run only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; the clone is then where sbatch was called, or above.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/downstream_tumor_generator.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
until [ -e slurm/downstream_tumor_generator.sh ]; do
  [ "$PWD" != / ] || { echo "slurm/downstream_tumor_generator.sh: not called from a clone of bushpc; first: cd <the clone>" >&2 && exit 2; }
  cd ..
done
[ -x .venv/bin/bushpc ] || { echo "$PWD has no .venv/bin/bushpc: install it there, see README.md" >&2 && exit 2; }
data=busi other=udiat
if [ "${1:-}" = udiat ]; then
  data=udiat other=busi
  shift
fi
.venv/bin/bushpc grid grid=tumor_downstream_classification data=$data "evaluate.external=[$other]" cluster=a100 "$@"
for grid in tumor_downstream_segmentation tumor_downstream_nnunet; do
  .venv/bin/bushpc grid grid=$grid data=$data "evaluate.external=[$other,stu]" cluster=a100 "$@"
done
