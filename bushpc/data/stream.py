"""Remote shards → batches: streams URLs and commands instead of local tars, for datasets too large to copy.

    manifest ─Lanes→ which samples, in which order ─_Lane→ their bytes, verified ─Preparation→ batches

Nothing is unpacked or stored: each rank reads the shards of its lanes from start to end once an epoch. The guarantees
are those of bushpc.data.loader: the global batch of a step depends only on seed, lanes and step; every sample is seen
exactly once an epoch; rank r takes positions r, r + ranks, r + 2·ranks … of the batch; and the step is the only
position to save. A sample is delivered only after its whole shard arrived with the SHA-256 in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import tarfile
import threading
import typing as t
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import Pipe, gopen

from bushpc.config import CellConfig
from bushpc.data.cache import fit
from bushpc.data.loader import FoldData, Preparation, in_workers, plain_preparation, training_preparation
from bushpc.dist import World, keyed_seed
from bushpc.errors import DataError
from bushpc.sample import Batch
from bushpc.shards.manifest import Manifest, Record, ShardInfo, decode_image, decode_mask

# A gateway failover, an overloaded server or a killed reading command recovers within seconds. After 1 + 2 + 4 s of
# waiting, the source counts as down and the run fails.
TRIES = 4
BACKOFF_S = 1.0
# Time for a command to exit after the end of its output, before it is killed.
EXIT_S = 5.0
# How often a reader that waits for data checks whether it should stop.
POLL_S = 0.1
BLOCK = 1 << 20


class Piece(t.NamedTuple):
    """Consecutive samples of a lane from one shard. picks: their indices in the shard's training samples, in order."""

    epoch: int
    shard: int
    picks: list[int]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The order of samples in the stream. Pure arithmetic; nothing is read.

    sizes: number of training samples per shard, all > 0. count: number of lanes (G). seed: of the run.

    An epoch concatenates the shards in an order drawn from (seed, epoch), with each shard's samples permuted in the
    same way, and is cut into G stretches. Lane l reads its stretches of epochs 0, 1, 2 … in sequence, and position p
    of the stream is position p // G of lane p % G. With N samples per epoch, lane l holds ceil((e·N - l) / G) samples
    before epoch e. So no lane is ahead of another by more than one sample, and epoch e is positions e·N to
    (e + 1)·N - 1 of the stream, as in the indexed loader.
    """

    sizes: tuple[int, ...]
    count: int
    seed: int

    @property
    def samples(self) -> int:
        """N, the samples per epoch."""
        return sum(self.sizes)

    def before(self, lane: int, epoch: int) -> int:
        """Number of samples of a lane before an epoch begins."""
        return -((lane - epoch * self.samples) // self.count)

    def pieces(self, lane: int, first: int, stop: int) -> Iterator[Piece]:
        """The pieces at positions `first` to `stop` (exclusive) of a lane."""
        while first < stop:
            epoch = (first * self.count + lane) // self.samples
            begin, end = self.before(lane, epoch), min(self.before(lane, epoch + 1), stop)
            stretch = sum(self.before(other, epoch + 1) - self.before(other, epoch) for other in range(lane))
            yield from self._between(epoch, stretch + first - begin, stretch + end - begin)
            first = end

    def _between(self, epoch: int, first: int, stop: int) -> Iterator[Piece]:
        """The pieces between two positions of an epoch."""
        passed = 0
        for shard in self._permutation(len(self.sizes), "shards", epoch):
            low, high = max(first - passed, 0), min(stop - passed, self.sizes[shard])
            if low < high:
                picks = self._permutation(self.sizes[shard], "shard", epoch, shard)[low:high]
                yield Piece(epoch, shard, picks)
            passed += self.sizes[shard]

    def _permutation(self, count: int, *key: int | str) -> list[int]:
        return np.random.default_rng(keyed_seed(self.seed, *key)).permutation(count).tolist()


def training_batches(cell: CellConfig, data: FoldData, world: World, start: int) -> Iterator[Batch]:
    """This rank's share of the global batches from step `start` to the end of training, streamed from `data.stream`.

    Closing the iterator ends worker processes, reading threads and their commands.
    Raises: DataError naming shard, URL and sample, if a shard cannot be read or differs from the manifest.
    """
    steps = _Steps(cell, data, world, start)
    workers = min(cell.loader.workers, len(steps.lanes))
    if workers == 0:
        with contextlib.closing(iter(steps)) as batches:
            yield from map(_unless_failed, batches)
        return
    # Workers are read in turn and deliver one part of each step, so `workers` consecutive parts are one step.
    parts = map(_unless_failed, in_workers(steps, workers))
    order = _order_of_parts(len(steps.lanes), workers, steps.per_lane)
    try:
        for _ in range(start, cell.train.iterations):
            yield _joined(list(itertools.islice(parts, workers)), order)
    finally:
        steps.closing.set()
        # End the workers now. Otherwise a traceback could keep them alive until the garbage collector runs, which
        # closes their queues before telling them to exit: torch then waits five seconds for each.
        del parts


def validation_batches(cell: CellConfig, data: FoldData, world: World, records: Sequence[Record]) -> Iterator[Batch]:
    """This rank's share of `records`, streamed.

    A share is contiguous, because neighbours are in the same shards. Raises: DataError, as `training_batches`.
    """
    mine = records[world.rank * len(records) // world.size : (world.rank + 1) * len(records) // world.size]
    prepare = plain_preparation(data)
    with contextlib.closing(_Lane(_stream_of(cell), ((0, *part) for part in _by_shard(data.manifest, mine)))) as lane:
        for first in range(0, len(mine), cell.evaluate.batch_size):
            size = min(cell.evaluate.batch_size, len(mine) - first)
            yield _batch(prepare, cell, [next(lane) for _ in range(size)])


def require_reachable(stream: str, manifest: Manifest) -> None:
    """Read the first sample of the first shard of `stream`, on the login node; all else is checked during training.

    Raises: DataError if that fails, or the sample differs from the manifest.
    """
    shard = manifest.shards[0]
    first = next(record for record in manifest.records if record.shard == shard.file)
    _with_retries(stream, shard, [first], _Connection(), lambda reading: (reading.image(first), reading.mask(first)))


# --- batches ----------------------------------------------------------------------------------------------------


class _Encoded(t.NamedTuple):
    """A sample from the stream: PNG bytes, verified to be the packer's."""

    epoch: int
    record: Record
    image_png: bytes
    mask_png: bytes


