"""Promises of `bushpc quality`: copies are found, masks that do not fit are, figures are called what they are, and what
cannot be compared is refused before anything is looked at.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import typing as t
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageEnhance

import bushpc
from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.config import compose
from bushpc.dispatch.plan import cv_plan
from bushpc.dispatch.run_folder import write_run
from bushpc.dist import World
from bushpc.errors import WeightsError
from bushpc.generate import features
from bushpc.generate.quality import measure
from bushpc.metrics.image import frechet_distance
from bushpc.shards.manifest import Manifest, Record, ShardInfo, read_image, read_mask
from bushpc.shards.split import load_folds

SHARD = "lesion-000000.tar"


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """MS-SSIM takes most of the time, and no test here needs many pairs of it."""
    monkeypatch.setattr(measure, "MOST_SSIM", 3)


class Scan(t.NamedTuple):
    key: str
    image: np.ndarray
    mask: np.ndarray
    label: str


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()


def pack(folder: Path, scans: list[Scan], *, synthetic: bool = True) -> Path:
    """Scans as they are, each its own patient."""
    records, content = [], b""
    for key, image, mask, label in scans:
        files = png(image), png(mask)
        offset, (height, width) = len(content), mask.shape
        records.append(
            Record(
                **{"key": key, "patient": key, "label": label, "attributes": {"generator": "beef"}, "pixel_mm": None},
                **{"height": height, "width": width, "lesion_pixels": int(mask.sum()), "lesion_length": 1},
                **{"shard": SHARD, "image_offset": offset, "image_bytes": len(files[0])},
                **{"mask_offset": offset + len(files[0]), "mask_bytes": len(files[1])},
            )
        )
        content += b"".join(files)
    folder.mkdir()
    (folder / SHARD).write_bytes(content)
    shard = ShardInfo(file=SHARD, sha256="", bytes=len(content), samples=len(records))
    Manifest(
        dataset="made", packer_version=1, excerpt=False, synthetic=synthetic, shards=[shard], records=records
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def synthetic_folder(synthetic_folder, tmp_path_factory):
    """Without a word of what its generator was trained on."""
    folder = tmp_path_factory.mktemp("nobody_knows") / "synthetic"
    shutil.copytree(synthetic_folder, folder)
    (folder / "generate.json").unlink()
    return folder


@pytest.fixture(scope="module")
def real(phantom_folder):
    """part → its scans, of fold 0 of the phantom."""
    manifest = Manifest.load(phantom_folder)
    folds = load_folds(phantom_folder / "folds.csv", manifest.records)

    def scans(keys):
        records = [manifest.record(key) for key in keys]
        return [Scan(r.key, read_image(phantom_folder, r), read_mask(phantom_folder, r), r.label) for r in records]

    return {"training": scans(folds.train(0)), "held out": scans(folds.validation(0))}


@pytest.fixture(scope="module")
def segmenter(phantom_folder, tmp_path_factory):
    """A U-Net's run, fold 0 trained as far as that it finds something."""
    folder = tmp_path_factory.mktemp("segmenter")
    config = compose(
        [
            *("model=unet_small", "data=phantom", "cluster=local", "model.image_size=64", "name=unet"),
            *("train.iterations=24", "train.batch_size=8", "train.lr=3e-3", "train.warmup=0", "evaluate.explain=0"),
            *(f"data.root={phantom_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}"),
        ]
    )
    write_run(folder / "unet", cv_plan(config), ["bushpc", "cv"])
    assert run_cell(folder / "unet" / "cells" / "fold0", World()) is None
    return folder / "unet"


@pytest.fixture
def judge(tmp_path, phantom_folder, capsys):
    """judge(folder, word, …) → exit status, what it said, and its quality.json."""

    def run(synthetic, *words):
        out = tmp_path / "out"
        status = main(["quality", str(synthetic), f"against={phantom_folder}", f"out={out}", *words])
        said = capsys.readouterr()
        return status, said.out + said.err, json.loads((out / "quality.json").read_text()) if status < 2 else {}

    return run


def table(tmp_path, name):
    return pd.read_csv(tmp_path / "out" / f"{name}.csv")


def brighter(image):
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(1.3))


