"""The guards of docs/explanation/security.md, each tried with a harmless file: one that would leave a trace, or whose
numbers would take all memory. Pickles in place of a run's files: test_fuzz.py. Pages: report/test_page.py.
"""

from __future__ import annotations

import ast
import json
import shutil
import zipfile
from pathlib import Path, PurePosixPath

import nibabel
import numpy as np
import pytest
import torch
import yaml

import bushpc
from bushpc.conditions.known import read_table
from bushpc.config import CellConfig, compose
from bushpc.errors import BushpcError, ConfigError, DataError
from bushpc.evaluate.hub import weight_files
from bushpc.evaluate.predictor import load
from bushpc.files import EXPORT_FILE
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.exchange.coco import decode
from bushpc.shards.images import open_picture
from bushpc.shards.readers import spreadsheet_rows
from bushpc.shards.sources import brats2021

from .fuzzing import cohorts, shards
from .test_fuzz import pickles

PACKAGE = Path(bushpc.__file__).parent
CELL = ("model=unet_small", "data=phantom", "model.image_size=32")
# Call → the keyword and value without which it may run what is in a file; None: never to be called.
RUNS_CODE = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "yaml.load": ("Loader", ...),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "pd.read_pickle"), None),
    **dict.fromkeys(("yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "shutil.unpack_archive"), None),
    **dict.fromkeys(("eval", "exec", "instantiate", "hydra.utils.instantiate", "hydra.utils.call"), None),
}
# What this process's own workers made, in memory without a name: no file is read.
FROM_OWN_WORKERS = (PACKAGE / "data" / "workers.py", "pickle.loads")
SAFE_LOADERS = {
    "YAML_LOADER",
    "_Unambiguous",
    "Unambiguous",
    "yaml.SafeLoader",
    "YAML_LOADER if deepest < DEEP else yaml.SafeLoader",
}


def test_nothing_in_the_package_reads_a_file_by_a_call_that_can_run_code():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or (name := ast.unparse(call.func)) not in RUNS_CODE:
                assert not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".extractall")), path
                continue
            if (path, name) == FROM_OWN_WORKERS:
                continue
            where, needed = f"{path}:{call.lineno}: {name}", RUNS_CODE[name]
            assert needed, where
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            loader = given.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")
            assert loader in SAFE_LOADERS if needed[1] is ... else given.get(needed[0]) == str(needed[1]), where
            seen.add(name)
    assert seen == {"torch.load", "np.load", "yaml.load"}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    shards.READERS["an export's settings"].write(folder, folder)
    load(folder / "export", device="cpu")
    return folder / "export"


@pytest.fixture
def export(template, tmp_path):
    """The folder of an export, and a way to change what it states."""
    folder = Path(shutil.copytree(template, tmp_path / "export"))

    def change(what) -> Path:
        content = json.loads((folder / EXPORT_FILE).read_text())
        what(content)
        (folder / EXPORT_FILE).write_text(json.dumps(content))
        return folder

    return change


@pytest.mark.parametrize("target", ["os.system", "pathlib.Path.touch", "bushpc.models.base.importlib.import_module"])
def test_an_export_names_no_class_but_a_model_of_the_package(export, target):
    with pytest.raises(ConfigError, match="_target_"):
        load(export(lambda content: content["model"].update(_target_=target)), device="cpu")


def test_an_exports_weights_are_never_unpickled(export, tmp_path):
    trace = tmp_path / "foreign code ran"
    for content in pickles(trace):
        folder = export(lambda _: None)
        path = folder / "fold0.safetensors"
        path.write_bytes(content)
        export(lambda stated, path=path: stated["folds"][0].update(sha256=bushpc.files.sha256_of(path)))
        with pytest.raises(BushpcError, match="weights"):
            load(folder, device="cpu")
        assert not trace.exists()


@pytest.mark.parametrize("name", ["../fold0.safetensors", "/dev/null", "a/../../b.safetensors", "", ".", 3])
def test_an_export_reads_no_file_outside_its_folder(export, name):
    with pytest.raises(DataError):
        load(export(lambda content: content["folds"][0].update(weights=name)), device="cpu")


@pytest.mark.parametrize("name", ["*", "model.bin", "code.py", "[a-z]*.safetensors", "../x.safetensors", None, 3])
def test_an_export_on_the_hub_fetches_nothing_but_safetensors(name):
    with pytest.raises(DataError):
        weight_files({"folds": [{"fold": 0, "weights": name}]}, "hub:somebody/model", None)


@pytest.mark.parametrize("folds", [3, [3], [{}], {"a": 1}, None])
def test_a_damaged_export_on_the_hub_is_a_typed_error(folds):
    with pytest.raises(DataError):
        weight_files({"folds": folds}, "hub:somebody/model", None)
    good = {"folds": [{"fold": k, "weights": f"fold{k}/model.safetensors"} for k in (0, 1)]}
    assert weight_files(good, "hub:a/b", 1) == ["fold1/model.safetensors"]