class _Steps(IterableDataset[t.Any]):
    """One part of this rank's batch for every step, from the lanes of this worker process.

    closing: when set, workers stop waiting for data.
    An error is yielded, not raised, because the DataLoader would wrap it in a traceback.
    """

    def __init__(self, cell: CellConfig, data: FoldData, world: World, start: int) -> None:
        self.cell, self.data, self.start = cell, data, start
        self.closing = multiprocessing.Event()
        self.prepare = training_preparation(cell, data)
        self.shards = _by_shard(data.manifest, data.train)
        self.lanes = list(range(world.rank, cell.loader.lanes, world.size))
        self.per_lane = cell.train.batch_size // cell.loader.lanes

    def __iter__(self) -> Generator[Batch | DataError, None, None]:
        worker = get_worker_info()
        mine = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        with contextlib.ExitStack() as closing:
            lanes = [closing.enter_context(contextlib.closing(self._lane(lane))) for lane in mine]
            for _ in range(self.start, self.cell.train.iterations):
                try:
                    items = [next(lane) for _ in range(self.per_lane) for lane in lanes]
                    yield _batch(self.prepare, self.cell, items)
                except DataError as error:
                    yield error
                    return

    def _lane(self, number: int) -> _Lane:
        sizes = tuple(len(records) for _, records in self.shards)
        lanes = Lanes(sizes=sizes, count=self.cell.loader.lanes, seed=self.cell.seed)
        first, stop = self.start * self.per_lane, self.cell.train.iterations * self.per_lane
        pieces = (
            (piece.epoch, self.shards[piece.shard][0], [self.shards[piece.shard][1][pick] for pick in piece.picks])
            for piece in lanes.pieces(number, first, stop)
        )
        return _Lane(_stream_of(self.cell), pieces, self.closing.is_set)


def _unless_failed(part: Batch | DataError) -> Batch:
    if isinstance(part, DataError):
        raise part
    return part


def _order_of_parts(lanes: int, workers: int, per_lane: int) -> list[int]:
    """The position of each sample of a rank's batch in the concatenation of its workers' parts."""
    widths = [len(range(worker, lanes, workers)) for worker in range(workers)]
    begins = [per_lane * sum(widths[:worker]) for worker in range(workers)]
    return [
        begins[lane % workers] + turn * widths[lane % workers] + lane // workers
        for turn in range(per_lane)
        for lane in range(lanes)
    ]


def _joined(parts: list[Batch], order: list[int]) -> Batch:
    """Concatenate batches, with the samples in `order`."""

    def join(values: list[t.Any]) -> t.Any:
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)[order]
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        items = [item for value in values for item in value]
        return [items[place] for place in order]

    names = [field.name for field in fields(Batch) if getattr(parts[0], field.name) is not None]
    return replace(parts[0], **{name: join([getattr(part, name) for part in parts]) for name in names})