def test_training_images_that_come_back_are_found_though_mirrored_brightened_or_cropped(
    real, synthetic_folder, tmp_path, judge
):
    manifest = Manifest.load(synthetic_folder)
    others = [
        Scan(r.key, read_image(synthetic_folder, r), read_mask(synthetic_folder, r), r.label)
        for r in manifest.lesions[:12]
    ]
    one, two, three = real["training"][:3]
    planted = [
        Scan("brightened", brighter(one.image), one.mask, one.label),
        Scan("mirrored", two.image[:, ::-1], two.mask[:, ::-1], two.label),
        Scan("cropped", three.image[4:-4, 5:-5], three.mask[4:-4, 5:-5], three.label),
    ]
    status, _, found = judge(pack(tmp_path / "generated", others + planted), "fold=0", "features=none")
    assert status == 1
    assert found["copies"] == 3
    images = pd.read_csv(tmp_path / "out" / "images.csv").set_index("key")
    assert set(images.index[images["copy"]]) == {"brightened", "mirrored", "cropped"}
    assert images.loc["brightened", "nearest"] == one.key
    assert images.loc["mirrored", ["nearest", "mirrored"]].tolist() == [two.key, True]
    assert images.loc["cropped", "nearest"] == three.key
    page = (tmp_path / "out" / "index.html").read_text()
    assert "3 generated images are the same picture as a training image" in page
    assert page.count('class="tag"') == 3


def test_new_images_are_no_copies_and_no_nearer_than_real_ones_held_out(synthetic_folder, tmp_path, judge):
    status, _, found = judge(synthetic_folder, "fold=0", "features=none")
    assert status == 0
    assert found["copies"] == 0
    own, held_out = found["nearness"]
    assert (own["images"], held_out["images"]) == ("synthetic", "real, held out")
    n, m, beyond = own["number"], held_out["number"], own["beyond"]
    assert own["p"] == pytest.approx(math.comb(n, beyond) / math.comb(n + m, beyond))  # the chance of such a draw
    assert own["p"] > 0.05
    assert held_out["p"] is None
    assert "No generated image is the same picture as a training image" in (tmp_path / "out" / "index.html").read_text()


def test_images_that_are_nearer_to_the_training_images_than_new_ones_are_said_to_be(real, tmp_path, judge):
    """Blends of two training images: no copies, and yet no new images."""
    scans = real["training"]
    blends = [
        Scan(f"blend{i}", (0.6 * one.image + 0.4 * other.image).astype(np.uint8), one.mask, one.label)
        for i, (one, other) in enumerate(itertools.pairwise(scans))
    ]
    _, _, found = judge(pack(tmp_path / "generated", blends), "fold=0", "features=none")
    assert found["nearness"][0]["beyond"] == len(blends)
    assert found["nearness"][0]["p"] < 0.01


