"""Promises under hostile input: what stands in a run or in shards, read through the doors that read it, is used, or
refused with an error that the command line can print. Never another exception, code run, or gigabytes taken.

Examples are the same at every run (derandomized). Checksums that would catch a change are forged along with it, so
that what lies behind them is tested, too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import traceback
import typing as t
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from bushpc.config import CellConfig
from bushpc.dispatch.status import read_status
from bushpc.dispatch.status_table import plain_line, status_table
from bushpc.errors import BushpcError, ConfigError, DataError, ResumeError
from bushpc.files import sha256_of
from bushpc.runs import checkpoint, retention
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask, verify
from bushpc.shards.split import load_folds

MB = 1 << 20


def fuzz(examples: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


# What a file may hold instead of what it should


ODD_NUMBERS = [0, -1, 1e999, -1e999, float("nan"), 1e-320, 2**31, 2**63, -(2**63), 2**64, 10**400, True]
ODD_TEXTS = [
    "",
    "\0",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "/",
    "\ud800",
    "\U0001d518",
    "1e5",
    "%s%n",
    "{0}",
    "[red]x[/]",
    "a" * 5000,
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD_NUMBERS)
    | st.sampled_from(ODD_TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# Not JSON, or JSON beyond what a parser or the code behind it takes.
ODD_FILES = [
    *(b"", b"\0", b"\xff\xfe", b"null", b"true", b"[]", b"{}", b'""', b"0", b"NaN", b"-", b'{"', b"{}{}"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"\\ud800": "\\ud800"}', "[1, 2]".encode("utf-16")),
    *(b"a: &a [x]\nb: *a\nc: [*a, *a]", b"\x80\x04K\x01.", b"PK\x03\x04", b"%PDF-1.7", b'a,b\n"', b"? {a: b}\n: c"),
]


@dataclasses.dataclass(frozen=True)
class Damage:
    """Changes to bytes: (kind, where as a share of the length, bytes)."""

    steps: tuple[tuple[str, float, bytes], ...]

    def __call__(self, content: bytes) -> bytes:
        for kind, share, extra in self.steps:
            at = int(share * len(content))
            match kind:
                case "cut":
                    content = content[:at]
                case "insert":
                    content = content[:at] + extra + content[at:]
                case "overwrite":
                    content = content[:at] + extra + content[at + len(extra) :]
                case "double":
                    content = content[:at] + content[at // 2 :]
                case "replace":
                    content = extra
        return content


DAMAGE = st.builds(
    lambda *steps: Damage(steps),
    st.tuples(
        st.sampled_from(["cut", "insert", "overwrite", "overwrite", "double"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=4),
    ),
) | st.builds(
    lambda content: Damage((("replace", 0.0, content),)), st.sampled_from(ODD_FILES) | st.binary(max_size=100)
)


def places(content: t.Any, path: tuple = ()) -> list[tuple]:
    """The way to every value in a JSON document, its root included."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, document: t.Any, most: int = 2) -> t.Any:
    """A JSON document of which a few values, at any depth, are others, missing, or there once more."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, most))):
        where = draw(st.sampled_from(places(document)))
        if not where:
            return draw(JSON)
        parent = document
        for key in where[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["other", "other", "gone", "added"])):
            case "other":
                parent[where[-1]] = draw(JSON)
            case "gone":
                del parent[where[-1]]
            case "added":
                if isinstance(parent, list):
                    parent.append(parent[where[-1]])
                else:
                    parent[draw(st.text(max_size=5))] = draw(JSON)
    return document


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def pickles(trace: Path) -> list[bytes]:
    """Foreign code as pickle in two protocols, as torch.save and numpy write it, and as YAML."""
    saved, array = io.BytesIO(), io.BytesIO()
    torch.save({"w": Evil(trace)}, saved)
    np.save(array, np.array([Evil(trace)], dtype=object), allow_pickle=True)
    yaml_call = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trace}']]\n"
    in_protocols = [pickle.dumps(Evil(trace), protocol) for protocol in (0, 4)]
    return [*in_protocols, saved.getvalue(), array.getvalue(), yaml_call.encode(), f"model: {yaml_call}".encode()]


def refuses_pickles(place: Path, read: Callable[[], object], trace: Path, prepare: Callable[[], None] = lambda: None):
    """Put foreign code in place of a file: `read` must not run it."""
    whole = place.read_bytes()
    for content in pickles(trace):
        place.write_bytes(content)
        prepare()
        with pytest.raises(BushpcError):
            read()
        assert not trace.exists()
    place.write_bytes(whole)
    pickle.loads(pickles(trace)[0])
    assert trace.exists()  # it would have shown
    trace.unlink()


def refusal(read: Callable[[], object], error: type[BushpcError] = BushpcError) -> str:
    """What `read` says where it refuses, "" where it does not."""
    try:
        read()
    except error as refused:
        return str(refused)
    return ""


def within_memory(work: Callable[[], object], megabytes: int) -> None:
    """`work` in a process that may take so much more than it has; a MemoryError in it is a failure."""
    child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * MB,) * 2)
            signal.alarm(60)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Checkpoints


FILES = ["model.safetensors", "optimizer.safetensors", "meta.json", "seal.json"]
PARTS = {"model": {"a.weight": torch.arange(6.0).view(2, 3)}, "optimizer": {"exp_avg/a.weight": torch.ones(2, 3)}}
META = {"frozen": None, "config": "abc", "settings": {"train.lr": 0.1}, "validation": {"dice": 0.5}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        checkpoint.write(folder, step, PARTS, META)
    return folder


@pytest.fixture
def second(checkpoints) -> Path:
    """Step 2, fresh; step 1 is whole beside it."""
    path = checkpoints / "step_00000002"
    shutil.rmtree(path)
    return checkpoint.write(checkpoints, 2, PARTS, META)


def seal(path: Path) -> None:
    """Forge a seal that covers whatever is there."""
    hashes = {file.name: sha256_of(file) for file in sorted(path.iterdir()) if file.name != "seal.json"}
    (path / "seal.json").write_text(json.dumps(hashes))


def read_all(path: Path) -> None:
    """Every door through which a checkpoint is looked at: refused by name, or read."""
    said: list[str] = []
    found = checkpoint.newest(path.parent, path.parent / "frozen", said.append)
    assert found.step == (1 if said else 2)
    assert all(str(path) in line for line in said)
    if found.step == 2:
        assert all(isinstance(tensor, torch.Tensor) for tensors in found.parts.values() for tensor in tensors.values())
    retention.retain(path.parent, retention.Retention(keep=1, every=1, best="dice"), said.append)
    retention.retain(path.parent, retention.Retention(keep=2, best="dice"), said.append)
    assert checkpoint.steps(path.parent) == [1, 2]


@pytest.mark.parametrize("name", FILES)
@fuzz(60)
@given(damage=DAMAGE, forged=st.booleans())
def test_anything_in_place_of_a_checkpoints_file_is_refused_or_read(second, name, damage, forged):
    whole = (second / name).read_bytes()
    (second / name).write_bytes(damage(whole))
    if forged and name != "seal.json":
        seal(second)
    read_all(second)
    (second / name).write_bytes(whole)
    seal(second)


@fuzz(150)
@given(meta=changed({"step": 2, "parts": ["model", "optimizer"], **META}))
@example(meta={"step": 2, "parts": ["../step_00000001/model"], "frozen": None})
@example(meta={"step": 2, "parts": ["model"], "frozen": "../../../../../../dev/zero"})
@example(meta={"step": 2, "parts": [], "frozen": "0" * 64})
def test_any_meta_under_a_matching_seal_is_refused_or_read(second, meta):
    (second / "meta.json").write_text(json.dumps(meta))
    seal(second)
    read_all(second)


@fuzz(100)
@given(hashes=changed(dict.fromkeys(FILES[:3], "0" * 64)))
@example(hashes={"/dev/zero": "0" * 64})
@example(hashes={"../step_00000001/meta.json": "0" * 64})
@example(hashes={})
def test_any_seal_is_refused_or_holds(second, hashes):
    (second / "seal.json").write_text(json.dumps(hashes))
    read_all(second)


def with_header(header: bytes, length: int | None = None, data: bytes = bytes(24)) -> bytes:
    """A safetensors file: the header's length, the header, the tensors' bytes."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