def _batch(prepare: Preparation, cell: CellConfig, items: list[_Encoded]) -> Batch:
    """Decode the samples, and prepare them exactly as the indexed loader prepares rows of its cache."""
    fitted = []
    for _, record, image_png, mask_png in items:
        shard = cell.data.folder / record.shard  # for messages: only the manifest is in this folder
        image_HWC, mask_HW = decode_image(image_png, record, shard), decode_mask(mask_png, record, shard)
        fitted.append(fit(record.shard, record, image_HWC, mask_HW, cell.model.image_size))
    image_BSSC, mask_BSS = map(np.stack, zip(*fitted, strict=True))
    epochs = [item.epoch for item in items]  # also the turn, as a stream delivers each sample once an epoch
    return prepare(epochs, epochs, [item.record for item in items], image_BSSC, mask_BSS)


def _stream_of(cell: CellConfig) -> str:
    assert cell.data.stream, "only a cell with data.stream streams"
    return cell.data.stream


def _by_shard(manifest: Manifest, records: Iterable[Record]) -> list[tuple[ShardInfo, list[Record]]]:
    """Records by shard, in the order in which shards and records first appear."""
    shards = {shard.file: shard for shard in manifest.shards}
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(record.shard, []).append(record)
    return [(shards[file], members) for file, members in parts.items()]


# --- bytes ------------------------------------------------------------------------------------------------------


class _Lane:
    """Yields the samples of its pieces and prefetches the next piece meanwhile.

    So a lane holds the PNG bytes of at most two pieces, and a piece is at most one shard.
    """

    def __init__(
        self,
        stream: str,
        pieces: Iterator[tuple[int, ShardInfo, list[Record]]],
        closing: t.Callable[[], bool] = lambda: False,
    ) -> None:
        self._stream, self._pieces, self._closing = stream, pieces, closing
        self._here: Iterator[_Encoded] = iter(())
        self._ahead = self._read_ahead()

    def __iter__(self) -> Iterator[_Encoded]:
        return self

    def __next__(self) -> _Encoded:
        while (item := next(self._here, None)) is None:
            if self._ahead is None:
                raise StopIteration
            self._here = iter(self._ahead.result(self._closing))
            self._ahead = self._read_ahead()
        return item

    def close(self) -> None:
        """Stop reading; on return no thread or command is left."""
        if self._ahead:
            self._ahead.stop()

    def _read_ahead(self) -> _Fetch | None:
        piece = next(self._pieces, None)
        return None if piece is None else _Fetch(self._stream, *piece)


class _Fetch(threading.Thread):
    """A thread that reads and verifies one whole piece, or fails with one DataError. It starts at once."""

    def __init__(self, stream: str, epoch: int, shard: ShardInfo, records: list[Record]) -> None:
        super().__init__(name=f"fetch {shard.file}", daemon=True)
        self._stream, self._epoch, self._shard, self._records = stream, epoch, shard, records
        self._connection = _Connection()
        self._items: list[_Encoded] = []
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._items = _with_retries(self._stream, self._shard, self._records, self._connection, self._read)
        except Exception as error:  # raised again by `result` in the caller's thread
            self._error = error

    def result(self, closing: t.Callable[[], bool]) -> list[_Encoded]:
        """Wait for the samples, in the piece's order, unless `closing` becomes true."""
        while self.is_alive():
            self.join(POLL_S)
            if closing():
                self.stop()
        if self._error:
            raise self._error
        return self._items

    def stop(self) -> None:
        """Abort the read."""
        self._connection.stop()
        self.join(EXIT_S)

    def _read(self, reading: _Reading) -> list[_Encoded]:
        found = {}
        for record in sorted(self._records, key=lambda record: record.image_offset):
            found[record.key] = _Encoded(self._epoch, record, reading.image(record), reading.mask(record))
        reading.finish()
        return [found[record.key] for record in self._records]


