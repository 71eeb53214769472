#!/bin/bash
# Processor time of `bushpc shards audit` at two commits, one after the other, three times each.
# audit_time.sh OLD_CLONE NEW_CLONE SHARDS PYTHON
for round in 1 2 3; do
  for clone in "$1" "$2"; do
    out=$(mktemp -d)
    PYTHONPATH=$clone bash -c 'TIMEFORMAT="%U %S"; time "$0" -m bushpc.cli shards audit "data=$1" "out=$2" folds=published >/dev/null 2>&1' \
      "$4" "$3" "$out" 2>&1 | awk -v clone="$clone" '{printf "%s %.1f s\n", clone, $1 + $2}'
    rm -r "$out"
  done
done