def test_the_held_out_images_themselves_are_at_no_distance_and_the_figures_are_not_called_fid(
    real, segmenter, tmp_path, judge
):
    folder = pack(tmp_path / "generated", [scan._replace(key=f"made_{scan.key}") for scan in real["held out"]])
    status, said, found = judge(folder, "fold=0", f"features={segmenter}")
    assert status == 0
    rows = {(row["label"], row["images"]): row for row in found["distances"]}
    assert rows["all", "synthetic"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["all", "synthetic"]["kernel"]["value"] < 0  # two sets that are one are likelier than two of a kind
    assert rows["all", "real, training part"]["frechet"]["value"] > 0
    assert rows["all", "real, training part"]["number"] == len(real["held out"])  # as many, or figures do not compare
    page = re.sub(r'"data:[^"]*"', "", (tmp_path / "out" / "index.html").read_text())
    for text in (page, said, json.dumps(found)):
        assert "UNet" in text
        assert "FID" not in text
        assert "KID" not in text


def test_distances_are_those_of_the_networks_features(real, segmenter, tmp_path, judge, phantom_folder):
    """The same by hand: features of squares, then the distance, at the held-out part's own numbers."""
    seen = features.of_model(segmenter, 0, "cpu", print).see
    made = [scan._replace(key=f"made_{scan.key}", image=brighter(scan.image)) for scan in real["held out"]]
    edge = max(made[0].mask.shape)

    def square(image):
        return measure.resize(image, np.zeros(image.shape[:2], np.uint8), edge)[0]

    expected = frechet_distance(
        *(seen([square(scan.image) for scan in scans]).astype(float) for scans in (made, real["held out"]))
    )
    _, _, found = judge(pack(tmp_path / "generated", made), "fold=0", f"features={segmenter}")
    assert found["distances"][0]["frechet"]["value"] == pytest.approx(expected, rel=1e-4)
    assert table(tmp_path, "distances").loc[0, "frechet"] == found["distances"][0]["frechet"]["value"]


def test_a_mask_is_said_to_fit_where_the_segmenter_finds_it_and_not_elsewhere(real, segmenter, tmp_path, judge):
    predictor = bushpc.load(segmenter, fold=0, say=lambda line: None)
    found = [(scan, predictor(scan.image).mask_HW) for scan in real["training"]]
    found = [(scan, mask) for scan, mask in found if 0 < mask.mean() < 1]
    assert len(found) > 4, "the U-Net learnt nothing"
    fits = [Scan(f"fits_{scan.key}", scan.image, mask, "benign") for scan, mask in found]
    not_there = [Scan(f"not_{scan.key}", scan.image, 1 - mask, "malignant") for scan, mask in found]
    words = ("fold=0", "features=none", f"segmenter={segmenter}")
    _, _, result = judge(pack(tmp_path / "generated", fits + not_there), *words)
    rows = {(row["label"], row["images"]): row for row in result["agreement"]}
    assert rows["benign", "synthetic"]["dice"]["mean"] == pytest.approx(1)
    assert rows["malignant", "synthetic"]["dice"]["mean"] == 0
    assert rows["malignant", "synthetic"]["missed"] == 1
    assert rows["all", "synthetic"]["dice"]["mean"] == pytest.approx(0.5)
    pairs = [(scan.mask, predictor(scan.image).mask_HW) for scan in real["held out"]]
    truth = [2 * (mask & found).sum() / (mask.sum() + found.sum()) for mask, found in pairs]
    assert rows["all", "real, held out"]["dice"]["mean"] == pytest.approx(np.mean(truth), abs=1e-6)


def test_one_picture_over_and_over_is_no_variety(real, tmp_path, judge):
    scan = real["held out"][0]
    same = [scan._replace(key=f"same{i}") for i in range(5)]
    _, _, found = judge(pack(tmp_path / "generated", same), "part=all", "features=none")
    own, held_out = (row for row in found["diversity"] if row["label"] == "all")
    assert own["ms_ssim"]["value"] == pytest.approx(1)
    assert own["repeated"] == 5
    assert held_out["ms_ssim"]["value"] < 0.8
    assert held_out["repeated"] == 0


def test_with_a_dataset_that_the_generator_never_saw_the_page_says_that_copies_were_not_looked_for(
    synthetic_folder, tmp_path, judge
):
    status, _, found = judge(synthetic_folder, "part=all", "features=none")
    assert status == 0
    assert found["nearness"] == []
    assert "was not looked for" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["features=none"], "does not record in which fold"),
        (["fold=0", "part=all", "features=none"], "part=all uses no fold"),
        (["fold=9", "features=none"], "fold=9 does not exist"),
        (["fold=0", "part=training", "features=none"], "unknown part 'training'"),
        (["fold=0", "feature=none"], "unknown word 'feature'; did you mean 'features'?"),
        (["fold=0", "features=nowhere"], "nowhere is neither a run folder"),
        (["fold=0", "features=none", "device=tpu"], "unknown device 'tpu'"),
    ],
)
def test_what_cannot_be_compared_is_refused(synthetic_folder, tmp_path, judge, segmenter, words, said):
    if words[-1].startswith("device"):
        words = [*words, f"segmenter={segmenter}"]
    status, output, _ = judge(synthetic_folder, *words)
    assert status == 2
    assert said in output
    assert not (tmp_path / "out").exists()


def test_the_fold_is_the_one_that_the_generator_was_trained_in(synthetic_folder, phantom_folder, tmp_path, judge, real):
    def trained(**changed):
        """As `bushpc generate` notes it."""
        folds = features.sha256_of(phantom_folder / "folds.csv")
        noted = {"manifest_sha256": Manifest.load(phantom_folder).hash, "folds_sha256": folds, "fold": 0, **changed}
        (folder / "generate.json").write_text(json.dumps({"trained_on": [noted]}))

    folder = pack(tmp_path / "generated", [scan._replace(key=f"made_{scan.key}") for scan in real["held out"]])
    trained()
    status, _, found = judge(folder, "features=none")
    assert status == 0
    assert found["asked"]["fold"] == 0
    for words, changed in ((["fold=1"], {}), ([], {"folds_sha256": "of others"}), (["part=all"], {})):
        trained(**changed)
        status, said, _ = judge(folder, "features=none", *words)
        assert status == 2
        assert "the generator was trained on images of" in said
    trained(manifest_sha256="of other data")
    assert judge(folder, "features=none", "part=all")[0] == 0
    status, said, _ = judge(folder, "features=none", "fold=0")
    assert status == 2
    assert "was not trained on this dataset" in said


