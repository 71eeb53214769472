#!/usr/bin/env bash
# Slurm 22.05.8 (Debian 12's packages, unpacked into a folder; a controller without nodes on free ports): scancel with
# the id of one pending array task and a filter, as a safety net against a job of the same number that is not ours.
#
# Guess: the id and the filter both have to hold, so `scancel --name=mine 2_0` ends task 0 at most.
# Seen: it ends every pending task of the array, with exit status 0 and no word; so do --state=PENDING and --user.
# Without a filter only task 0 ends. Needs a Debian 12 with its package lists.
set -euo pipefail
folder=$(mktemp -d)
controller=""
trap '[ -z "$controller" ] || kill "$controller"; wait; rm -rf "$folder"' EXIT
cd "$folder"
for package in slurm-client slurmctld slurm-wlm-basic-plugins; do
  apt-get download --quiet "$package=22.05.8-4+deb12u3" >/dev/null 2>&1
done
for archive in *.deb; do dpkg -x "$archive" root; done
plugins=$folder/root/usr/lib/$(uname -m)-linux-gnu/slurm-wlm
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir state
cat >slurm.conf <<CONF
ClusterName=site
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny
SlurmctldPort=$port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmUser=$(id -un)
AuthType=auth/none
CredType=cred/none
PluginDir=$plugins
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
NodeName=n1
PartitionName=all Nodes=n1 Default=YES
CONF
clean=(env -i USER="$(id -un)" SLURM_CONF="$folder/slurm.conf" LD_LIBRARY_PATH="$plugins")
slurm() { "${clean[@]}" "root/usr/$@"; }
"${clean[@]}" root/usr/sbin/slurmctld-wlm -D -c >slurmctld.log 2>&1 &
controller=$!
for _ in $(seq 60); do slurm bin/scontrol ping 2>/dev/null | grep -q UP && break; sleep 0.5; done
left() {  # pending tasks of an array of four after `scancel "$@" <array>_0`
  local array
  array=$(slurm bin/sbatch --parsable --hold --job-name=mine --array=0-3 --output=/dev/null --wrap true)
  slurm bin/scancel "$@" "${array}_0"
  slurm bin/squeue --noheader --array --jobs="$array" --states=PENDING | wc -l
}
seen="$(left) $(left --name=mine) $(left --state=PENDING) $(left --user="$(id -un)")"
echo "pending tasks of four after scancel of one: without a filter, --name, --state, --user: $seen"
[ "$seen" = "3 0 0 0" ]
