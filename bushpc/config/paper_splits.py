"""The single random splits of papers: how many scans train, tune and test. None of their lists was published.

`folds=hybrid_attention_split` names one; `folds=paper_split` is the one of the chosen model's paper. The split is drawn
with seed 0 and frozen beside the shards (bushpc.shards.paper_split).
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from bushpc.errors import ConfigError, unknown_name

PAPER_SPLIT = "paper_split"
# What records and tables say of every such split.
UNPUBLISHED = "the paper did not publish its list, so this one was drawn with seed 0"


@dataclass(frozen=True, kw_only=True)
class PaperSplit:
    """One paper's split of one dataset.

    source: as `folds=` names it. models: the paper's own, their variants included. counts: scans that train, tune (0:
    the paper has no such part) and test; None where it states a share only. test_share: then. normals: whether its
    counts include normal scans. printed: as the paper has it.
    """

    source: str
    data: str
    paper: str
    models: tuple[str, ...]
    printed: str
    counts: tuple[int, int, int] | None = None
    test_share: float | None = None
    normals: bool = False

    @property
    def total(self) -> int | None:
        """Scans that it divides."""
        return sum(self.counts) if self.counts else None

    def is_of(self, model: str) -> bool:
        """Whether the paper's own model, or a variant, has this name."""
        return any(model == name or model.startswith(f"{name}_") for name in self.models)

    @property
    def sentence(self) -> str:
        """For records, tables and warnings."""
        return f"{self.printed} as in the {self.paper}; {UNPUBLISHED}"


_TUMOR = ("tumor_generator_split", "tumor generation paper", ("tumor_generator", "efficientnet", "nnunet"))
_HYBRID = ("hybrid_attention_split", "hybrid attention paper", ("hybrid_attention",))
_SAM = ("sam_multitask_split", "SAM multi-task paper", ("sam_multitask",))


def _split(paper: tuple[str, str, tuple[str, ...]], data: str, printed: str, **more: t.Any) -> PaperSplit:
    source, title, models = paper
    return PaperSplit(source=source, data=data, paper=title, models=models, printed=printed, **more)


SPLITS = (
    _split(_TUMOR, "busi", "396 training, 54 validation and 197 test scans", counts=(396, 54, 197)),
    _split(_TUMOR, "udiat", "130 training and 33 test scans", counts=(130, 0, 33)),
    # 780 are all of BUSI, its 133 normal scans among them.
    _split(_HYBRID, "busi", "700 training and 80 test scans", counts=(700, 0, 80), normals=True),
    # UDIAT has 163 scans, so this one is refused.
    _split(_HYBRID, "udiat", "133 training and 33 test scans", counts=(133, 0, 33)),
    _split(_SAM, "precise", "80:20 per class", test_share=0.2, normals=True),
)
SOURCES = tuple(dict.fromkeys(split.source for split in SPLITS))


def split_of(source: str, data: str) -> PaperSplit | None:
    """The split that `folds=source` means for a dataset; None if `source` is not a paper's split.

    Raises: ConfigError if that paper does not split the dataset.
    """
    if source not in SOURCES:
        return None
    for split in SPLITS:
        if (split.source, split.data) == (source, data):
            return split
    others = ", ".join(split.data for split in SPLITS if split.source == source)
    raise ConfigError(
        f"folds={source} with data={data}: that paper divides {others}. Use folds=frozen"
        + (f", or one of {_listed(data)}" if _listed(data) else "")
    )


def source_for(data: str, model: str) -> str:
    """What `folds=paper_split` means for a dataset and the model that was chosen.

    Raises: ConfigError if no paper splits the dataset, or several do and the model belongs to none of them.
    """
    of_data = [split for split in SPLITS if split.data == data]
    if not of_data:
        datasets = sorted({split.data for split in SPLITS})
        raise ConfigError(f"folds={PAPER_SPLIT}: {unknown_name('dataset that a paper splits once', data, datasets)}")
    of_model = [split for split in of_data if split.is_of(model)]
    if len(chosen := of_model or of_data) > 1:
        raise ConfigError(
            f"folds={PAPER_SPLIT} with model={model}: more than one paper splits {data}. Choose {_listed(data)}"
        )
    return chosen[0].source


def _listed(data: str) -> str:
    return ", ".join(f"folds={split.source} ({split.printed})" for split in SPLITS if split.data == data)