def test_the_environment_is_read_by_no_file_that_others_lay_down(export, tmp_path, monkeypatch):
    monkeypatch.setenv("BUSHPC_TEST_SECRET", "hunter2")
    text = "${oc.env:BUSHPC_TEST_SECRET}"
    config = tmp_path / "config.yaml"
    content = compose([*CELL]).to_dict() | {"name": text, "fold": 0}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        CellConfig.load(config)
    assert "hunter2" not in str(refused.value)
    card = yaml.safe_load((PROJECT_SHARDS / "busi" / "card.yaml").read_text())
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card | {"title": text}))
    assert Card.load(tmp_path).title == text
    with pytest.raises(BushpcError) as refused:
        load(export(lambda stated: stated["model"].update(encoder=text)), device="cpu")
    assert "hunter2" not in str(refused.value)


def test_hydras_own_settings_in_a_yaml_make_no_object(tmp_path, monkeypatch):
    trace = tmp_path / "foreign code ran"
    made = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(trace)]}}
    for group, name in (("cluster", "mine"), ("model", "unet_small"), ("data", "phantom")):
        folder = tmp_path / group / "configs" / group
        folder.mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"hydra": {"callbacks": {"x": made}}, "extra": made}))
        monkeypatch.setenv("BUSHPC_CONFIGS", str(folder.parent))
        with pytest.raises(ConfigError):
            compose([*CELL, *([f"cluster={name}"] if group == "cluster" else [])])
        assert not trace.exists()


def test_prompts_name_only_pictures_of_the_input(tmp_path):
    (tmp_path / "p.csv").write_text("file,spatial_prompt\n../../etc/passwd,a lesion\n/etc/passwd,a lesion\n")
    with pytest.raises(DataError, match=r"/etc/passwd' is not in the input"):
        read_table(tmp_path / "p.csv", [PurePosixPath("a.png")])


@pytest.mark.parametrize("name", ["../secret.png", "/{folder}/secret.png", "images/../../secret.png"])
def test_coco_takes_no_picture_from_outside_its_folder(tmp_path, phantom_folder, name):
    reader = cohorts.READERS["COCO to import"]
    annotations = reader.write(tmp_path, phantom_folder)
    reader.read(tmp_path)
    reader.clean(tmp_path)
    (tmp_path / "secret.png").write_bytes((tmp_path / "raw" / "images" / "s1.png").read_bytes())
    content = json.loads(annotations.read_text())
    content["images"][0]["file_name"] = name.format(folder=tmp_path)
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match="outside"):
        reader.read(tmp_path)


def test_a_polygon_far_outside_its_image_is_refused():
    assert decode([[-2, -2, 9, -2, 9, 9]], 8, 8).sum() > 20
    with pytest.raises(DataError, match="far outside"):
        decode([[0, 0, 40, 0, 40, 40]], 8, 8)


@pytest.mark.parametrize("tags", [{"Rows": 65535, "Columns": 65535}, {"NumberOfFrames": 2_000_000_000}])
def test_a_dicom_header_that_promises_too_much_is_refused_before_pixels_are_decoded(
    tmp_path, phantom_folder, tags, monkeypatch
):
    import pydicom

    path = cohorts.READERS["a picture: dcm"].write(tmp_path, phantom_folder)
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    monkeypatch.setattr("pydicom.pixels.utils.pixel_array", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(DataError, match="allowed"):
        open_picture(path).read(0)


def test_a_volume_that_promises_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    image.to_filename(tmp_path / "v.nii")
    content = bytearray((tmp_path / "v.nii").read_bytes())
    content[42:48] = np.array([30_000] * 3, "<i2").tobytes()  # dim[1] to dim[3]
    (tmp_path / "v.nii").write_bytes(content)
    with pytest.raises(DataError, match=r"30000.*voxels"):
        brats2021._volume(tmp_path, "v.nii")


def test_a_workbook_that_unpacks_to_too_much_is_refused_before_it_is_read(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "list.xlsx", "w", zipfile.ZIP_DEFLATED) as parts,
        parts.open("xl/a.xml", "w") as one,
    ):
        for _ in range(257):
            one.write(bytes(1 << 20))
    assert (tmp_path / "list.xlsx").stat().st_size < 1 << 20
    with pytest.raises(DataError, match="when unpacked"):
        list(spreadsheet_rows(tmp_path / "list.xlsx", ()))


def test_weights_to_import_are_never_unpickled(tmp_path):
    from bushpc.convert.sources import open_source

    trace = tmp_path / "foreign code ran"
    for number, content in enumerate(pickles(trace)):
        for ending in (".pth", ".safetensors"):
            path = tmp_path / f"{number}{ending}"
            path.write_bytes(content)
            with pytest.raises(BushpcError):
                open_source(str(path))
            assert not trace.exists()
    assert torch.load(tmp_path / "2.pth", weights_only=False)["w"] is None
    assert trace.exists()  # it would have shown
