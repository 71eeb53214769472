"""What `bushpc postprocess` chose for a run: by fold, each on the others' predictions, and on all of them together.

bushpc.evaluate.choose ─runs/<name>/postprocess/<row>.json→ report | predict, export
"""

from __future__ import annotations

import typing as t
from collections.abc import Sequence

import msgspec

from bushpc.errors import ConfigError, DataError
from bushpc.runs.layout import CellDir
from bushpc.runs.record import Record
from bushpc.runs.records import DoneRecord


class Rule(Record, kw_only=True, frozen=True):
    """What is done to a predicted mask, in this order. All off is `plain`.

    fill: holes become lesion. smallest: parts with a smaller share of the image's area are dropped, so that a rule
    means the same at any size. largest: only the largest part stays.
    """

    fill: bool = False
    smallest: float = 0.0
    largest: bool = False

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not 0 <= self.smallest < 1:
            raise ConfigError(
                f"smallest part {self.smallest:g}: must be a share of the image's area, ≥ 0 and < 1, such as 0.001"
            )

    @property
    def words(self) -> str:
        """For tables and messages."""
        parts = [
            *(["holes filled"] if self.fill else []),
            *([f"parts below {self.smallest:.4g} of the image dropped"] if self.smallest else []),
            *(["largest part"] if self.largest else []),
        ]
        return ", ".join(parts) or "plain"


PLAIN = Rule()


class FoldChoice(Record, kw_only=True, frozen=True):
    """What was chosen for a fold, and what its images get by it.

    chosen_on: the folds whose predictions chose it; never this one. plain, chosen: metric → mean over its images; null
    where none has one.
    """

    fold: int
    chosen_on: list[int]
    rule: Rule
    images: int
    plain: dict[str, float | None]
    chosen: dict[str, float | None]


class Chosen(Record, kw_only=True, frozen=True):
    """cells: of the run, name → what identifies its weights and evaluation. metric: that decided. source: of the
    prompts. grid: of the masks. candidates: how many rules were tried. for_all: chosen on all folds, for new images.
    largest_difference: of the plain Dice of an image from its evaluation, as probability maps are kept in 8 bits.
    """

    created: str
    cells: dict[str, str]
    metric: str
    source: str
    grid: str
    candidates: int
    folds: list[FoldChoice]
    for_all: Rule
    largest_difference: float

    @classmethod
    def _mend(cls, path: t.Any) -> str:
        return "Choose again: `bushpc postprocess RUN`"

    def is_of(self, cells: Sequence[tuple[str, CellDir]]) -> bool:
        """Whether it was chosen on what these cells predict now."""
        return self.cells == {name: stamp(folder) for name, folder in cells}

    def for_fold(self, fold: int | None) -> Rule:
        """For new images: of one fold's model what the others chose, of the ensemble what all chose."""
        return next((each.rule for each in self.folds if each.fold == fold), self.for_all)


def stamp(folder: CellDir) -> str:
    """Identifies the weights and the evaluation of a cell that is done."""
    done = DoneRecord.read(folder.done) or DoneRecord()
    return f"{done.config} {done.step} {done.finished}"


def rule_of(content: t.Mapping[str, t.Any] | None) -> Rule:
    """The rule of an export's recipe; plain where it has none. Raises: DataError for what is none."""
    try:
        return msgspec.convert(content, Rule) if content else PLAIN
    except (msgspec.ValidationError, ConfigError) as error:
        raise DataError(f"the recipe's post-processing {content} is damaged ({error}): export again") from error
