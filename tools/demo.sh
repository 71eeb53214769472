#!/usr/bin/env bash
# `make demo`: pack a dataset, cross-validate a small XBusNet on this machine, print the fold table, write the report.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
if [ -n "${DATA:-}" ]; then
  data=breast
  "$bin/bushpc" pack data=breast "src=$DATA"
else
  data=phantom
  "$bin/bushpc" pack data=phantom
fi
"$bin/bushpc" cv model=xbusnet_small "data=$data" cluster=local --wait
