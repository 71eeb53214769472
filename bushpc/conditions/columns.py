"""Columns of conditions in per_image.csv and predictions.csv."""

from __future__ import annotations

import typing as t
from collections.abc import Mapping, Sequence

from bushpc.conditions.base import Condition, Scan
from bushpc.conditions.sentences import AttributePrompt, SpatialPrompt, attribute_prompt

# Every table has these, whether its model reads sentences or not: readers of older tables look for them.
COLUMNS = (SpatialPrompt.column, AttributePrompt.column)


def columns_of(scan: Scan, kinds: Sequence[Condition], used: Mapping[str, Sequence[t.Any]], i: int) -> dict[str, str]:
    """Column → value of sample `i`, which is `scan`. used: name → values that the prediction was made with.

    The clinical sentence is always given, for readers of the table.
    """
    always = {SpatialPrompt.column: "", AttributePrompt.column: attribute_prompt(scan.attributes)}
    own = {kind.column: kind.written(used[kind.name][i]) for kind in kinds if kind.column and kind.name in used}
    return always | own
