"""What a stand-in for Slurm's commands answers: shell scripts by the command's name."""

PARTITION = (
    "echo PartitionName=gpu Default=YES MaxTime=1-00:00:00 MaxNodes=2 State=UP GraceTime=60 PreemptMode=REQUEUE; "
    "echo PartitionName=long Default=NO MaxTime=UNLIMITED MaxNodes=UNLIMITED State=DOWN GraceTime=0 PreemptMode=OFF"
)
SCONTROL = (
    f'case "$*" in *partition*) {PARTITION};; *config*) echo "KillWait = 30 sec"; echo "JobRequeue = 0"; '
    'echo "AccountingStorageEnforce = associations";; *) echo up;; esac'
)
FAKE = {
    "squeue": "true",
    "sbatch": "echo slurm 23.11",
    "scontrol": SCONTROL,
    "sinfo": "echo 'gpu*|64|512000|gpu:a100:8(S:0-1)|a100,ib|3|mix'; echo 'gpu*|32|128000|(null)|cpu|40|idle~'",
    "sacctmgr": "echo 'lab|normal,long'",
}
