#!/usr/bin/env bash
# bash 5.2.15 (Debian 12's package, unpacked into a folder): a batch script that waits for its step and has traps on
# CONT and TERM, when both signals come together, as Slurm sends them to a job that is put back into the queue.
#
# Guess: both traps run, in one order or the other, as a signal that bash has got is never forgotten.
# Seen: of 40 scripts in `wait`, most hear only one of the two, and the other is lost for good. In `read -t` on a pipe
# that nobody writes to, nearly all hear both. Needs a Debian 12 with its package lists.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download --quiet bash=5.2.15-2+b13 >/dev/null 2>&1
dpkg -x bash_*.deb root
cat >script.sh <<'BASH'
heard=
trap 'heard="$heard CONT"' CONT
trap 'heard="$heard TERM"' TERM
sleep 1.5 & step=$!
mkfifo "pipe$$"
exec 3<>"pipe$$"
echo ready
if [ "$1" = wait ]; then
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
else
  while kill -0 "$step" 2>/dev/null; do read -r -t 0.1 -u 3; done
fi
set -- $heard
echo $#
BASH
cat >count.py <<'PYTHON'
import os, signal, subprocess, sys, time
both = 0
for _ in range(40):
    run = subprocess.Popen(["root/bin/bash", "script.sh", sys.argv[1]], stdout=subprocess.PIPE, text=True)
    run.stdout.readline()
    time.sleep(0.2)
    os.kill(run.pid, signal.SIGCONT)
    os.kill(run.pid, signal.SIGTERM)
    both += run.communicate()[0].strip() == "2"
print(both)
PYTHON
root/bin/bash --version | head -n 1
waiting=$(python3 count.py wait)
reading=$(python3 count.py read)
echo "scripts of 40 that heard both signals: $waiting in wait, $reading in read -t"
[ "$waiting" -lt 20 ] && [ "$reading" -ge 36 ]
