"""The evaluation variants of models that read sentences (XBusNet 2.7), and of models that read nothing.

A model with other variants declares them in its own file; this one need not know them.
"""

from __future__ import annotations

from bushpc.conditions.base import Variant

NO_PROMPTS = Variant(name="none", label="none (no spatial prompt)")
FIRST_PASS = Variant(name="first_pass", label="first_pass")
SHUFFLED_ATTRIBUTES = Variant(name="shuffled_attributes", label="shuffled_attributes (attributes of another patient)")
# Of the spatial prompt. Headline first: what a model without the asked variant is evaluated under.
SPATIAL = (
    FIRST_PASS,
    Variant(name="oracle", label="oracle (uses the ground-truth mask)", uses_ground_truth=True),
    NO_PROMPTS,
    Variant(name="wrong_size", label="wrong_size (falsified; uses the ground-truth mask)", uses_ground_truth=True),
    Variant(
        name="wrong_quadrant", label="wrong_quadrant (falsified; uses the ground-truth mask)", uses_ground_truth=True
    ),
)
SENTENCES = (*SPATIAL, SHUFFLED_ATTRIBUTES)
# In the order of tables. Also the labels of runs that recorded none.
VARIANTS = {variant.name: variant for variant in SENTENCES}
