#!/usr/bin/env bash
# bubblewrap 0.8.0 (Debian 12's package, unpacked into a folder): a rank that saves on TERM, started in a container
# without root by `bwrap --die-with-parent`, when the cluster sends TERM to every process of the job's step.
#
# Guess: the rank gets TERM, saves and ends by itself; bwrap waits for it.
# Seen: bwrap itself dies of TERM, and the rank is killed in the same moment: nothing is saved. With TERM ignored before
# bwrap starts (trap '' TERM) bwrap stays, and the rank, which sets its own handler, saves. Needs a Debian 12 with its
# package lists and user namespaces.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download --quiet bubblewrap=0.8.0-2+deb12u1 >/dev/null 2>&1
dpkg -x bubblewrap_*.deb root
cat >rank.py <<'PYTHON'
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
PYTHON
after_term() {  # "$1": shell words before the container starts
  mkdir "$2"
  # A process group of its own stands for the step, to all of which the cluster sends the signal.
  setsid bash -c "$1; exec root/usr/bin/bwrap --die-with-parent --dev-bind / / python3 rank.py $2" &
  local step=$!
  while [ ! -e "$2/ready" ]; do sleep 0.1; done
  kill -TERM -- "-$step"
  wait "$step" || true
  sleep 1
  if [ -e "$2/saved" ]; then echo saved; else echo lost; fi
}
plain=$(after_term : plain 2>/dev/null)
ignored=$(after_term "trap '' TERM" ignored 2>/dev/null)
echo "work of the rank after TERM: $plain; with TERM ignored by bwrap: $ignored"
[ "$plain $ignored" = "lost saved" ]
