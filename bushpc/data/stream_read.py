"""Shards that arrive over a connection, read ahead; a sample counts only once its whole shard is verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import tarfile
import threading
import typing as t
from collections.abc import Iterator, Sequence

from webdataset.gopen import Pipe, gopen

from bushpc.errors import DataError
from bushpc.shards.manifest import Record, ShardInfo

# A gateway failover, an overloaded server or a killed reading command recovers within seconds. After 1 + 2 + 4 s of
# waiting, the source counts as down and the run fails.
TRIES = 4
BACKOFF_S = 1.0
# Time for a command to exit after the end of its output, before it is killed.
EXIT_S = 5.0
# How often a reader that waits for data checks whether it should stop.
POLL_S = 0.1
BLOCK = 1 << 20
Result = t.TypeVar("Result")


class Encoded(t.NamedTuple):
    """A sample from the stream: PNG bytes, verified to be the packer's."""

    epoch: int
    record: Record
    image_png: bytes
    mask_png: bytes


class LaneReader:
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
        self._here: Iterator[Encoded] = iter(())
        self._ahead = self._read_ahead()

    def __iter__(self) -> Iterator[Encoded]:
        return self

    def __next__(self) -> Encoded:
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
        self._connection = Connection()
        self._items: list[Encoded] = []
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._items = with_retries(self._stream, self._shard, self._records, self._connection, self._read)
        except Exception as error:  # raised again by `result` in the caller's thread
            self._error = error

    def result(self, closing: t.Callable[[], bool]) -> list[Encoded]:
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

    def _read(self, reading: _Reading) -> list[Encoded]:
        found = {}
        for record in sorted(self._records, key=lambda record: record.image_offset):
            found[record.key] = Encoded(self._epoch, record, reading.image(record), reading.mask(record))
        reading.finish()
        return [found[record.key] for record in self._records]


class Connection:
    """The open stream of a reading thread, which another thread can abort."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._file: t.Any = None

    @contextlib.contextmanager
    def open(self, url: str) -> Iterator[Connection]:
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


def with_retries(
    stream: str,
    shard: ShardInfo,
    records: Sequence[Record],
    connection: Connection,
    read: t.Callable[[_Reading], Result],
) -> Result:
    """`read` a shard from the start, and retry until it arrives completely.

    Raises: DataError after TRIES failures; at once if the content differs from the manifest or `connection` is stopped.
    """
    url = url_of(stream, shard)
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


def url_of(stream: str, shard: ShardInfo) -> str:
    # The name becomes part of a shell command, and the manifest may come from somebody else.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", shard.file):
        raise DataError(f"shard {shard.file!r} of the manifest: a name may have letters, digits, '.', '_' and '-' only")
    return stream + shard.file


class _Reading:
    """One sequential pass over a shard. Raises: OSError if it ends early, DataError if its content differs."""

    def __init__(self, connection: Connection, url: str, shard: ShardInfo) -> None:
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