def test_the_page_names_what_else_the_generator_has_learnt_from(phantom_folder, tmp_path, judge, real):
    folder = pack(tmp_path / "generated", [scan._replace(key=f"made_{scan.key}") for scan in real["held out"]])
    folds = features.sha256_of(phantom_folder / "folds.csv")
    own = {"data": None, "manifest_sha256": Manifest.load(phantom_folder).hash, "folds_sha256": folds, "fold": 0}
    base = {"data": "busi", "manifest_sha256": "b" * 64, "folds_sha256": "f" * 64, "fold": 0}
    (folder / "generate.json").write_text(json.dumps({"trained_on": [own, base]}))
    status, _, found = judge(folder, "features=none")
    assert (status, found["elsewhere"]) == (0, ["busi"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Its generator has learnt from busi as well: whether images of these come back was not looked for." in page


def test_real_scans_are_not_taken_for_generated_ones_nor_the_other_way_round(phantom_folder, synthetic_folder, capsys):
    assert main(["quality", str(phantom_folder), f"against={phantom_folder}", "fold=0"]) == 2
    assert "holds real scans of phantom" in capsys.readouterr().err
    assert main(["quality", str(synthetic_folder), f"against={synthetic_folder}", "fold=0"]) == 2
    assert "holds synthetic images" in capsys.readouterr().err


def test_a_segmenter_that_was_trained_on_the_held_out_images_is_refused(synthetic_folder, judge, segmenter):
    status, output, _ = judge(synthetic_folder, "part=all", "features=none", f"segmenter={segmenter}")
    assert status == 2
    assert "was trained on" in output


def test_a_segmenter_that_was_trained_on_the_generated_images_is_refused(synthetic_folder, judge, segmenter, tmp_path):
    taught = tmp_path / "taught"
    taught.mkdir()
    run = json.loads((segmenter / "run.json").read_text())
    scans = {"data": None, "manifest_sha256": Manifest.load(synthetic_folder).hash, "folds_sha256": None, "fold": None}
    for cell in run["cells"]:
        cell["trained_on"].append(scans)
    (taught / "run.json").write_text(json.dumps(run))
    status, output, _ = judge(synthetic_folder, "fold=0", "features=none", f"segmenter={taught}")
    assert status == 2
    assert "was trained on these synthetic images" in output


def test_without_inceptions_file_the_error_says_how_to_get_it_and_what_else_can_be_done(
    synthetic_folder, tmp_path, judge
):
    status, output, _ = judge(synthetic_folder, "fold=0", f"weights_dir={tmp_path}")
    assert status == 2
    assert f"bushpc weights pull features=inception weights_dir={tmp_path}" in output
    assert "features=none" in output
    assert not (tmp_path / "out").exists()
    (tmp_path / features.INCEPTION_FILE).write_bytes(b"something else")
    with pytest.raises(WeightsError, match="has sha256"):
        features.inception(tmp_path, "cpu")


def test_inceptions_file_is_pulled_only_if_it_is_the_one_that_is_meant(tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere.pth"
    elsewhere.write_bytes(b"no weights")
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", elsewhere.as_uri())
    words = ["weights", "pull", "features=inception", f"weights_dir={tmp_path / 'weights'}"]
    assert main(words) == 2
    assert "could not pull" in capsys.readouterr().err
    assert not list((tmp_path / "weights").iterdir())
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256_of(elsewhere))
    assert main(words) == 0
    assert (tmp_path / "weights" / features.INCEPTION_FILE).read_bytes() == b"no weights"
    assert main(["weights", "check", "features=inception", f"weights_dir={tmp_path}"]) == 2


def test_inceptions_features_are_those_that_torchmetrics_takes(tmp_path, monkeypatch, real):
    """With weights that were drawn, since the true ones cannot be had here."""
    from torch_fidelity import feature_extractor_inceptionv3
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = tmp_path / features.INCEPTION_FILE
    torch.manual_seed(0)
    with monkeypatch.context() as without:
        without.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        without.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        drawn = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(drawn.state_dict(), file)
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256_of(file))
    fid = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(file))
    images = [scan.image for scan in real["held out"][:2]]
    with torch.no_grad():
        expected = fid.inception(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    inception = features.inception(tmp_path, "cpu")
    np.testing.assert_allclose(inception.see(images), expected, rtol=1e-5, atol=1e-6)
    assert (inception.frechet, inception.kernel) == ("FID", "KID")
