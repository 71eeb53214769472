"""Try every model on a GPU that is not there: training steps, checkpoint, prediction, sampling, memory, operations.

    tools/fake_gpu [--small] [--only NAME …] [--precision bf16 …] [--out FOLDER]
    tools/fake_gpu --tables FOLDER

Writes a row as soon as it is known, into FOLDER/rows.jsonl as well; rows that are there are not made again. --tables
writes the tables from them, and bushpc/config/gpu_memory.yaml. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path

from tools.fakegpu.cases import CASES
from tools.fakegpu.tables import HEAD, line, read, write_memory, write_tables
from tools.fakegpu.trial import try_case

PRECISIONS = ("bf16", "fp16", "fp32")


def main(words: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only the small sizes")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp16"], choices=PRECISIONS)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the rows here")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="only write the tables from the rows in FOLDER")
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    if given.tables:
        write_tables(given.tables)
        write_memory(given.tables)
        return 0
    rows = given.out / "rows.jsonl" if given.out else None
    known = {(row.name, row.precision) for row in read(given.out)} if rows and rows.exists() else set()
    failed = 0
    print(HEAD, flush=True)
    for case in CASES:
        if (given.small and case.full) or (given.only and not any(word in case.name for word in given.only)):
            continue
        for precision in given.precision:
            if (case.name, precision) in known:
                continue
            row = try_case(case, precision)
            failed += row.failed
            print(line(row), flush=True)
            if rows:
                rows.parent.mkdir(parents=True, exist_ok=True)
                with rows.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
