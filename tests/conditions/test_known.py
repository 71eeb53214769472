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


@pytest.mark.parametrize(
    ("column", "cell", "sentence"),
    [
        ("shape", " Oval ", "oval shape"),
        ("birads", "BI-RADS 4A", "BI-RADS 4a"),
        ("birads", "4.0", "BI-RADS 4"),
        ("birads", "not applicable", None),
        ("margin", "Circumscribed", "circumscribed margin"),
        ("margin", "not circumscribed - angular&indistinct", "not circumscribed angular and indistinct margin"),
        ("margin", "spiculated", "not circumscribed spiculated margin"),
        ("margin", "not circumscribed", "not circumscribed margin"),
    ],
)
def test_descriptors_are_worded_as_in_training_however_they_are_written(tmp_path, column, cell, sentence):
    path = tmp_path / "p.csv"
    path.write_text(f"file,{column},pixel_mm\na.png,{cell},0.1\n")
    assert read_table(path, FILES)[FILES[0]].conditions.get("attribute_prompts") == sentence


def test_a_sentence_of_77_tokens_is_read_whole(tmp_path):
    """Each "large" is one token of CLIP's, and one each begins and ends the sentence."""
    path, sentence = tmp_path / "p.csv", " ".join(["large"] * 75)
    path.write_text(f"file,spatial_prompt\na.png,{sentence}\n")
    assert read_table(path, FILES)[FILES[0]].conditions == {"spatial_prompts": sentence}


def test_a_file_name_in_another_unicode_form_is_the_same_file(tmp_path):
    composed, decomposed = PurePosixPath("Mu\u0308ller.png"), "M\u00fcller.png"
    path = tmp_path / "p.csv"
    for there, said in ((composed, decomposed), (PurePosixPath(decomposed), str(composed))):
        path.write_text(f"file,shape\n{said},oval\n")
        assert list(read_table(path, [there])) == [there]
    path.write_text(f"file,shape\n{decomposed},oval\n{composed},round\n")
    assert len(read_table(path, [composed, PurePosixPath(decomposed)])) == 2, "both forms are there, as two files"


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
        ("file,pixel_mm\na.png,wide\n", "line 2: file 'a.png': pixel_mm 'wide'"),
        ("file,pixel_mm\na.png,-1\n", "millimetres from 0.0001 to 100"),
        (
            "file,shape\na.png,banana\n",
            "line 2: file 'a.png': unknown word of shape 'banana'. Valid: irregular, oval, ro",
        ),
        ("file,birads\na.png,17\n", "unknown word of birads '17'.* Valid: 0, 1, 2, 3, 4, 4a, 4b, 4c, 5, 6"),
        ("file,margin\na.png,fuzzy\n", "unknown word of margin 'fuzzy'.*spiculated"),
        ("file,margin\na.png,circumscribed and angular\n", "has no kinds"),
        (
            f"file,attribute_prompt\na.png,{'irregular ' * 80}\n",
            "'a.png': attribute_prompt has 82 tokens, and .* reads 77",
        ),
        (f"file,spatial_prompt\na.png,{'large ' * 76}\n", "spatial_prompt has 78 tokens"),
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
