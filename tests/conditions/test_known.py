"""Promises of the prompt table: sentences as training words them, and nothing in it is silently lost."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pytest

from bushpc.conditions import SpatialPrompt, read_table
from bushpc.conditions.sentences import SizeBins, attribute_prompt, spatial_prompt
from bushpc.errors import DataError

FILES = [PurePosixPath(name) for name in ("a.png", "sub/b.png", "sub/b.jpg")]


def test_attributes_are_worded_as_in_training(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("File,Shape,Margin,BIRADS,pixel_mm,remark\na.png,oval,circumscribed,3,0.08,x\nsub/b.jpg,,,,,\n")
    table = read_table(path, FILES)
    a, b = table[FILES[0]], table[FILES[2]]
    assert a.conditions["attribute_prompts"] == attribute_prompt(
        {"shape": "oval", "margin": "circumscribed", "birads": "3"}
    )
    assert ("spatial_prompts" in a.conditions, a.pixel_mm) == (False, (0.08, 0.08))
    assert (b.conditions, b.pixel_mm) == ({}, None)


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(";", "utf-8"), ("\t", "utf-16"), (",", "utf-16"), (";", "utf-8-sig")]
)
def test_tables_of_other_programs_are_read(tmp_path, delimiter, encoding):
    path = tmp_path / "p.csv"
    path.write_text(
        delimiter.join(["", "file", "pixel_mm"]) + "\n" + delimiter.join(["0", "a.png", "0.08"]) + "\n", encoding
    )
    assert read_table(path, FILES)[FILES[0]].pixel_mm == (0.08, 0.08)


def test_a_key_is_a_path_without_its_suffix(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("key,attribute_prompt,shape\na,BI-RADS 4,oval\n")
    assert read_table(path, FILES)[FILES[0]].conditions == {"attribute_prompts": "BI-RADS 4"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns none"),
        ("name,shape\na.png,oval\n", "needed are one of file or key"),
        ("file,size\na.png,3\n", "some of spatial_prompt, attribute_prompt, shape"),
        ("file,shape\n", "no rows"),
        ("file,shape\na.png\n", "as many cells"),
        ("file,shape\nc.png,oval\n", "line 2: file 'c.png' is not in the input"),
        ("file,shape\na.png,oval\na.png,round\n", "line 3: file 'a.png' a second time"),
        ("key,shape\nsub/b,oval\n", "is one of sub/b.png, sub/b.jpg: use a column `file`"),
        ("file,pixel_mm\na.png,wide\n", "line 2: pixel_mm 'wide'"),
        ("file,pixel_mm\na.png,-1\n", "millimetres from 0.0001 to 100"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_table(path, FILES)


def test_the_mirrored_sentence_is_the_sentence_of_the_mirrored_mask():
    mask, bins = np.zeros((20, 30), bool), SizeBins(low=0.1, high=0.3)
    mask[3:7, 2:9] = True
    mirrored = SpatialPrompt().mirrored
    assert mirrored(spatial_prompt(mask, bins)) == spatial_prompt(mask[:, ::-1], bins) != spatial_prompt(mask, bins)
    assert mirrored("") == ""
