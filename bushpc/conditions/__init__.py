"""What models are conditioned on in addition to the image: sentences, captions, and other kinds that a model declares.

    fold's training part ─fitted→ Condition ─of→ Batch.conditions (training)
                                            ├shown, under a Variant→ Batch.conditions (evaluation)
                                            └from_user, when_unknown→ Batch.conditions (new images)

A model lists its kinds in `Config.conditions`, and in `Config.variants` the ways in which it can be evaluated. Loader,
evaluator and report read these declarations and know no kind. No torch in this room.
"""

from bushpc.conditions.base import Condition, Draw, Scan, Shown, Variant
from bushpc.conditions.captions import Caption
from bushpc.conditions.columns import COLUMNS, columns_of
from bushpc.conditions.known import Known, kinds_for, read_table
from bushpc.conditions.released import Highlight, NumericPrompt, SpreadsheetPrompt
from bushpc.conditions.sentences import AttributePrompt, SpatialPrompt
from bushpc.conditions.variants import NO_PROMPTS, SENTENCES, VARIANTS

__all__ = [
    "COLUMNS",
    "NO_PROMPTS",
    "SENTENCES",
    "VARIANTS",
    "AttributePrompt",
    "Caption",
    "Condition",
    "Draw",
    "Highlight",
    "Known",
    "NumericPrompt",
    "Scan",
    "Shown",
    "SpatialPrompt",
    "SpreadsheetPrompt",
    "Variant",
    "columns_of",
    "kinds_for",
    "read_table",
]
