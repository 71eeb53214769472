#!/usr/bin/env bash
# Slurm 22.05.8 (Debian 12's slurm-client and slurm-wlm-basic-plugins, unpacked into a folder): which options a site's
# sbatch takes, to check a user's words before anything is queued. Needs a Debian 12 with its package lists.
#
# Guess: `sbatch --help` lists every long option, so one that is not in it is a typing error.
# Seen: --hint, --prefer, --network, --wait-all-nodes, --acctg-freq and --kill-on-invalid-dep are not in it and are
# taken all the same. `sbatch --OPTION=VALUE --version` tells: it needs no controller and refuses what is misspelled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for package in slurm-client slurm-wlm-basic-plugins; do
  apt-get download --quiet "$package=22.05.8-4+deb12u3" >/dev/null 2>&1
done
for archive in *.deb; do dpkg -x "$archive" root; done
plugins=$folder/root/usr/lib/$(uname -m)-linux-gnu/slurm-wlm
cat >slurm.conf <<CONF
ClusterName=site
SlurmctldHost=localhost
PluginDir=$plugins
NodeName=n1
PartitionName=all Nodes=n1 Default=YES
CONF
sbatch() { env -i SLURM_CONF="$folder/slurm.conf" LD_LIBRARY_PATH="$plugins" root/usr/bin/sbatch "$@"; }
sbatch --version
sbatch --help >help.txt
seen=""
for option in hint=nomultithread prefer=a network=a wait-all-nodes=1 acctg-freq=30 kill-on-invalid-dep=yes \
  propagate=NONE hnt=nomultithread; do
  listed=no taken=no
  if grep -q -- "--${option%%=*}\b" help.txt; then listed=yes; fi
  if sbatch "--$option" --version >/dev/null 2>&1; then taken=yes; fi
  echo "--$option: in --help $listed, taken $taken"
  seen+="$listed/$taken "
done
[ "$seen" = "no/yes no/yes no/yes no/yes no/yes no/yes yes/yes no/no " ]