HEADER = {"a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
DTYPES = ["F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "U16", "C64", "f32", "", "OBJECT"]
ABSURD = [
    with_header(b"{}", length=length) for length in (0, 1, 3, 100_000_000, 100_000_001, 2**31, 2**63 - 1, 2**64 - 1)
] + [
    with_header(json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode())
    for dtype, shape, offsets in (
        ("F32", [2**40], [0, 2**42]),
        ("F32", [2**62, 4], [0, 24]),
        ("F32", [2**63], [0, 24]),
        ("F32", [], [0, 24]),
        ("F32", [0, 2**62], [0, 0]),
        ("F32", [6], [24, 0]),
        ("F32", [6], [8, 32]),
        ("U8", [2**33], [0, 24]),
        ("F32", [-6], [0, 24]),
        ("F32", [1] * 100_000 + [6], [0, 24]),
    )
]


@fuzz(100)
@given(
    header=changed(HEADER, most=1)
    | st.builds(lambda dtype: {"w": {**HEADER["a.weight"], "dtype": dtype}}, st.sampled_from(DTYPES)),
    data=st.sampled_from([b"", bytes(24), bytes(25)]),
)
def test_any_tensor_header_under_a_matching_seal_is_refused_or_read(second, header, data):
    (second / "model.safetensors").write_bytes(with_header(json.dumps(header).encode(), data=data))
    seal(second)
    read_all(second)


def test_absurd_sizes_in_tensor_headers_take_no_memory(second):
    def read() -> None:
        for content in ABSURD:
            (second / "model.safetensors").write_bytes(content)
            seal(second)
            read_all(second)

    within_memory(read, megabytes=256)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_checkpoints_file_is_never_unpickled(second, tmp_path, name):
    prepare = (lambda: None) if name == "seal.json" else (lambda: seal(second))
    refuses_pickles(second / name, lambda: checkpoint.read(second, second), tmp_path / "foreign code ran", prepare)


def test_a_pickle_in_place_of_frozen_parameters_is_never_unpickled(checkpoints, tmp_path):
    store, trace = tmp_path / "frozen", tmp_path / "foreign code ran"
    store.mkdir()
    for content in pickles(trace):
        sha256 = hashlib.sha256(content).hexdigest()
        (store / f"{sha256}.safetensors").write_bytes(content)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        path = checkpoint.write(tmp_path / "checkpoints", 1, PARTS, {"frozen": sha256})
        with pytest.raises(ResumeError):
            checkpoint.read(path, store)
        assert not trace.exists()


# Manifest and tars


@pytest.fixture(scope="module")
def packed(phantom_folder, tmp_path_factory) -> Path:
    """A copy of the packed dataset that a test may spoil."""
    return shutil.copytree(phantom_folder, tmp_path_factory.mktemp("fuzz") / "phantom")


@pytest.fixture
def shards(packed, phantom_folder) -> Path:
    for name in ("manifest.json", "folds.csv"):
        shutil.copy(phantom_folder / name, packed / name)
    return packed


def forge_hash(content: t.Any) -> t.Any:
    """The hash that a changed manifest would state, had bushpc written it."""
    if isinstance(content, dict):
        rest = {key: value for key, value in content.items() if key != "hash"}
        text = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        content["hash"] = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    return content


def use(shards: Path, most: int = 2) -> None:
    """Everything that is done with a manifest: DataError, or pixels as it says."""
    try:
        manifest = Manifest.load(shards)
    except DataError:
        return
    for deep in (False, True):
        try:
            verify(shards, manifest, deep=deep)
        except DataError as error:
            str(error)
    for record in (*manifest.records[:most], *manifest.records[-most:]):
        for read, channels in ((read_image, (3,)), (read_mask, ())):
            try:
                pixels = read(shards, record)
            except DataError:
                continue
            assert pixels.dtype == np.uint8
            assert pixels.shape == (record.height, record.width, *channels)
    try:
        load_folds(shards / "folds.csv", manifest.records)
    except DataError:
        return


@fuzz(60)
@given(damage=DAMAGE)
def test_anything_in_place_of_a_manifest_is_refused_or_used(shards, damage):
    path = shards / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    use(shards)
    path.write_bytes(whole)


@fuzz(150)
@given(data=st.data())
def test_any_manifest_with_a_forged_hash_is_refused_or_used(shards, phantom_folder, data):
    content = json.loads((phantom_folder / "manifest.json").read_text())
    content["records"] = [content["records"][0]]
    (shards / "manifest.json").write_text(json.dumps(forge_hash(data.draw(changed(content)))))
    use(shards)


PLACES = st.sampled_from([-(2**70), -(2**63), -1, 0, 1, 512, 2**31, 2**40, 2**63 - 1, 2**63, 2**70])


@fuzz(100)
@given(offset=PLACES, length=PLACES)
def test_any_place_in_a_tar_is_refused(shards, offset, length):
    record = Manifest.load(shards).records[0]
    record = dataclasses.replace(record, image_offset=offset, image_bytes=length, mask_offset=offset, mask_bytes=length)
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=record.key):
            read(shards, record)


@pytest.mark.parametrize("shard", ["", ".", "..", "\0", "/dev/zero", "manifest.json", "nothing.tar"])
def test_any_name_of_a_tar_is_refused(shards, shard):
    content = json.loads((shards / "manifest.json").read_text())
    content["records"][0]["shard"] = shard
    if shard != "nothing.tar":
        content["shards"][0]["file"] = shard
    (shards / "manifest.json").write_text(json.dumps(forge_hash(content)))
    with pytest.raises(DataError):
        verify(shards, Manifest.load(shards), deep=True)


@fuzz(150)
@given(what=st.sampled_from(["image", "mask"]), damage=DAMAGE)
def test_any_damage_to_a_tar_is_refused_or_decoded(shards, phantom_folder, what, damage):
    record = Manifest.load(shards).records[0]
    offset, length = getattr(record, f"{what}_offset"), getattr(record, f"{what}_bytes")
    tar = (phantom_folder / record.shard).read_bytes()
    image = damage(tar[offset : offset + length])
    (shards / record.shard).write_bytes(tar[:offset] + image[:length].ljust(length, b"\0") + tar[offset + length :])
    use(shards, most=1)
    (shards / record.shard).write_bytes(tar)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], kind: bytes = b"\x08\x00\x00\x00\x00") -> bytes:
    """A PNG file with right checksums, whatever it says. kind: depth, colour, compression, filter, interlace."""
    header = (b"IHDR", struct.pack(">II", width, height) + kind)
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (header, *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


@functools.cache
def bomb() -> bytes:
    """256 MiB of zeros, packed."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(MB)) for _ in range(256)), packer.flush()])


PIXELS = zlib.compress(bytes(72))  # of 8x8, grey
# (width, height) as the manifest says it, too → what makes the file.
HOSTILE_PNGS: dict[str, tuple[int, int, Callable[[], bytes]]] = {
    "more pixels than Pillow takes": (60_000, 60_000, lambda: png(60_000, 60_000, (b"IDAT", bomb()))),
    "most pixels that a header can say": (2**31 - 1, 2**31 - 1, lambda: png(2**31 - 1, 2**31 - 1, (b"IDAT", b""))),
    "a compressed text": (8, 8, lambda: png(8, 8, (b"zTXt", b"k\0\0" + bomb()), (b"IDAT", PIXELS))),
    "a compressed colour profile": (8, 8, lambda: png(8, 8, (b"iCCP", b"k\0\0" + bomb()), (b"IDAT", PIXELS))),
    "more data than pixels": (8, 8, lambda: png(8, 8, (b"IDAT", bomb()))),
    "no data": (8, 8, lambda: png(8, 8)),
    "no pixels": (0, 0, lambda: png(0, 0, (b"IDAT", zlib.compress(b"")))),
    "an unknown colour": (8, 8, lambda: png(8, 8, (b"IDAT", PIXELS), kind=b"\x63\x63\0\0\0")),
    "a palette that is missing": (8, 8, lambda: png(8, 8, (b"IDAT", PIXELS), kind=b"\x08\x03\0\0\0")),
    "a header that is cut off": (8, 8, lambda: png(8, 8)[:20]),
    "an animation without end": (8, 8, lambda: png(8, 8, (b"acTL", b"\xff" * 8), (b"fcTL", b"\xff" * 26))),
    "a chunk longer than the file": (8, 8, lambda: png(8, 8)[:33] + b"\x7f\xff\xff\xffIDAT"),
    "another format": (8, 8, lambda: b"GIF89a" + bytes(100)),
}


@pytest.mark.parametrize("name", HOSTILE_PNGS)
def test_a_hostile_png_is_refused_or_decoded_in_little_memory(tmp_path, shards, name):
    width, height, make = HOSTILE_PNGS[name]
    content = make()
    (tmp_path / "hostile.tar").write_bytes(content)
    places = {"image_offset": 0, "image_bytes": len(content), "mask_offset": 0, "mask_bytes": len(content)}
    record = dataclasses.replace(
        Manifest.load(shards).records[0], shard="hostile.tar", height=height, width=width, **places
    )

    def read() -> None:
        for door in (read_image, read_mask):
            said = refusal(lambda door=door: door(tmp_path, record), DataError)
            assert record.key in said or door(tmp_path, record).shape[:2] == (height, width)

    within_memory(read, megabytes=200)


def test_a_picture_of_another_size_than_the_manifest_says_is_refused_before_it_is_decoded(
    tmp_path, shards, monkeypatch
):
    content = png(9000, 9000, (b"IDAT", b"never reached"))
    (tmp_path / "hostile.tar").write_bytes(content)
    record = dataclasses.replace(
        Manifest.load(shards).records[0], shard="hostile.tar", image_offset=0, image_bytes=len(content)
    )
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="9000x9000 pixels, the manifest says"):
        read_image(tmp_path, record)


def test_a_pickle_in_place_of_manifest_or_tar_is_never_unpickled(shards, tmp_path):
    trace = tmp_path / "foreign code ran"
    refuses_pickles(shards / "manifest.json", lambda: Manifest.load(shards), trace)
    record = Manifest.load(shards).records[0]
    refuses_pickles(shards / record.shard, lambda: read_image(shards, record), trace)


# Folds


@pytest.fixture(scope="module")
def records(phantom_folder) -> list[Record]:
    return Manifest.load(phantom_folder).records


@fuzz(150)
@given(damage=DAMAGE)
@example(damage=Damage((("replace", 0, b"key,patient,label,fold\n" + b"x,y,z," + b"9" * 5000 + b"\n"),)))
def test_any_folds_file_is_refused_or_used(tmp_path, phantom_folder, records, damage):
    path = tmp_path / "folds.csv"
    path.write_bytes(damage((phantom_folder / "folds.csv").read_bytes()))
    said = refusal(lambda: load_folds(path, records), DataError)
    assert str(path) in said or load_folds(path, records).count >= 1


@pytest.mark.parametrize("number", ["1000000000000", "9" * 4000, "9" * 5000, "²", "-1", "1e3", "1 1", "0x1"])
def test_an_absurd_fold_number_is_refused_in_little_memory(tmp_path, phantom_folder, records, number):
    path = tmp_path / "folds.csv"
    rows = (phantom_folder / "folds.csv").read_text().splitlines()
    patient = rows[1].split(",")[1]
    changed = [f"{row.rpartition(',')[0]},{number}" if row.split(",")[1] == patient else row for row in rows]
    path.write_text("\n".join(changed) + "\n")

    def read() -> None:
        with pytest.raises(DataError):
            load_folds(path, records)

    within_memory(read, megabytes=200)


# A run's own notes


RUN = {"cells": [{"name": "fold0", "fold": 0}, {"name": "fold1", "fold": 1}]}
JOB = {
    **{"job_id": "4194305", "executor": "local", "host": "n1", "process_start": "1", "log": "", "submitted": 10.0},
    **{"heartbeat": "state.json"},
}
STATE = {
    **{"phase": "training", "step": 5, "total": 10, "metric": {"loss": 0.5}, "rate": 1.5, "restarts": 1},
    **{"host": "n1", "pid": 3, "time": 1000.0, "attempt": None},
}
NOTES = {
    "run.json": RUN,
    "cells/fold0/job.json": {**JOB, "host": socket.gethostname()},
    "cells/fold0/state.json": STATE,
    "jobs/report.json": JOB,
}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    for name, content in NOTES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def show(run_dir: Path) -> None:
    """`bushpc status` in its three forms."""
    if said := refusal(lambda: read_status(run_dir)):
        assert str(run_dir) in said
        return
    status = read_status(run_dir)
    json.loads(status.to_json())
    Console(file=io.StringIO(), width=100).print(status_table(status, 80))
    assert all(isinstance(plain_line(cell), str) for cell in status.cells)


@pytest.mark.parametrize("name", NOTES)
@fuzz(60)
@given(data=st.data())
def test_any_note_of_a_run_is_refused_or_shown(run_dir, name, data):
    whole = json.dumps(NOTES[name]).encode()
    as_json = changed(NOTES[name]).map(lambda content: json.dumps(content).encode())
    (run_dir / name).write_bytes(data.draw(as_json | DAMAGE.map(lambda damage: damage(whole))))
    show(run_dir)
    (run_dir / name).write_bytes(whole)


def test_a_pickle_in_place_of_a_run_is_never_unpickled(run_dir, tmp_path):
    refuses_pickles(run_dir / "run.json", lambda: read_status(run_dir), tmp_path / "foreign code ran")


# The frozen config


@pytest.fixture(scope="module")
def config_text(phantom_folder) -> str:
    from bushpc.config import compose

    composed = compose(["model=unet", "data=phantom", f"data.root={phantom_folder}"])
    return dataclasses.replace(composed, fold=0, name="fuzz").to_yaml()


def load_config(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if said := refusal(lambda: CellConfig.load(path), ConfigError):
        assert len(said) < 10_000
        return
    cell = CellConfig.load(path)
    assert cell.hash
    assert CellConfig.from_dict(cell.to_dict()) == cell


@fuzz(60)
@given(damage=DAMAGE)
def test_any_config_file_is_refused_or_used(tmp_path, config_text, damage):
    load_config(tmp_path / "config.yaml", damage(config_text.encode()))


@fuzz(150)
@given(data=st.data())
def test_any_value_in_a_config_is_refused_or_used(tmp_path, config_text, data):
    content = data.draw(changed(yaml.safe_load(config_text)))
    load_config(tmp_path / "config.yaml", json.dumps(content).encode())  # JSON is YAML


TARGETS = ["", ".", "os.system", *(f"bushpc.models.{rest}" for rest in ("", ".x", "unknown.X"))]
NO_MODELS = [f"bushpc.models.base.{name}" for name in ("t", "Model", "dataclass")]


@pytest.mark.parametrize("target", [*TARGETS, *NO_MODELS, 3, None, ["a"]])
def test_any_model_class_is_refused(tmp_path, config_text, target):
    content = yaml.safe_load(config_text)
    content["model"]["_target_"] = target
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError):
        CellConfig.load(tmp_path / "config.yaml")


def test_a_config_that_unfolds_to_a_billion_words_takes_no_memory(tmp_path, config_text):
    levels = "".join(
        f"  {b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    config = config_text.replace("seed: 0\n", "").replace("choices:\n", f"choices:\n  a: &a [lol]\n{levels}")
    for seed in ("0", "*j"):
        content = f"{config}seed: {seed}\n".encode()
        assert yaml.safe_load(content)["choices"]["j"]
        within_memory(lambda content=content: load_config(tmp_path / "config.yaml", content), megabytes=200)


def test_code_in_place_of_a_config_is_never_run(tmp_path, config_text):
    path = tmp_path / "config.yaml"
    path.write_text(config_text)
    refuses_pickles(path, lambda: CellConfig.load(path), tmp_path / "foreign code ran")
