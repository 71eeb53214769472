"""The journal of finished images of an evaluation, which may take hours if a prediction samples a thousand steps.

    evaluate ─a batch's rows, as soon as its maps are saved→ <cell>/evaluated/<source>.<rank>.jsonl ─→ evaluate, later

Batches depend on the number of ranks only, and a batch with a missing line is predicted again completely. So an
interrupted evaluation gives the same numbers, bit for bit, as an uninterrupted one.
"""

from __future__ import annotations

import json
import shutil
import typing as t

from bushpc.runs.layout import CellDir

# One image: its part, its row of per_image.csv, and its contribution to the calibration.
Line = dict[str, t.Any]


class Journal:
    """The images of one prompt source that are done.

    weights: identifies the weights; lines of other weights, from before further training, are ignored.
    """

    def __init__(self, cell_dir: CellDir, source: str, rank: int, weights: str) -> None:
        self._folder, self._source, self._weights = cell_dir.evaluated, source, weights
        self._path = self._folder / f"{source}.{rank}.jsonl"

    def read(self) -> dict[str, Line]:
        """Key → line, of all ranks; lines truncated by a kill are ignored."""
        lines: dict[str, Line] = {}
        for path in sorted(self._folder.glob(f"{self._source}.*.jsonl")):
            for text in path.read_text(errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    if line["weights"] == self._weights:
                        lines[line["row"]["key"]] = line
                except (ValueError, TypeError, LookupError, RecursionError):
                    continue
        return lines

    def note(self, lines: list[Line]) -> None:
        """Append a batch in one write."""
        self._folder.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            # The leading line break ends a line that a kill may have truncated.
            file.write("\n" + "".join(json.dumps({"weights": self._weights, **line}) + "\n" for line in lines))


def forget(cell_dir: CellDir) -> None:
    """Delete the journals of a finished cell, as per_image.csv contains everything."""
    shutil.rmtree(cell_dir.evaluated, ignore_errors=True)
