#!/usr/bin/env bash
#SBATCH --job-name=downstream_tumor_generator
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%x-%j.out
# What synthetic scans are worth: Tables 3 and 4 of the tumor generation paper, classification and segmentation, seven
# rows of five folds each as one array, then a report of each.
#
#   sbatch slurm/downstream_tumor_generator.sh data.synthetic=synthetic      from anywhere in the clone
#   bash slurm/downstream_tumor_generator.sh data.synthetic=synthetic        on a login node; words are overrides
#
# Generate first, for each fold by the generator that trained on its training part, eight scans for each real one:
#   bushpc generate runs/GENERATOR fold=0 n=4200 out=synthetic/fold0         and so on
# Stage the weights (bushpc weights pull model=efficientnet, and model=unet), and pack busi, udiat and stu. This job only
# submits and ends at once. Your site's partition, account and GPUs are in configs/cluster/*.yaml. Submitting again runs
# only what is missing.
set -euo pipefail
# Slurm runs a copy of this script from its spool; then the clone is where sbatch was called.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e slurm/downstream_tumor_generator.sh ] || cd "$(git -C "$SLURM_SUBMIT_DIR" rev-parse --show-toplevel)"
.venv/bin/bushpc grid grid=tumor_downstream_classification data=busi evaluate.external=[udiat] cluster=a100 "$@"
.venv/bin/bushpc grid grid=tumor_downstream_segmentation data=busi evaluate.external=[udiat,stu] cluster=a100 "$@"
