"""Licences of data against those of models, after the terms that Creative Commons and the publishers state."""

import pytest

from bushpc.shards.licences import DataLicence, conflicts, fitting, of_name, requirements


def data(licence: str) -> DataLicence:
    return DataLicence("scans", "Scans", licence, "", "trained on")


@pytest.mark.parametrize(
    ("text", "required"),
    [
        ("CC BY 4.0", set()),
        ("Creative Commons Attribution 4.0 International", set()),
        ("CC0", set()),
        ("Apache-2.0, like the generator", set()),
        ("CC-BY-NC-SA 4.0", {"non-commercial", "share-alike"}),
        ("Creative Commons Attribution-NonCommercial-NoDerivatives 4.0", {"non-commercial", "no-derivatives"}),
        ("research only, under the publisher's release agreement", {"non-commercial", "unclear"}),
        ("none stated by the publisher", {"unclear"}),
        ("", {"unclear"}),
    ],
)
def test_a_licence_requires_what_its_text_says(text, required):
    assert requirements(text) == required


@pytest.mark.parametrize(
    ("model", "of_data", "contradicts"),
    [
        ("mit", "CC BY 4.0", False),
        ("mit", "CC BY-NC 4.0", True),
        ("cc-by-nc-4.0", "CC BY-NC 4.0", False),
        ("cc-by-nc-4.0", "CC BY 4.0", False),
        ("cc-by-4.0", "CC BY-SA 4.0", True),
        ("cc-by-sa-4.0", "CC BY-SA 4.0", False),
        ("cc-by-nc-sa-4.0", "CC BY-SA 4.0", True),
        ("cc-by-nc-nd-4.0", "CC BY-NC-ND 4.0", True),
        (None, "CC BY-NC 4.0", False),
    ],
)
def test_a_models_licence_keeps_what_the_datas_requires(model, of_data, contradicts):
    assert bool(conflicts(model, [data(of_data)])) == contradicts


def test_the_licences_that_fit_all_data_are_named_or_that_there_is_none():
    assert fitting([data("CC BY 4.0"), data("CC BY-NC 4.0")]) == ["cc-by-nc-4.0"]
    assert fitting([data("CC BY-SA 4.0"), data("CC BY-NC 4.0")]) == []


def test_a_union_has_the_licences_of_its_parts_and_a_dataset_unknown_here_says_so():
    assert [each.data for each in of_name("precise", None, "trained on")] == ["busi", "breast", "bus_bra"]
    (unknown,) = of_name("our_hospital", None, "trained on")
    assert requirements(unknown.licence) == {"unclear"}
