"""Promises of using a trained model: what evaluation saw is what it sees, and no image is lost, mixed up or redone."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

import bushpc
from bushpc.cli import main
from bushpc.conditions import Known
from bushpc.config import ModelConfig
from bushpc.errors import BushpcWarning, ConfigError, DataError, ResumeError
from bushpc.evaluate.predict_output import Writer, overlay
from bushpc.evaluate.predictor import Member, Predictor, load
from bushpc.models.base import Model
from bushpc.sample import Prediction
from bushpc.shards.manifest import Manifest, read_image

SPATIAL = "a large lesion in the upper inner quadrant of the breast"


@pytest.fixture(scope="session")
def one(trained) -> Predictor:
    return bushpc.load(trained.run, fold=0)


@pytest.fixture(scope="session")
def both(trained) -> Predictor:
    with pytest.warns(BushpcWarning, match=r"2 of 5 folds: fold2, fold3, fold4 not done"):
        return bushpc.load(trained.run)


@pytest.fixture(scope="session")
def images(trained) -> dict[str, np.ndarray]:
    """Key → image_HWC of four packed scans that fold 0 validates on."""
    manifest = Manifest.load(trained.shards)
    keys = [row["key"] for row in rows_of(trained.run / "cells" / "fold0" / "per_image.csv")]
    return {key: read_image(trained.shards, manifest.record(key)) for key in sorted(set(keys))[:4]}


@pytest.fixture
def folder(tmp_path, images) -> Path:
    """in/a.png, in/a.jpg, in/sub/b.png and in/clip.tif with two pages."""
    a, b, c, d = images.values()
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, pixels in {"a.png": a, "a.jpg": b, "sub/b.png": c}.items():
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    Image.fromarray(d).save(tmp_path / "in" / "clip.tif", save_all=True, append_images=[Image.fromarray(a)])
    return tmp_path / "in"


@pytest.fixture
def run(one, monkeypatch, trained, capsys):
    """run("INPUT", "OUT", …) → (exit status, what was said) of `bushpc predict` with fold 0, loaded once."""
    monkeypatch.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: one)

    def call(*words: str | Path) -> tuple[int, str]:
        status = main(["predict", str(trained.run), *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# --- the network sees what it saw -------------------------------------------------------------------------------


def test_a_packed_image_is_predicted_as_its_cell_predicted_it(trained, one, images):
    cell_dir = trained.run / "cells" / "fold0"
    rows = {row["key"]: row for row in rows_of(cell_dir / "per_image.csv") if row["prompts"] == "first_pass"}
    assert any(row["spatial_prompt"] for row in rows.values())
    for key, image_HWC in images.items():
        result = one(image_HWC, attribute_prompt=rows[key]["attribute_prompt"])
        saved = torch.from_numpy(pixels_of(cell_dir / "predictions" / "first_pass" / f"{key}.png").copy())[None, None]
        # Resizing is linear, so what 8 bits rounded stays within half a grey value of it.
        expected = torch.nn.functional.interpolate(
            saved.float() / 255, image_HWC.shape[:2], mode="bilinear", antialias=True
        )
        assert np.abs(result.prob_HW - expected[0, 0].numpy()).max() <= 0.5 / 255 + 1e-5
        assert result.conditions["spatial_prompt"] == [rows[key]["spatial_prompt"]]
        assert (result.mask_HW == (result.prob_HW >= 0.5)).all()


def test_path_picture_and_array_are_the_same_image(one, images, tmp_path):
    pixels = next(iter(images.values()))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    results = [one(tmp_path / "a.png"), one(str(tmp_path / "a.png")), one(Image.fromarray(pixels)), one(pixels)]
    assert all((result.prob_HW == results[0].prob_HW).all() for result in results)
    grey = pixels[..., 0]
    assert (one(grey).prob_HW == one(np.stack([grey] * 3, axis=2)).prob_HW).all()


def test_the_ensemble_is_the_mean_of_its_folds(both, one, images):
    image = next(iter(images.values()))
    other = Predictor(both.members[1:], both.recipe, device="cpu")
    mean = (one(image).prob_HW + other(image).prob_HW) / 2
    assert np.abs(both(image).prob_HW - mean).max() < 1e-6
    assert np.abs(one(image).prob_HW - other(image).prob_HW).max() > 1e-3, "the case is degenerate"


def test_with_tta_a_mirrored_image_has_the_mirrored_mask(one, images):
    twice = Predictor(one.members, one.recipe, device="cpu", tta=True)
    image = next(iter(images.values()))
    there = twice(image, spatial_prompt=SPATIAL)
    back = twice(image[:, ::-1].copy(), spatial_prompt=SPATIAL.replace("inner", "outer"))
    assert np.abs(there.prob_HW - back.prob_HW[:, ::-1]).max() < 1e-5
    assert there.conditions["spatial_prompt"] == [SPATIAL]
    assert np.abs(there.prob_HW - one(image, spatial_prompt=SPATIAL).prob_HW).max() > 1e-4, "the case is degenerate"


def test_a_given_sentence_is_used_and_the_others_of_the_batch_keep_their_first_pass(one, images):
    some = list(images.values())[:2]
    alone = [one(image) for image in some]
    given, other = one.predict(some, [Known(conditions={"spatial_prompts": SPATIAL}), Known()])
    assert given.conditions["spatial_prompt"] == [SPATIAL] != alone[0].conditions["spatial_prompt"]
    assert np.abs(given.prob_HW - alone[0].prob_HW).max() > 0
    assert other.conditions["spatial_prompt"] == alone[1].conditions["spatial_prompt"]
    assert np.abs(other.prob_HW - alone[1].prob_HW).max() < 1e-5


# --- which model ------------------------------------------------------------------------------------------------


def test_a_fold_that_is_not_done_is_refused_when_it_is_asked_for(trained, tmp_path):
    with pytest.raises(ResumeError, match=r"fold3 of .* is not done"):
        load(trained.run, fold=3)
    with pytest.raises(ConfigError, match=r"fold 9 does not exist in .*; valid: 0, 1, 2, 3, 4"):
        load(trained.run, fold=9)
    with pytest.raises(DataError, match="neither a run folder"):
        load(tmp_path)


def test_a_grid_is_used_by_its_row_also_where_another_run_trained_the_cell(trained, one, tmp_path, images):
    grid = tmp_path / "grid"
    (grid / "cells").mkdir(parents=True)
    content = json.loads((trained.run / "run.json").read_text())
    content["grid"] = {"rows": [{"name": "full", "settings": {}}, {"name": "bare", "settings": {}}]}
    content["cells"] = [
        {"name": f"{row}-fold0", "fold": 0, "row": row, "hash": content["cells"][0]["hash"]} for row in ("full", "bare")
    ]
    (grid / "run.json").write_text(json.dumps(content))
    (grid / "cells" / "full-fold0").symlink_to(trained.run / "cells" / "fold0")
    with pytest.raises(ConfigError, match="Choose one, `--row NAME`: full, bare"):
        load(grid)
    with pytest.raises(ConfigError, match="did you mean 'full'"):
        load(grid, row="ful")
    with pytest.raises(ResumeError, match="bare-fold0"):
        load(grid, row="bare")
    image = next(iter(images.values()))
    assert (load(grid, row="full")(image).prob_HW == one(image).prob_HW).all()
    with pytest.raises(ConfigError, match="is no grid"):
        load(trained.run, row="full")


def test_importing_bushpc_loads_nothing():
    code = "import bushpc, sys; assert not {'torch', 'numpy', 'bushpc.config'} & set(sys.modules); bushpc.nothing"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'bushpc' has no attribute 'nothing'" in ended.stderr


# --- a folder of images -----------------------------------------------------------------------------------------


def test_masks_come_out_at_original_size_under_the_names_of_the_images(run, folder, tmp_path, one):
    status, said = run(folder, tmp_path / "out", "--prob", "--overlay", "--pixel-mm", "0.5")
    assert status == 0, said
    assert "predicted: 5, " in said
    masks = tmp_path / "out" / "masks"
    pictures = {"a.png": ("a.png", 0), "a.jpg.png": ("a.jpg", 0), "sub/b.png": ("sub/b.png", 0)}
    pictures |= {"clip.tif/0.png": ("clip.tif", 0), "clip.tif/1.png": ("clip.tif", 1)}
    assert sorted(str(path.relative_to(masks)) for path in masks.rglob("*.png")) == sorted(pictures)
    rows = {(row["file"], row["frame"]): row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert len(rows) == 5
    for name, (file, frame) in pictures.items():
        result, row = one(folder / file, frame=frame, pixel_mm=0.5), rows[file, str(frame)]
        assert (pixels_of(masks / name) == result.mask_HW * 255).all()
        probability = pixels_of(tmp_path / "out" / "probabilities" / name) / 255
        assert np.abs(probability - result.prob_HW).max() < 0.5 / 255 + 1e-4  # batches round otherwise
        drawn, image = pixels_of(tmp_path / "out" / "overlays" / name), np.asarray(Image.open(folder / file).size)[::-1]
        assert drawn.shape == (*image, 3) == (int(row["height"]), int(row["width"]), 3)
        assert (int(row["area_px"]), row["status"]) == (result.area_px, "ok")
        assert float(row["long_axis_mm"]) == pytest.approx(result.long_axis_px / 2, rel=1e-4)
        if result.area_px:
            assert float(row["mean_prob"]) == pytest.approx(result.prob_HW[result.mask_HW > 0].mean(), rel=1e-4)
        assert [row["spatial_prompt"]] == result.conditions["spatial_prompt"]
    assert any(int(row["area_px"]) for row in rows.values()), "the case is degenerate"


def test_uncertainty_is_the_deviation_over_folds_and_mirror_images(run, folder, tmp_path, both, monkeypatch):
    monkeypatch.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: both)
    status, said = run(folder / "a.png", tmp_path / "out", "--uncertainty")
    assert status == 0, said
    found = pixels_of(tmp_path / "out" / "uncertainty" / "a.png") / 255 / 2
    alone = [Predictor([member], both.recipe)(folder / "a.png").prob_HW for member in both.members]
    assert found.max() > 0.01, "the case is degenerate"
    # Of two numbers half their difference, but for where the difference changes its sign before it is enlarged.
    apart = np.abs(alone[0] - alone[1]) / 2
    assert np.abs(found - apart).mean() < 0.002
    both_ways = Predictor(both.members[:1], both.recipe, tta=True)
    monkeypatch.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: both_ways)
    assert run(folder / "a.png", tmp_path / "tta", "--uncertainty")[0] == 0


def test_the_uncertainty_of_one_sample_of_one_fold_is_refused_before_anything_is_written(run, folder, tmp_path):
    status, said = run(folder, tmp_path / "out", "--uncertainty")
    assert (status, "one sample of one fold. Leave --fold out" in " ".join(said.split())) == (2, True), said
    assert not (tmp_path / "out").exists()


class Sampling(Model):
    """A model that says of each pixel how red it is, and of one column that its samples differ as far as they can."""

    makes = frozenset({"prob_BKHW"})

    def predict(self, batch):
        red_B1HW = batch.image_BCHW[:, :1].float()
        deviation_B1HW = torch.zeros_like(red_B1HW)
        deviation_B1HW[..., 3] = 0.5
        return Prediction(prob_BKHW=red_B1HW, uncertainty_BKHW=deviation_B1HW)


def test_one_fold_of_a_model_that_samples_has_an_uncertainty_of_its_own(run, tmp_path, one, monkeypatch):
    model = Sampling(ModelConfig(image_size=8, pretrained=False))
    member = Member(name="fold0", model=model, conditions=(), sha256="0" * 64)
    monkeypatch.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: Predictor([member], one.recipe))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", tmp_path / "out", "--uncertainty")[0] == 0
    found = pixels_of(tmp_path / "out" / "uncertainty" / "a.png")
    assert found[:, 3].tolist() == [255] * 8
    assert found.sum() == 8 * 255


def test_an_overlay_changes_the_contour_alone():
    image = np.full((40, 50, 3), 90, np.uint8)
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 15:35] = 1
    drawn = (overlay(image, mask) != image).any(axis=2)
    assert drawn[mask == 0].sum() == 0
    assert drawn.sum() == 2 * 20 + 2 * 8


def test_a_bad_image_is_listed_skipped_and_tried_again(run, folder, tmp_path, images):
    (folder / "bad.png").write_text("no picture")
    status, said = run(folder, tmp_path / "out")
    assert status == 3
    assert "bad.png rejected: not a PNG image" in said
    rows = {row["file"]: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert (rows["bad.png"]["status"], len(rows)) == ("rejected", 5)
    Image.fromarray(next(iter(images.values()))).save(folder / "bad.png")
    status, said = run(folder, tmp_path / "out")
    assert (status, "predicted: 1, done before: 4" in said) == (0, True)
    assert {row["status"] for row in rows_of(tmp_path / "out" / "predictions.csv")} == {"ok"}


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(run, folder, tmp_path, monkeypatch, one):
    assert run(folder, tmp_path / "whole", "--batch", "1")[0] == 0
    write, calls = Writer.write, []

    def dies_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("as when the machine is full")
        write(*args)

    monkeypatch.setattr(Writer, "write", dies_at_the_third)
    with pytest.raises(MemoryError):
        run(folder, tmp_path / "out", "--batch", "1")
    monkeypatch.setattr(Writer, "write", write)
    with (tmp_path / "out" / "predictions.csv").open("a") as file:
        file.write('sub/b.png,0,1,ok,"torn in the mid')
    status, said = run(folder, tmp_path / "out", "--batch", "1")
    assert (status, "predicted: 3, " in said) == (0, True)
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path


def test_an_image_that_changed_or_whose_mask_is_gone_is_done_again_and_no_other(run, folder, tmp_path):
    run(folder, tmp_path / "out")
    shutil.copy(folder / "sub" / "b.png", folder / "a.png")
    (tmp_path / "out" / "masks" / "clip.tif" / "1.png").unlink()
    assert "predicted: 2, done before: 2" in run(folder, tmp_path / "out")[1]
    same = [(tmp_path / "out" / "masks" / name).read_bytes() for name in ("a.png", "sub/b.png")]
    assert same[0] == same[1]


def test_outputs_inside_the_input_are_no_inputs(run, folder):
    assert run(folder, folder / "out", "--overlay")[0] == 0
    assert "predicted: 0, done before: 4" in run(folder, folder / "out", "--overlay")[1]
    assert "predicted: 5, " in run(folder, folder / "other")[1]
    status, said = run(folder, folder)
    assert (status, "choose another folder" in said) == (2, True)


def test_other_settings_in_the_same_folder_are_refused_with_what_differs(run, folder, tmp_path, both, monkeypatch):
    run(folder / "a.png", tmp_path / "out")
    status, said = run(folder / "a.png", tmp_path / "out", "--overlay", "--pixel-mm", "0.1")
    assert status == 2
    assert "overlay was False, now True; pixel_mm was None, now 0.1" in said
    monkeypatch.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: both)
    status, said = run(folder / "a.png", tmp_path / "out")
    assert (status, "model was {'fold0'" in said) == (2, True)


def test_prompts_of_a_table_are_used_and_recorded(run, folder, tmp_path):
    (tmp_path / "p.csv").write_text(f"file,spatial_prompt,shape,birads,pixel_mm\na.jpg,{SPATIAL},oval,4a,0.25\n")
    status, said = run(folder, tmp_path / "out", "--prompts", tmp_path / "p.csv", "--pixel-mm", "0.5")
    assert status == 0, said
    rows = {row["file"]: row for row in rows_of(tmp_path / "out" / "predictions.csv")}
    assert (rows["a.jpg"]["spatial_prompt"], rows["a.jpg"]["pixel_mm_x"]) == (SPATIAL, "0.25")
    assert rows["a.jpg"]["attribute_prompt"] == "oval shape, BI-RADS 4a"
    assert (rows["a.png"]["attribute_prompt"], rows["a.png"]["pixel_mm_x"]) == ("", "0.5")


def test_what_cannot_work_is_refused_before_anything_is_predicted(run, folder, tmp_path):
    (tmp_path / "p.csv").write_text("file,shape\nnot_there.png,oval\n")
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "a.jpg.png")
    for words, why in {
        (folder / "a.png", "--prompts", tmp_path / "p.csv"): "not_there.png' is not in the input",
        (tmp_path / "empty",): "no image in",
        (tmp_path / "nowhere",): "does not exist",
        (folder / "a.png", "--batch", "0"): "--batch 0: allowed is 1 or more",
        (folder / "a.png", "--pixel-mm", "-1"): "allowed is a number of millimetres above 0",
        (folder,): "the mask of both a.jpg and a.jpg.png would be a.jpg.png",
    }.items():
        status, said = run(words[0], tmp_path / "out", *words[1:])
        assert (status, why in said) == (2, True), said
    assert not (tmp_path / "out").exists()


def test_a_clip_needs_its_frame_in_python(one, folder):
    with pytest.raises(DataError, match=r"clip.tif: it has 2 frames: choose one with frame=0 to frame=1"):
        one(folder / "clip.tif")
    assert one(folder / "clip.tif", frame=1).mask_HW.shape == one(folder / "a.png").mask_HW.shape


def test_12_bit_pictures_are_predicted_as_their_8_bit_copies(one, run, images, tmp_path):
    """Pillow's I;16 holds values up to 65535, and these use 4095 of them: divided by 65535 they would be black."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "flat").mkdir()
    for key, image_HWC in images.items():
        deep = np.round(image_HWC[..., 0] / 255 * 4095).astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep" / f"{key}.png")
        Image.fromarray(np.round(deep / 4095 * 255).astype(np.uint8)).save(tmp_path / "flat" / f"{key}.png")
    for name in ("deep", "flat"):
        assert run(tmp_path / name, tmp_path / f"{name}-out", "--prob", "--grey-max", 4095)[0] == 0
    for key in images:
        maps = [pixels_of(tmp_path / f"{name}-out" / "probabilities" / f"{key}.png") for name in ("deep", "flat")]
        assert np.array_equal(*maps)
    status, said = run(tmp_path / "deep", tmp_path / "deep-out", "--prob", "--grey-max", 65535)
    assert status == 2
    assert "grey range was integer 0 to 4095, now integer 0 to 65535" in said


def test_a_shrunk_dicom_is_predicted_without_millimetres_and_the_table_says_why(run, tmp_path):
    """pydicom's own ultrasound example: its calibrated region ends at row 518 of 350."""
    (tmp_path / "in").mkdir()
    shutil.copy(get_testdata_file("examples_palette.dcm"), tmp_path / "in" / "a.dcm")
    shutil.copy(get_testdata_file("liver_1frame.dcm"), tmp_path / "in" / "seg.dcm")
    status, said = run(tmp_path / "in", tmp_path / "out")
    assert status == 0
    assert "a.dcm no millimetres: a calibrated region ends at column 800, row 518" in said
    [row] = rows_of(tmp_path / "out" / "predictions.csv")
    assert (row["file"], row["status"], row["pixel_mm_x"], row["area_mm2"]) == ("a.dcm", "ok", "", "")
    assert "row 518" in row["reason"]
