"""Which images an evaluation is through with: it may take hours where a prediction samples a thousand steps.

    evaluate ─a batch's rows, as soon as its maps are saved→ <cell>/evaluated/<source>.<rank>.jsonl ─→ evaluate, later

Batches are the same whenever the number of ranks is, and a batch of which a line is missing is predicted again as a
whole: what was interrupted ends with the same numbers, bit for bit, as what was not.
"""

from __future__ import annotations

import json
import shutil
import typing as t

from bushpc.runs.layout import CellDir

# One image: what it is part of, its row of per_image.csv, and its share of the calibration.
Line = dict[str, t.Any]


class Journal:
    """The images of one prompt source that are done.

    weights: names what predicts; lines of other weights, from before a run was trained on, do not count.
    """

    def __init__(self, cell_dir: CellDir, source: str, rank: int, weights: str) -> None:
        self._folder, self._source, self._weights = cell_dir.evaluated, source, weights
        self._path = self._folder / f"{source}.{rank}.jsonl"

    def read(self) -> dict[str, Line]:
        """Key → line, of all ranks; a line that a kill cut off is none."""
        lines: dict[str, Line] = {}
        for path in sorted(self._folder.glob(f"{self._source}.*.jsonl")):
            for text in path.read_text(errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    if line["weights"] == self._weights:
                        lines[line["row"]["key"]] = line
                except (ValueError, TypeError, LookupError):
                    continue
        return lines

    def note(self, lines: list[Line]) -> None:
        """Add a batch, in one write."""
        self._folder.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            # The first line break ends what a kill may have cut off.
            file.write("\n" + "".join(json.dumps({"weights": self._weights, **line}) + "\n" for line in lines))


def forget(cell_dir: CellDir) -> None:
    """Delete the journals of a cell that is done: per_image.csv has it all."""
    shutil.rmtree(cell_dir.evaluated, ignore_errors=True)
