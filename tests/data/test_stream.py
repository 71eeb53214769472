"""Promises of the stream: the order is arithmetic, each sample comes once an epoch, and nothing is skipped quietly."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import io
import shutil
import tarfile
import threading
import time
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from webdataset.gopen import gopen

from bushpc.config import CellConfig, ModelConfig, compose
from bushpc.data import stream_read
from bushpc.data.batches import training_batches, validation_batches
from bushpc.data.loader import FoldData
from bushpc.data.stream_order import Lanes
from bushpc.dispatch.plan import cv_plan
from bushpc.dist import World
from bushpc.errors import ConfigError, DataError
from bushpc.files import sha256_of
from bushpc.shards.manifest import FILE_NAME, Manifest, Record, ShardInfo
from bushpc.shards.split import ensure_folds
from bushpc.shards.write import pack

# --- the arithmetic ---------------------------------------------------------------------------------------------

streams = st.builds(
    Lanes,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7).map(tuple),
    count=st.integers(1, 6),
    seed=st.just(3),
)


def laid_out(lanes: Lanes, lane: int, first: int, stop: int) -> list[tuple[int, int, int]]:
    """(epoch, shard, sample of the shard) at the places of a lane."""
    return [(piece.epoch, piece.shard, pick) for piece in lanes.pieces(lane, first, stop) for pick in piece.picks]


@given(lanes=streams, epochs=st.integers(1, 4))
def test_lanes_divide_every_epoch_among_themselves_without_gap_or_repeat(lanes, epochs):
    places = [laid_out(lanes, lane, 0, lanes.before(lane, epochs)) for lane in range(lanes.count)]
    once = [(e, s, i) for e in range(epochs) for s, size in enumerate(lanes.sizes) for i in range(size)]
    assert sorted(chain(*places)) == once


@given(lanes=streams, steps=st.integers(1, 30))
def test_epochs_lie_end_to_end_over_all_lanes_so_that_none_is_ahead_by_more_than_one_sample(lanes, steps):
    places = [laid_out(lanes, lane, 0, steps) for lane in range(lanes.count)]
    together = [places[p % lanes.count][p // lanes.count] for p in range(steps * lanes.count)]
    assert [epoch for epoch, _, _ in together] == [p // lanes.samples for p in range(len(together))]


@given(lanes=streams, first=st.integers(0, 40), count=st.integers(0, 20), data=st.data())
def test_a_lane_entered_anywhere_goes_on_as_if_it_had_been_read_from_its_beginning(lanes, first, count, data):
    lane = data.draw(st.integers(0, lanes.count - 1))
    assert laid_out(lanes, lane, first, first + count) == laid_out(lanes, lane, 0, first + count)[first:]


@given(lanes=streams)
def test_a_shard_is_read_once_an_epoch_and_once_more_at_each_cut_between_lanes(lanes):
    pieces = [piece for lane in range(lanes.count) for piece in lanes.pieces(lane, 0, lanes.before(lane, 1))]
    assert len(pieces) <= len(lanes.sizes) + lanes.count - 1


def test_every_epoch_has_an_order_of_its_own_and_so_has_every_seed():
    orders = [
        tuple(islice(laid_out(Lanes(sizes=(8, 8, 8), count=1, seed=seed), 0, 24 * epoch, 24 * epoch + 24), 24))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple((shard, pick) for _, shard, pick in order) for order in orders}) == 4


# --- a small packed set, and where it streams from --------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """22 scans in tars of 4, with folds."""
    folder = tmp_path_factory.mktemp("packed")
    manifest = pack("phantom", None, folder, shard_samples=4, parameters={"count": 22, "height": 64, "width": 80})
    ensure_folds(folder, manifest)
    return folder


@pytest.fixture
def remote(packed, tmp_path) -> Path:
    """A folder with the tars, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "remote"))


@pytest.fixture
def local(packed, tmp_path) -> Path:
    """What a streaming user has: manifest and folds, no tars."""
    folder = tmp_path / "local"
    folder.mkdir()
    for name in (FILE_NAME, "folds.csv"):
        shutil.copy(packed / name, folder)
    return folder


