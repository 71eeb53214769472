#!/bin/bash
# A container runtime for tests: sandboxed_root.sh IMAGE BINDS COMMAND… runs the command in a root file system of its own
# (by bubblewrap). The image is its /usr; none of Slurm's programs is in it.
image=$1 binds=$2
shift 2
mounts=()
IFS=, read -ra wanted <<<"$binds"
for bind in "${wanted[@]}"; do
  from=${bind%%:*} to=${bind#*:} how=--bind
  case $to in *:ro) to=${to%:ro} how=--ro-bind ;; esac
  mounts+=("$how" "$from" "$to")
done
# Slurm sends its signals to bubblewrap, too, which would end and take the rank along. Python listens in spite of this.
trap '' TERM USR2
exec bwrap --die-with-parent --ro-bind "$image" /usr --ro-bind /usr/lib /usr/lib --ro-bind /usr/lib64 /usr/lib64 \
  --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64 --ro-bind /etc /etc \
  --dev-bind /dev /dev --proc /proc --tmpfs /tmp "${mounts[@]}" /bin/sh -c '
    for name in squeue scontrol sbatch scancel sinfo; do
      command -v "$name" >/dev/null && echo "in the container: $name is visible"
    done
    echo "in the container:" $(ls /)
    exec "$@"' sh "$@"
