"""Promises of the gallery: every scan and finding is on it, outlines run along the masks, and bad input is answered."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from bushpc.cli import main
from bushpc.errors import DataError
from bushpc.report.gallery import Note, Row, write_gallery
from bushpc.shards.manifest import Manifest, read_image, read_mask

SIZE = (40, 60)  # height, width


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def write(page, rows, **given):
    usual = {"title": "mine", "kicker": "Scans", "command": ["bushpc"], "filters": ["label"]}
    return data_of(write_gallery(page, rows, **{**usual, **given}))


def row(key, load, **given):
    return Row(id=key, key=key, load=load, fields={"label": "benign"}, **given)


def scan(mask_HW):
    return lambda: (np.full((*SIZE, 3), 90, np.uint8), mask_HW)


def inside(path, size):
    """Pixels whose centres lie within an SVG path of relative steps, by matplotlib; holes by the even-odd rule."""
    height, width = size
    centres = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
    filled = np.zeros(len(centres), bool)
    for ring in path.split("M")[1:]:
        start, _, steps = ring.rstrip("z").partition("l")
        numbers = [float(number) for number in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", steps)]
        corners = np.cumsum([[float(n) for n in start.split()], *np.reshape(numbers, (-1, 2))], axis=0)
        filled ^= Outline(corners).contains_points(centres)
    return filled.reshape(size)


def test_outlines_of_every_class_enclose_exactly_the_pixels_of_its_mask(tmp_path):
    mask_HW = np.zeros(SIZE, np.uint8)
    mask_HW[:10, :14] = 1  # at the border
    mask_HW[20:34, 20:50] = 1  # with a hole
    mask_HW[25:28, 30:40] = 0
    mask_HW[22:30, 24:58] |= 2  # overlaps the first class
    mask_HW[38, 2] |= 2  # a single pixel
    (found,) = write(tmp_path / "p.html", [row("a", scan(mask_HW))], classes=["lesion", "cyst", "none"])["scans"]
    assert (found["width"], found["height"]) == (60, 40)
    assert np.array_equal(inside(found["outlines"][0], SIZE), mask_HW & 1 > 0)
    assert np.array_equal(inside(found["outlines"][1], SIZE), mask_HW & 2 > 0)
    assert found["outlines"][2] == ""


def test_smaller_pictures_keep_the_outline_in_place(tmp_path):
    mask_HW = np.zeros(SIZE, np.uint8)
    mask_HW[12:28, 20:44] = 1
    (found,) = write(tmp_path / "p.html", [row("a", scan(mask_HW))], edge=30)["scans"]
    with Image.open(io.BytesIO(base64.b64decode(found["picture"]))) as picture:
        assert picture.format == "WEBP"
        assert picture.size == (found["width"], found["height"]) == (30, 20)
    assert np.array_equal(inside(found["outlines"][0], (20, 30)), mask_HW[::2, ::2] > 0)


def test_a_scan_without_mask_and_one_that_cannot_be_read_stay_on_the_page(tmp_path):
    def unreadable():
        raise DataError("b.tar is cut off.\nPack again.")

    without, damaged = write(tmp_path / "p.html", [row("a", scan(None)), row("b", unreadable)])["scans"]
    assert without["outlines"] == [""]
    assert damaged["problem"] == "b.tar is cut off."


def test_text_of_users_cannot_end_the_data_or_become_markup(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    content = [Row(id=evil, key=evil, load=scan(None), fields={evil: evil}, notes=[Note(kind=evil, text=evil)])]
    (found,) = write(tmp_path / "p.html", content, title=evil, filters=[evil], classes=[evil], remarks=[evil])["scans"]
    assert found["key"] == evil
    assert evil not in (tmp_path / "p.html").read_text()


def test_the_page_needs_nothing_from_outside(tmp_path):
    write(tmp_path / "p.html", [row("a", scan(None))])
    text = (tmp_path / "p.html").read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|")[^$"']""", text)