@pytest.fixture
def opened(local, tmp_path, monkeypatch):
    """opened("override", …) → cell and data of fold 0, tiny and streaming where the overrides say so."""
    monkeypatch.setattr(stream_read, "BACKOFF_S", 0.01)

    def open_cell(*overrides: str, world: int = 1) -> tuple[CellConfig, FoldData]:
        words = ("model=unet_small", "data=phantom", "cluster=local", f"data.root={local}", "model.image_size=32")
        words += (
            "train.iterations=7",
            "train.batch_size=8",
            "loader.lanes=4",
            f"loader.cache_dir={tmp_path / 'cache'}",
        )
        words += ("augment.hflip=0.5", "augment.rotate=20", "augment.contrast=0.3", f"cluster.ranks_per_node={world}")
        cell = dataclasses.replace(compose([*words, *overrides]), fold=0)
        return cell, FoldData.open(cell, 0, local / "folds.csv")

    return open_cell


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback interface, and remembers what it was asked for.

    broken: so many answers end half-way.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.broken = folder, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.asked.append(name)
        content = (self.server.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.broken:
            self.server.broken -= 1
            content = content[: len(content) // 2]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(packed, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(packed) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield running
        running.shutdown()


def of_rank(cell: CellConfig, data: FoldData, rank: int = 0, size: int = 1, start: int = 0) -> list:
    with contextlib.closing(training_batches(cell, data, World(rank=rank, size=size), start)) as batches:
        return list(batches)


def assert_same(ours: list, theirs: list) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


# --- training ---------------------------------------------------------------------------------------------------


def test_folder_pipe_and_http_stream_the_same_batches(opened, packed, server):
    sources = (f"{packed}/", f"file://{packed}/", f"pipe:cat {packed}/", server.url)
    whole = [of_rank(*opened(f"data.stream={source}", "train.iterations=2")) for source in sources]
    for other in whole[1:]:
        assert_same(whole[0], other)


def test_the_global_batch_does_not_depend_on_ranks(opened, packed):
    alone = of_rank(*opened(f"data.stream={packed}/"))
    for size in (2, 4):
        cell, data = opened(f"data.stream={packed}/", world=size)
        shares = [of_rank(cell, data, rank, size) for rank in range(size)]
        for step, batch in enumerate(alone):
            together = [None] * len(batch.keys)
            for rank in range(size):
                together[rank::size] = zip(shares[rank][step].epochs, shares[rank][step].keys, strict=True)
            assert together == list(zip(batch.epochs, batch.keys, strict=True))


def test_every_sample_is_streamed_exactly_once_an_epoch(opened, packed):
    cell, data = opened(f"data.stream={packed}/", "train.iterations=9")
    pairs = [pair for batch in of_rank(cell, data) for pair in zip(batch.epochs, batch.keys, strict=True)]
    complete = len(pairs) // len(data.train)
    assert complete >= 3
    for epoch in range(complete):
        assert Counter(key for e, key in pairs if e == epoch) == Counter(record.key for record in data.train)
    assert len(set(pairs)) == len(pairs)


def test_a_stream_resumed_at_any_step_goes_on_with_the_very_next_batch(opened, packed):
    cell, data = opened(f"data.stream={packed}/")
    whole = of_rank(cell, data)
    for start in range(len(whole) + 1):
        assert_same(whole[start:], of_rank(cell, data, start=start))


def test_a_resumed_stream_asks_only_for_the_shards_that_it_still_needs(opened, server):
    cell, data = opened(f"data.stream={server.url}", "loader.lanes=1", "train.iterations=40")
    shards = {record.key: record.shard for record in data.train}
    needed = {shards[key] for batch in of_rank(cell, data, start=39) for key in batch.keys}
    assert set(server.asked) == needed
    assert len(server.asked) == len(needed) < len(data.manifest.shards)


def test_a_lane_reads_one_shard_ahead_and_no_further(opened, server):
    one = ("loader.lanes=1", "train.batch_size=1", "train.iterations=60", "model.image_size=64")
    cell, data = opened(f"data.stream={server.url}", *one)
    with contextlib.closing(training_batches(cell, data, World(), 0)) as batches:
        next(batches)
        wait_for(lambda: len(server.asked) >= 2)
        time.sleep(0.3)  # in which it could ask for more
        assert len(server.asked) == 2


def test_batches_do_not_depend_on_loader_workers(opened, packed):
    alone = of_rank(*opened(f"data.stream={packed}/"))
    for workers in (1, 3, 9):
        assert_same(alone, of_rank(*opened(f"data.stream={packed}/", f"loader.workers={workers}")))


def test_a_sample_has_the_pixels_and_prompts_that_the_indexed_loader_gives_it_in_that_epoch(opened, packed):
    reads_prompts = ("model=xbusnet_small", "train.iterations=9")
    cell, data = opened(f"data.root={packed}", *reads_prompts)
    indexed = {}
    for batch in training_batches(cell, data, World(), 0):
        for i, key in enumerate(batch.keys):
            indexed[batch.epochs[i], key] = (batch, i)
    compared = 0
    for batch in of_rank(*opened(f"data.stream={packed}/", *reads_prompts)):
        for i, key in enumerate(batch.keys):
            if (batch.epochs[i], key) in indexed:
                other, j = indexed[batch.epochs[i], key]
                for name in ("image_BCHW", "mask_BKHW", "label_B"):
                    assert torch.equal(getattr(batch, name)[i], getattr(other, name)[j])
                assert batch.conditions["spatial_prompts"][i] == other.conditions["spatial_prompts"][j]
                assert batch.conditions["attribute_prompts"][i] == other.conditions["attribute_prompts"][j]
                compared += 1
    assert compared >= 3 * len(data.train)


# --- validation -------------------------------------------------------------------------------------------------


def test_ranks_stream_the_validation_part_once_between_them(opened, packed):
    cell, data = opened(f"data.stream={packed}/", "evaluate.batch_size=2")
    for size in (1, 2, 3, 7):
        shares = [validation_batches(cell, data, "none", World(rank=rank, size=size)) for rank in range(size)]
        keys = [key for share in shares for batch in share for key in batch.keys]
        assert sorted(keys) == sorted(record.key for record in data.validation)


@pytest.mark.parametrize("prompts", ["oracle", "first_pass", "none"])
def test_streamed_validation_equals_the_indexed_one(opened, packed, prompts):
    streamed = list(validation_batches(*opened(f"data.stream={packed}/"), prompts, World()))
    assert_same(streamed, list(validation_batches(*opened(f"data.root={packed}"), prompts, World())))


# --- what goes wrong --------------------------------------------------------------------------------------------


def first_shard(cell: CellConfig, data: FoldData) -> tuple[str, str]:
    """The first shard that a single lane reads, and the first of its training samples in the tar."""
    shards: dict[str, list[Record]] = {}
    for record in data.train:
        shards.setdefault(record.shard, []).append(record)
    lanes = Lanes(sizes=tuple(map(len, shards.values())), count=1, seed=cell.seed)
    file = list(shards)[next(lanes.pieces(0, 0, 1)).shard]
    return file, shards[file][0].key


def pack_again(tar: Path, change) -> None:
    """Rewrite a tar with `change` applied to its list of (header, content)."""
    with tarfile.open(tar) as old:
        members = [(header, old.extractfile(header).read()) for header in old.getmembers()]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for header, content in change(members):
            new.addfile(header, io.BytesIO(content))


def test_a_url_that_nobody_answers_is_named_after_a_few_tries(opened, local, monkeypatch):
    tries = []
    monkeypatch.setattr(stream_read, "gopen", lambda url, mode: tries.append(url) or gopen(url, mode))
    cell, data = opened(f"data.stream={local}/", "loader.lanes=1")
    with pytest.raises(DataError, match=r"shard \S+ with sample 'phantom\d+' cannot be read from \S+\.tar \(tried 4"):
        of_rank(cell, data)
    file, _ = first_shard(cell, data)
    assert tries.count(f"{local}/{file}") == 4


def test_a_refused_connection_is_an_error_that_names_the_commands_status(opened, server):
    server.shutdown()
    server.server_close()
    cell, data = opened(f"data.stream={server.url}", "loader.lanes=1")
    with pytest.raises(DataError, match=rf"cannot be read from {server.url}.*ended with status 7"):
        of_rank(cell, data)


def test_a_scheme_that_cannot_be_opened_is_refused_at_once(opened):
    cell, data = opened("data.stream=gopher://host/", "loader.lanes=1")
    with pytest.raises(DataError, match=r"data.stream=gopher://host/ cannot be opened"):
        of_rank(cell, data)


def test_transfers_that_break_off_are_begun_again_and_nothing_is_lost(opened, packed, server):
    server.broken = 2
    assert_same(of_rank(*opened(f"data.stream={server.url}")), of_rank(*opened(f"data.stream={packed}/")))
    assert server.broken == 0


def test_a_command_that_fails_is_named_with_its_status(opened):
    cell, data = opened("data.stream=pipe:exit 3; ", "loader.lanes=1")
    with pytest.raises(DataError, match="the command that reads it ended with status 3"):
        of_rank(cell, data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_is_named_with_the_first_sample_that_is_cut(opened, remote, workers):
    cell, data = opened(f"data.stream={remote}/", "loader.lanes=1" if workers == 0 else f"loader.workers={workers}")
    for shard in data.manifest.shards:
        (remote / shard.file).write_bytes((remote / shard.file).read_bytes()[:700])
    with pytest.raises(DataError) as refused:
        of_rank(cell, data)
    said = str(refused.value)
    assert f"{remote}/" in said
    assert "ends after 700 of " in said
    assert "before the end of phantom" in said
    assert "Traceback" not in said


def swapped(members):
    return [*members[3:6], *members[:3], *members[6:]]


@pytest.mark.parametrize("change", [swapped, lambda members: members[1:], lambda members: members[3:]])
def test_a_sample_that_is_missing_or_elsewhere_is_named_with_what_stands_in_its_place(opened, remote, change):
    cell, data = opened(f"data.stream={remote}/", "loader.lanes=1")
    file, _ = first_shard(cell, data)
    pack_again(remote / file, change)
    with pytest.raises(DataError, match=rf"shard {file} at {remote}/{file} differs from the manifest: it has .*"):
        of_rank(cell, data)


def test_a_single_changed_byte_reaches_no_batch(opened, remote):
    cell, data = opened(f"data.stream={remote}/", "loader.lanes=1")
    file, _ = first_shard(cell, data)
    content = bytearray((remote / file).read_bytes())
    content[-1] ^= 1
    (remote / file).write_bytes(content)
    with (
        contextlib.closing(training_batches(cell, data, World(), 0)) as batches,
        pytest.raises(DataError, match=rf"shard {file} .* SHA-256 differs"),
    ):
        next(batches)


def test_a_lesion_that_vanishes_at_the_networks_size_is_named(opened, packed):
    cell, data = opened(f"data.stream={packed}/")
    cell = dataclasses.replace(cell, model=ModelConfig(image_size=2))  # no model takes so small an image
    with pytest.raises(DataError, match=r"the lesion of phantom\d+ .* vanishes at model.image_size=2"):
        of_rank(cell, data)


def test_an_image_that_is_no_png_is_named_though_its_tar_is_what_the_manifest_says(opened, remote):
    cell, data = opened(f"data.stream={remote}/")
    record = data.train[0]
    tar = remote / record.shard
    content = bytearray(tar.read_bytes())
    content[record.image_offset + 40 : record.image_offset + record.image_bytes] = bytes(record.image_bytes - 40)
    tar.write_bytes(content)
    shards = [
        dataclasses.replace(shard, sha256=sha256_of(tar)) if shard.file == tar.name else shard
        for shard in data.manifest.shards
    ]
    manifest = dataclasses.replace(data.manifest, shards=shards)
    with pytest.raises(DataError, match=rf"The image of '{record.key}' in .*{tar.name} is not a readable PNG"):
        of_rank(cell, dataclasses.replace(data, manifest=manifest))


def test_no_shell_sees_a_shard_name_that_could_be_a_command(opened, tmp_path):
    cell, data = opened("data.stream=pipe:cat ")
    owned = tmp_path / "owned"
    evil = f"x;touch {owned}"
    manifest = Manifest(
        **{
            **{f.name: getattr(data.manifest, f.name) for f in dataclasses.fields(Manifest)},
            "shards": [ShardInfo(file=evil, sha256="", bytes=1, samples=len(data.train))],
        }
    )
    train = [dataclasses.replace(record, shard=evil) for record in data.train]
    with pytest.raises(DataError, match="a name may have letters, digits"):
        of_rank(cell, dataclasses.replace(data, manifest=manifest, train=train))
    assert not owned.exists()


# --- what is left behind ----------------------------------------------------------------------------------------


def sleepers(seconds: str) -> list[str]:
    """Every live process that is `sleep <seconds>`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes() == f"sleep\0{seconds}\0".encode():
                found.append(folder.name)
    return found


def children() -> set[str]:
    """Processes that this one started and that still run, or were not waited for."""
    return {child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()}


def wait_for(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 1])
def test_closing_ends_a_command_that_hangs_and_all_that_it_started(opened, packed, tmp_path, workers):
    # The first shard comes; the second one's command waits for ever, in a pipeline of two processes.
    seconds = f"98765{tmp_path.stat().st_ino}{workers}"
    hanging = f"pipe:mkdir {tmp_path}/first 2> /dev/null || sleep {seconds} | cat; cat {packed}/"
    overrides = (f"data.stream={hanging}", "loader.lanes=1", "train.batch_size=1", "model.image_size=64")
    overrides += (f"loader.workers={workers}",)
    before = children()
    batches = training_batches(*opened(*overrides), World(), 0)
    next(batches)
    wait_for(lambda: sleepers(seconds))
    batches.close()
    wait_for(lambda: not sleepers(seconds))
    assert children() == before


# --- before anything is queued ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        (("loader.lanes=3",), "1, 2, 4, 8"),
        (("loader.lanes=16",), "1, 2, 4, 8"),
        (("loader.lanes=2", "cluster.ranks_per_node=4"), "4, 8"),
    ],
)
def test_lanes_that_cannot_be_shared_evenly_are_refused_with_those_that_can(opened, overrides, allowed):
    with pytest.raises(ConfigError, match=rf"loader.lanes=\d+ with data.stream: .* here that allows {allowed}$"):
        opened("data.stream=https://host/", *overrides)
    opened(*overrides)  # without a stream there are no lanes to share


def test_lanes_determine_the_result_of_a_stream_and_its_address_does_not(opened):
    def hash_of(*overrides: str) -> str:
        return opened(*overrides)[0].hash

    assert hash_of("data.stream=https://a/") == hash_of("data.stream=https://b/")
    assert hash_of("data.stream=https://a/") != hash_of("data.stream=https://a/", "loader.lanes=2")
    assert hash_of("data.stream=https://a/") != hash_of()
    assert hash_of() == hash_of("loader.lanes=2")


def test_a_local_prefix_is_made_absolute_as_jobs_run_elsewhere(opened, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert opened("data.stream=tars/")[0].data.stream == f"{tmp_path}/tars/"
    assert opened("data.stream=pipe:cat tars/")[0].data.stream == "pipe:cat tars/"


def test_cells_are_made_from_manifest_and_folds_alone_once_the_first_shard_answers(opened, packed, server):
    cell, _ = opened(f"data.stream={server.url}")
    assert list(cv_plan(dataclasses.replace(cell, fold=None)).cells) == [f"fold{k}" for k in range(5)]
    assert len(server.asked) == 1
    cell, _ = opened(f"data.stream={packed}")  # the user forgot the slash
    with pytest.raises(DataError, match="so a folder must end with '/'"):
        cv_plan(dataclasses.replace(cell, fold=None))


def test_tars_of_another_packing_are_refused_before_anything_is_queued(opened, tmp_path):
    other = tmp_path / "other"
    pack("phantom", None, other, shard_samples=4, parameters={"count": 22, "height": 64, "width": 96})
    cell, _ = opened(f"data.stream={other}/")
    with pytest.raises(DataError, match=r"differs from the manifest: it has '.*' where the manifest has phantom"):
        cv_plan(dataclasses.replace(cell, fold=None))
