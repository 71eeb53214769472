"""Promises of captions: the paper's sentence, in the dataset's own words where it has some."""

from __future__ import annotations

import pytest

from bushpc.conditions.captions import caption


@pytest.mark.parametrize(
    ("label", "attributes", "said"),
    [
        ("benign", {}, "benign tumor with homogeneous echogenicity and clear boundary"),
        ("malignant", {}, "malignant tumor with heterogeneous echogenicity and unclear boundary"),
        ("malignant", {"echogenicity": None, "margin": None, "birads": "5"}, "malignant tumor with heterogeneous"),
        (
            "malignant",
            {"echogenicity": "hypoechoic", "margin": "circumscribed"},
            "malignant tumor with homogeneous echogenicity and clear boundary",
        ),
        (
            "benign",
            {"echogenicity": "complex cystic/solid", "margin": "not circumscribed - angular&indistinct"},
            "benign tumor with heterogeneous echogenicity and unclear boundary",
        ),
        ("benign", {"margin": "not circumscribed - indistinct"}, "with homogeneous echogenicity and unclear boundary"),
        # What a drawn prior says of a synthetic scan.
        (
            "malignant",
            {"echogenicity": "homogeneous", "boundary": "clear", "size": "small", "seed": 7.0},
            "malignant tumor with homogeneous echogenicity and clear boundary",
        ),
        ("normal", {"echogenicity": None}, "breast ultrasound image without tumor"),
        ("unlabelled", {"echogenicity": "anechoic"}, "breast ultrasound image of tumor with homogeneous echogenicity"),
    ],
)
def test_a_caption_follows_class_and_attributes(label, attributes, said):
    sentence = caption(label, attributes)
    assert said in sentence
    assert sentence.startswith("breast ultrasound image ")


def test_nothing_known_is_said_of_a_lesion_without_class_and_attributes():
    assert caption("unlabelled", {}) == "breast ultrasound image of tumor"
