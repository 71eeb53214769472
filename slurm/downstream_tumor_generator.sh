#!/usr/bin/env bash
#SBATCH --job-name=downstream_tumor_generator
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# What synthetic scans are worth: Tables 3 and 4 of the tumor generation paper. Classification, segmentation by a U-Net
# and by the paper's nnU-Net: seven rows (nnU-Net's six) of five folds each as one array, then a report of each.
#
#   sbatch slurm/downstream_tumor_generator.sh data.synthetic=synthetic      from anywhere in the clone
#   bash slurm/downstream_tumor_generator.sh data.synthetic=synthetic        on a login node; words are overrides
#   bash slurm/downstream_tumor_generator.sh udiat data.synthetic=of_udiat   trains on UDIAT, and tests on BUSI and STU
#
# Generate first, for each fold by the generator that trained on its training part, eight scans for each real one:
#   bushpc generate runs/GENERATOR fold=0 n=4200 out=synthetic/fold0         and so on; for UDIAT, n=1100 are enough
# Stage the weights (bushpc weights pull model=efficientnet, and model=unet), pack busi, udiat and stu, and install
# nnU-Net: .venv/bin/pip install -c constraints.txt -e '.[nnunet]'. This job only submits and ends at once. Your site's
# partition, account and GPUs are in configs/cluster/*.yaml. Submitting again runs only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/downstream_tumor_generator.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
data=busi other=udiat
if [ "${1:-}" = udiat ]; then
  data=udiat other=busi
  shift
fi
.venv/bin/bushpc grid grid=tumor_downstream_classification data=$data "evaluate.external=[$other]" cluster=a100 "$@"
for grid in tumor_downstream_segmentation tumor_downstream_nnunet; do
  .venv/bin/bushpc grid grid=$grid data=$data "evaluate.external=[$other,stu]" cluster=a100 "$@"
done
