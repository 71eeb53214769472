#!/usr/bin/env bash
# tensorboard 2.21.0: the event files of a training that was stopped after step 5 and went on from step 3, the second
# file opened with purge_step=3 as its documentation says. The second attempt ran on a node whose clock is a minute
# behind.
#
# Guess: the second attempt's values of steps 3 to 5 replace the first's: it was written later.
# Seen: both are shown, the first attempt's last, and a curve that runs back. Files are read in the order of their names, which begin with the second
# of the writer's clock; so the file that purges is read first and purges nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorboard==2.21.0 setuptools==80.9.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import os, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
def attempt(folder, clock, steps, value, purge=None):
    with open(f"{folder}/events.out.tfevents.{clock}.node.1.0", "wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=clock, file_version="brain.Event:2").SerializeToString())
        if purge is not None:
            start = SessionLog(status=SessionLog.START)
            records.write(Event(wall_time=clock, step=purge, session_log=start).SerializeToString())
        for step in steps:
            summary = Summary(value=[Summary.Value(tag="loss", simple_value=value)])
            records.write(Event(wall_time=clock + step, step=step, summary=summary).SerializeToString())
        file.flush()
for name, clock in (("right", 2000000060), ("behind", 1999999940)):
    folder = f"{sys.argv[1]}/{name}"
    os.mkdir(folder)
    attempt(folder, 2000000000, range(6), 1.0)
    attempt(folder, clock, range(3, 6), 2.0, purge=3)
    shown = EventAccumulator(folder)
    shown.Reload()
    print("clock", name + ":", *[f"{point.step}={point.value:.0f}" for point in shown.Scalars("loss")])' "$folder")
echo "$seen"
[ "$(echo $seen)" = "clock right: 0=1 1=1 2=1 3=2 4=2 5=2 clock behind: 3=2 4=2 5=2 0=1 1=1 2=1 3=1 4=1 5=1" ]