class _Connection:
    """The open stream of a reading thread, which another thread can abort."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._file: t.Any = None

    @contextlib.contextmanager
    def open(self, url: str) -> Iterator[_Connection]:
        """Context manager of a connection. On exit it kills the command behind a pipe, unless we are killed first."""
        if url.startswith("pipe:"):
            # In a separate session, all processes of the command can be killed together, and a Ctrl-C or a TERM to the
            # ranks' process group does not reach them.
            self._file = Pipe(url.removeprefix("pipe:"), mode="rb", shell=True, start_new_session=True)
        else:
            self._file = gopen(url, "rb")
        try:
            yield self
        finally:
            self._kill()
            with contextlib.suppress(OSError):  # a killed command's exit status
                self._file.close()

    def read(self, count: int) -> bytes:
        """Read `count` bytes, or fewer at the end of the stream."""
        if self.stopped.is_set():
            return b""
        return (self._file.stream if isinstance(self._file, Pipe) else self._file).read(count)

    def exit_status(self) -> int:
        """Exit status of the command after the end of its output; 0 if there is no command."""
        if not isinstance(self._file, Pipe):
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            return int(self._file.proc.wait(EXIT_S))
        return 0

    def stop(self) -> None:
        """End `read` and all waits now. Called from another thread."""
        self.stopped.set()
        self._kill()

    def _kill(self) -> None:
        process = self._file.proc if isinstance(self._file, Pipe) else None
        if process and process.poll() is None:
            process.kill()
            with contextlib.suppress(ProcessLookupError):  # webdataset's curl has no process group of its own
                os.killpg(process.pid, signal.SIGKILL)


Result = t.TypeVar("Result")


def _with_retries(
    stream: str,
    shard: ShardInfo,
    records: Sequence[Record],
    connection: _Connection,
    read: t.Callable[[_Reading], Result],
) -> Result:
    """`read` a shard from the start, and retry until it arrives completely.

    Raises: DataError after TRIES failures; at once if the content differs from the manifest or `connection` is stopped.
    """
    url = _url(stream, shard)
    for failed in range(TRIES):
        if failed:
            connection.stopped.wait(BACKOFF_S * 2 ** (failed - 1))
        try:
            with connection.open(url):
                return read(_Reading(connection, url, shard))
        except ValueError as error:  # gopen raises it for an unknown scheme
            raise DataError(f"data.stream={stream} cannot be opened: {error}") from error
        except OSError as error:
            last = error
        if connection.stopped.is_set():
            break
    raise DataError(
        f"shard {shard.file} with sample '{records[0].key}' cannot be read from {url} (tried {TRIES} times with "
        f"pauses): {last}. The shard's name is appended to data.stream={stream} as is, so a folder must end with '/'"
    ) from last


def _url(stream: str, shard: ShardInfo) -> str:
    # The name becomes part of a shell command, and the manifest may come from somebody else.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", shard.file):
        raise DataError(f"shard {shard.file!r} of the manifest: a name may have letters, digits, '.', '_' and '-' only")
    return stream + shard.file


class _Reading:
    """One sequential pass over a shard. Raises: OSError if it ends early, DataError if its content differs."""

    def __init__(self, connection: _Connection, url: str, shard: ShardInfo) -> None:
        self._connection, self._url, self._shard = connection, url, shard
        self._position, self._digest = 0, hashlib.sha256()

    def image(self, record: Record) -> bytes:
        """The image of `record` as PNG."""
        return self._member(f"{record.key}.image.png", record.image_offset, record.image_bytes)

    def mask(self, record: Record) -> bytes:
        """The mask of `record` as PNG."""
        return self._member(f"{record.key}.mask.png", record.mask_offset, record.mask_bytes)

    def finish(self) -> None:
        """Read the rest, and compare size and SHA-256 of the whole shard with the manifest."""
        while self._position < self._shard.bytes:
            self._exactly(min(BLOCK, self._shard.bytes - self._position), "the end")
        if self._connection.read(1) or self._digest.hexdigest() != self._shard.sha256:
            raise self._altered(f"its size or SHA-256 differs ({self._shard.sha256} expected)")

    def _member(self, name: str, offset: int, length: int) -> bytes:
        header = offset - tarfile.BLOCKSIZE
        if header < self._position:
            raise self._altered(f"the manifest has {name} at byte {offset}, which overlaps the member before it")
        while self._position < header:
            self._exactly(min(BLOCK, header - self._position), name)
        found = self._exactly(tarfile.BLOCKSIZE, name)[:100].rstrip(b"\0").decode(errors="replace")
        if found != name:
            raise self._altered(f"it has {found!r} where the manifest has {name}")
        return self._exactly(length, name)

    def _exactly(self, count: int, name: str) -> bytes:
        content = self._connection.read(count)
        self._position += len(content)
        self._digest.update(content)
        if len(content) < count:
            status = self._connection.exit_status()
            raise OSError(
                f"it ends after {self._position} of {self._shard.bytes} bytes, before the end of {name}"
                + (f"; the command that reads it ended with status {status}" if status else "")
            )
        return content

    def _altered(self, what: str) -> DataError:
        return DataError(
            f"shard {self._shard.file} at {self._url} differs from the manifest: {what}. Upload tars and manifest "
            "from the same packing"
        )