def test_show_puts_every_scan_with_its_fold_and_findings_on_one_page(phantom_folder, tmp_path, capsys):
    assert main(["shards", "show", f"data={phantom_folder}", f"out={tmp_path}"]) == 0
    assert str(tmp_path / "index.html") in capsys.readouterr().out
    manifest, data = Manifest.load(phantom_folder), data_of(tmp_path / "index.html")
    assert [scan["key"] for scan in data["scans"]] == [record.key for record in manifest.records]
    assert data["filters"] == ["label", "patient", "fold"]
    for record, found in zip(manifest.records, data["scans"], strict=True):
        assert found["values"][:2] == [record.label, record.patient]
        assert np.array_equal(
            inside(found["outlines"][0], (record.height, record.width)), read_mask(phantom_folder, record) > 0
        )
        assert read_image(phantom_folder, record).shape[:2] == (found["height"], found["width"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=breats"], "unknown data 'breats'; did you mean 'breast'"),
        (["data={empty}"], "is not packed yet"),
        (["data={folder}", "folds=nine"], "unknown folds 'nine'"),
        (["data={folder}", "edge=0"], "edge=0"),
        (["data={folder}", "output=x"], "Write out=x"),
    ],
)
def test_bad_words_are_refused_in_a_sentence(words, message, phantom_folder, tmp_path, capsys):
    given = [word.format(empty=tmp_path, folder=phantom_folder) for word in words]
    assert main(["shards", "show", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_audit_links_each_finding_to_its_scan_in_the_gallery(phantom_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(phantom_folder, folder)
    assert main(["shards", "audit", f"data={phantom_folder}", f"data={folder}", f"out={tmp_path / 'out'}"]) == 0
    data = data_of(tmp_path / "out" / "gallery.html")
    by_id = {scan["id"]: scan for scan in data["scans"]}
    assert len(by_id) == 2 * len(Manifest.load(phantom_folder).records)
    assert data["filters"] == ["dataset", "label", "patient", "fold"]
    links = re.findall(r'href="gallery.html#scan=([^"]+)"', (tmp_path / "out" / "index.html").read_text())
    assert links
    for link in links:
        scan = by_id[unquote(link)]
        (twin,) = (note for note in scan["notes"] if note["kind"] == "Same picture as another")
        assert by_id[twin["other"]]["key"] == scan["key"]
        assert twin["other"] != scan["id"]


def test_a_damaged_mask_leaves_the_image_and_a_finding(phantom_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(phantom_folder, folder)
    record = Manifest.load(folder).records[0]
    with (folder / record.shard).open("r+b") as tar:
        tar.seek(record.mask_offset)
        tar.write(bytes(record.mask_bytes))
    assert main(["shards", "show", f"data={folder}", f"out={tmp_path / 'out'}"]) == 0
    found = data_of(tmp_path / "out" / "index.html")["scans"][0]
    assert found["picture"]
    assert [(note["kind"], note["grave"]) for note in found["notes"]] == [("Unreadable", True)]

    for gallery, scans in (("all", len(Manifest.load(folder).records)), ("findings", None), ("none", 0)):
        out = tmp_path / gallery
        assert main(["shards", "audit", f"data={folder}", f"out={out}", f"gallery={gallery}"]) == 1
        page = out / "gallery.html"
        shown = data_of(page)["scans"] if page.exists() else []
        if gallery == "findings":
            assert record.key in {scan["key"] for scan in shown}
            assert all(scan["notes"] for scan in shown)
        else:
            assert len(shown) == scans


def test_data_and_run_exclude_each_other_and_a_run_in_data_is_told(phantom_folder, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for words, message in (
        ([], "give either data="),
        ([f"data={phantom_folder}", f"run={tmp_path}"], "give either data="),
        ([f"data={tmp_path / 'run'}"], "Write run="),
        ([f"run={tmp_path}"], "it has no run.json"),
        ([f"run={tmp_path}", "folds=published"], "a run has its own folds"),
    ):
        assert main(["shards", "show", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_run_shows_dice_folds_and_the_outline_that_the_threshold_cuts(realistic, tmp_path):
    assert main(["shards", "show", f"run={realistic.path}", f"out={tmp_path / 'out'}"]) == 0
    data = data_of(tmp_path / "out" / "index.html")
    rows = {}
    for fold in range(5):
        with (realistic.cell(fold) / "per_image.csv").open() as file:
            rows |= {row["key"]: row for row in csv.DictReader(file) if row["prompts"] == "first_pass"}
    assert len(data["classes"]) == 2
    assert data["classes"][1].startswith("predicted by")
    dice, fold = data["fields"].index("Dice"), data["fields"].index("fold")
    assert {scan["key"] for scan in data["scans"]} == set(rows)
    for scan in data["scans"]:
        row = rows[scan["key"]]
        assert scan["values"][dice] == pytest.approx(float(row["dice"]))
        assert scan["values"][fold] == int(row["fold"])
        truth, found = (inside(outline, (scan["height"], scan["width"])) for outline in scan["outlines"])
        overlap = 2 * (truth & found).sum() / (truth.sum() + found.sum())
        assert overlap == pytest.approx(float(row["dice"]), abs=0.05)  # Dice is measured on the network's grid


def test_a_grid_has_a_dice_and_an_outline_for_each_row(realistic_grid, tmp_path):
    assert main(["shards", "show", f"run={realistic_grid.path}", f"out={tmp_path / 'out'}"]) == 0
    data = data_of(tmp_path / "out" / "index.html")
    assert len(data["classes"]) == 1 + 4
    assert sum(name.startswith("Dice of ") for name in data["fields"]) == 4
    assert all(all(scan["outlines"]) for scan in data["scans"])


@pytest.fixture(scope="module")
def opened(phantom_folder, tmp_path_factory):
    """opened("#label=benign") → the page as a browser shows it at this link, once its script has run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    folder = tmp_path_factory.mktemp("shown")
    assert main(["shards", "show", f"data={phantom_folder}", f"out={folder}"]) == 0

    def open_(link):
        command = [browser, "--headless", "--no-sandbox", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        page = f"file://{folder / 'index.html'}{link}"
        return subprocess.run([*command, page], capture_output=True, text=True, check=True, timeout=120).stdout

    return open_


def cards(shown):
    return re.findall(r'class="card" href="#scan=([^"]+)"', shown)


def text_of(shown, id_):
    return re.search(rf'id="{id_}"[^>]*>([^<]*)<', shown)[1]


def test_a_link_filters_and_sorts_as_the_folds_and_labels_say(phantom_folder, opened):
    with (phantom_folder / "folds.csv").open() as file:
        wanted = [row for row in csv.DictReader(file) if row["label"] == "benign" and row["fold"] in ("1",)]
    shown = opened("#label=benign&fold=1&sort=lesion%2C+%25+of+image&order=down")
    records = {record.key: record for record in Manifest.load(phantom_folder).records}
    shares = [records[key].lesion_pixels / (records[key].height * records[key].width) for key in cards(shown)]
    assert set(cards(shown)) == {row["key"] for row in wanted}
    assert np.all(np.diff(np.round(shares, 4)) <= 0)
    assert text_of(shown, "count").startswith(f"{len(wanted)} of {len(records)} scans")


def test_a_link_to_a_scan_opens_it_and_one_that_fits_nothing_says_what_there_is(phantom_folder, opened):
    keys = [record.key for record in Manifest.load(phantom_folder).records]
    shown = opened(f"#scan={keys[2]}")
    assert re.search(r'<dialog id="large"[^>]* open', shown)
    assert (text_of(shown, "large-key"), text_of(shown, "large-place")) == (keys[2], f"3 of {len(keys)}")
    shown = opened("#fold=99&scan=nobody&foo=1")
    assert len(cards(shown)) == len(keys)
    for part in ("fold 99", "0, 1, 2, 3, 4", "no scan nobody", "unknown filter foo"):
        assert part in text_of(shown, "message")


def test_augment_shows_each_policy_and_the_scan_beside_its_draws(phantom_folder, tmp_path, capsys):
    command = ["shards", "show", f"data={phantom_folder}", "--augment", f"out={tmp_path}"]
    assert main(command) == 0
    data = data_of(tmp_path / "index.html")
    scans = {scan["id"]: scan for scan in data["scans"]}
    policies = {scan["values"][0] for scan in data["scans"]}
    assert {"none", "light", "nnunet", "trivial", "ultrasound"} <= policies
    keys = {scan["values"][1] for scan in data["scans"]}
    assert len(keys) == 3
    for key in keys:
        assert f"none/{key}/1" not in scans
        for policy in policies - {"none"}:
            shown = [scans[f"{policy}/{key}/{draw}"]["picture"] for draw in range(8)]
            assert shown[0] == scans[f"none/{key}/0"]["picture"]
            assert len(set(shown)) > 4  # some draws of a policy change nothing
    assert main([*command, "folds=frozen"]) == 2
    assert "--augment shows one dataset" in capsys.readouterr().err
