"""Promises of importing COCO JSON: masks as pycocotools draws them, all problems named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bushpc.shards.manifest import read_mask

from .cohorts import LABELS, PATIENTS, SIZE, image_of, mask_of, save

coco_mask = pytest.importorskip("pycocotools.mask")


def run_lengths(mask, compressed=True):
    encoded = coco_mask.encode(np.asfortranarray(mask))
    if compressed:
        return {"size": list(SIZE), "counts": encoded["counts"].decode()}
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(SIZE), "counts": counts if not flat[0] else [0, *counts]}


def coco(folder, **changes):
    """Benign and malignant as categories; odd images with compressed, even ones with plain run lengths."""
    numbers = {name: number for number, name in enumerate(LABELS, 1)}
    content = {
        "images": [
            {"id": number, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1], "patient": PATIENTS[name]}
            for name, number in numbers.items()
        ],
        "categories": [{"id": 3, "name": "benign"}, {"id": 7, "name": "malignant"}],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": {"B": 3, "M": 7}[LABELS[name]],
                "segmentation": run_lengths(mask_of(name), compressed=bool(number % 2)),
            }
            for name, number in numbers.items()
            if LABELS[name] != "N"
        ],
    }
    for name in LABELS:
        save(folder / "images" / f"{name}.png", image_of(name))
    return content | changes


def write_coco(folder, content):
    (folder / "annotations.json").write_text(json.dumps(content))


def test_run_lengths_labels_and_patients_are_read(importing):
    write_coco(importing.src, coco(importing.src))
    assert "categories are taken as labels" in importing()
    importing.check_all()


def test_polygons_are_filled_as_pycocotools_does(importing):
    content = coco(importing.src)
    polygon = [3.5, 2.0, 20.25, 4.0, 12.0, 15.5]
    content["annotations"][0]["segmentation"] = [polygon, [22, 10, 28, 10, 28, 18]]
    write_coco(importing.src, content)
    importing()
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(content["annotations"][0]["segmentation"], *SIZE)))
    assert np.array_equal(read_mask(importing.out, importing.manifest.record("s1")), drawn)


def test_instances_of_one_class_are_united_and_their_overlap_is_said(importing):
    content = coco(importing.src)
    again = {**content["annotations"][0], "id": 99, "segmentation": run_lengths(np.roll(mask_of("s1"), 2, axis=1))}
    content["annotations"].append(again)
    write_coco(importing.src, content)
    shared = int((mask_of("s1") & np.roll(mask_of("s1"), 2, axis=1)).sum())
    assert f"s1.png ({shared} pixels)" in importing()
    expected = mask_of("s1") | np.roll(mask_of("s1"), 2, axis=1)
    assert np.array_equal(read_mask(importing.out, importing.manifest.record("s1")), expected)


def test_categories_that_are_no_labels_are_mask_classes(importing):
    content = coco(importing.src, categories=[{"id": 3, "name": "lesion"}, {"id": 7, "name": "shadow"}])
    content["annotations"][0]["category_id"] = 3
    content["annotations"].append({**content["annotations"][0], "id": 50, "category_id": 7})
    write_coco(importing.src, content)
    importing()
    assert importing.manifest.mask_classes == ["lesion", "shadow"]
    assert np.array_equal(read_mask(importing.out, importing.manifest.record("s1")), mask_of("s1") * 3)


def test_runs_of_every_kind_come_back_equal():
    from bushpc.shards.exchange.coco import decode

    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (64, 33), (300, 200)):
        for share in (0, 0.02, 0.5, 1):
            mask = (rng.random(size) < share).astype(np.uint8)
            counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
            assert np.array_equal(decode({"size": list(size), "counts": counts}, *size), mask)


def change(part, number, **keys):
    def changed(content):
        content[part][number] = {**content[part][number], **keys}

    return changed


BAD = {
    "runs that are too short": (
        change("annotations", 0, segmentation={"size": list(SIZE), "counts": [5, 5]}),
        "its run lengths cover 10 pixels, the image has 620",
    ),
    "runs of another size": (
        change("annotations", 0, segmentation={"size": [9, 9], "counts": [81]}),
        "its run lengths are for 9x9 pixels",
    ),
    "a polygon of two corners": (change("annotations", 0, segmentation=[[1, 2, 3, 4]]), "three corners"),
    "a box without mask": (change("annotations", 0, segmentation=[]), "1 annotations have no segmentation: 1"),
    "nonsense": (change("annotations", 0, segmentation={"size": 3}), "neither polygons nor run lengths"),
    "an unknown image": (change("annotations", 0, image_id=77), "annotations[0] is of image 77"),
    "an unknown category": (change("annotations", 0, category_id=77), "annotations[0] is of category 77"),
    "another size": (change("images", 5, height=9), "images/s6.png has 31x20 pixels"),
    "a missing image": (change("images", 0, file_name="zz.png"), "lists zz.png, which does not exist"),
    "an image twice": (change("images", 0, file_name="s2.png"), "lists s2.png twice, as images 1 and 2"),
    "an id twice": (change("images", 0, id=2), "two images have the id 2"),
    "no name": (change("images", 0, file_name=None), "images[0] has no valid file_name"),
    "two labels": (
        lambda content: content["annotations"].append({**content["annotations"][0], "id": 60, "category_id": 7}),
        "s1.png has annotations of benign and malignant",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_whole(importing, what):
    spoil, expected = BAD[what]
    content = coco(importing.src)
    spoil(content)
    write_coco(importing.src, content)
    assert expected in importing.refused()


def test_two_files_need_a_choice(importing):
    content = coco(importing.src)
    write_coco(importing.src, content)
    (importing.src / "old.json").write_text(json.dumps(content))
    assert "several COCO files (annotations.json, old.json)" in importing.refused()
    importing("annotations=old.json")
    importing.check_all()
