"""Who may write a cell's folder: one job at a time. Rank 0 takes the lease before it reads anything, and asks again
before it seals anything.

<cell>/lease.<n>.json   names a holder; the one with the highest n holds, and dates the file anew every few seconds

File locks end at the node on many cluster file systems; names do not: to take the lease over is to create the file
n + 1, which every file system lets only one process do. A number is never used again while a later one exists, so a
slow taker that judged by an old state loses, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
import time
import typing as t
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bushpc.errors import ResumeError
from bushpc.process import machine, process_start
from bushpc.runs.layout import CellDir

RENEW_S = 5.0
TTL_S = 60.0
POLL_S = 0.5
LEFT = 0.0  # the date of a lease whose holder has left
NAME = re.compile(r"lease\.(\d+)\.json")


class ClusterJob(t.Protocol):
    """What a lease has to know of the job that its process runs in (bushpc.cluster.records.ThisJob)."""

    @property
    def id(self) -> str: ...

    @property
    def restarts(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process, as its lease names it.

    machine: the running kernel and process space, as host names repeat and outlive a reboot.
    process_start: with the id it names a process for good. job_id, restart: of the cluster's job, where it is in one.
    """

    host: str
    machine: str
    pid: int
    process_start: str | None
    job_id: str | None
    restart: int
    since: str

    @classmethod
    def this_process(cls, job: ClusterJob | None) -> Holder:
        return cls(
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            process_start=process_start(os.getpid()),
            job_id=job.id if job else None,
            restart=job.restarts if job else 0,
            since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    def is_dead(self, me: Holder) -> bool:
        """Whether it is certain that it has ended: an earlier start of my job, or a process of my machine."""
        if self.job_id is not None and self.job_id == me.job_id and self.restart < me.restart:
            return True
        return self.machine == me.machine and process_start(self.pid) != self.process_start

    def __str__(self) -> str:
        job = f"job {self.job_id}, " if self.job_id else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


class LeaseError(ResumeError):
    """Another job works on the cell, so nothing may be written below its folder, not even the reason for leaving."""

    code = "lease"
    cure = "Nothing: the other job works on the cell. `bushpc status` shows which; cancel one of both if it should not."


class StoppedWaiting(Exception):
    """Told to stop before the cell was ours. Caught where the lease is taken: nothing was begun."""


class Lease:
    """Context manager: while it is open, this process alone may write `folder`.

    Entering waits for a holder that may be dead, at most `ttl_s` seconds, and raises LeaseError for one that lives.
    A holder is dead when it has not renewed its lease for `ttl_s` seconds, by the dates of the files or by our own
    clock; at once when it was a process of this machine that has ended, or an earlier start of this very job.

    job: the cluster's job that this process runs in. renew_s: seconds between two renewals. stop: asked while it
    waits; StoppedWaiting is raised when it answers True.
    """

    def __init__(
        self,
        folder: Path,
        *,
        job: ClusterJob | None = None,
        renew_s: float = RENEW_S,
        ttl_s: float = TTL_S,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.renew_s, self.ttl_s, self.stop = folder, renew_s, ttl_s, stop
        self._me = Holder.this_process(job)
        self._number = 0
        self._left = threading.Event()
        self._renewer = threading.Thread(target=self._renew_until_left, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        while not self._number:
            newest = self._newest()
            if newest:
                self._wait_until_free(newest)
            self._number = self._create(newest + 1)
        for number in self._numbers():
            if number < self._number:
                self._path(number).unlink(missing_ok=True)
        self._renewer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        self._renewer.join(timeout=self.renew_s)  # it may hang in a file system that does; then so would the rest
        if not self._renewer.is_alive():
            # Dated back instead of deleted, so that the number stays used; and a full disk cannot keep us from it.
            with contextlib.suppress(OSError):  # taken over, or the whole folder is gone
                os.utime(self._path(self._number), (LEFT, LEFT))

    def check(self) -> None:
        """Raises: LeaseError if the lease was taken over, as happens to a process that was stopped for long.

        A file server that is away for a moment is asked again, for `ttl_s` seconds: others may take over by then.
        """
        deadline = time.monotonic() + self.ttl_s
        while True:
            try:
                return self._check()
            except FileNotFoundError:  # the whole folder is gone
                raise
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LeaseError(
                        f"whether {self.folder} is still this process's could not be found out for {self.ttl_s:g} s "
                        f"({error}). It ends here and saves nothing more; mend that and run the same command again"
                    ) from error
                time.sleep(POLL_S)

    def _check(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # deleted by whoever took over; the numbers say so
            os.utime(self._path(self._number))
        newest = self._newest()
        holder, _ = self._read(newest) or (None, 0.0)
        if newest != self._number or holder != self._me:
            raise LeaseError(
                f"{self.folder} belongs to {holder or 'another process'} now, because this one, {self._me}, was "
                f"stopped or could not reach the folder for {self.ttl_s:g} s. It ends here and saves nothing more"
            )

    def _wait_until_free(self, number: int) -> None:
        """Return when the holder is dead or has left.

        Raises: LeaseError when it renews, that is, lives; StoppedWaiting.
        """
        first, began = None, time.monotonic()
        while found := self._read(number):
            holder, renewed = found
            if renewed == LEFT or (holder and holder.is_dead(self._me)):
                return
            if first in (None, renewed):
                # Its date alone proves nothing: on Lustre, GPFS and BeeGFS the holder's own clock dates the file. One
                # that lives would have renewed it meanwhile.
                silent_s = time.monotonic() - began
                if silent_s > self.ttl_s or (silent_s > 2 * self.renew_s and self._age(renewed) > self.ttl_s):
                    return
            else:
                raise LeaseError(
                    f"another process works on {self.folder}: {holder or 'one that does not say who it is'}. This one "
                    "leaves it alone: wait for it, or end it (`bushpc cancel`) and submit again"
                )
            first = renewed
            if self.stop():
                raise StoppedWaiting(f"told to stop while {holder or 'an unknown process'} held {self.folder}")
            time.sleep(POLL_S)

    def _create(self, number: int) -> int:
        """`number` if its file could be created and is the newest, else 0."""
        try:
            with self._path(number).open("x") as file:
                json.dump(asdict(self._me), file)
        except FileExistsError:
            time.sleep(POLL_S)  # the other taker's file may not be in our view of the folder yet
            return 0
        if self._newest() == number:
            return number
        self._path(number).unlink(missing_ok=True)
        return 0

    def _renew_until_left(self) -> None:
        while not self._left.wait(self.renew_s):
            try:
                os.utime(self._path(self._number))
            except FileNotFoundError:
                return  # taken over: `check` tells the main thread
            except OSError:
                continue  # a file server that is away may come back

    def _read(self, number: int) -> tuple[Holder | None, float] | None:
        """(holder, when it last renewed by whatever clock dates its files); None if there is no such file."""
        try:
            # Opened, because a network file system may answer a plain stat from memory, a minute late.
            with self._path(number).open("rb") as file:
                renewed = os.fstat(file.fileno()).st_mtime
                content = file.read()
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(content)), renewed
        except (ValueError, TypeError, RecursionError):  # being written at this moment, or by someone who died in it
            return None, renewed

    def _age(self, renewed: float) -> float:
        """Seconds since `renewed`, by the clock that dates files of ours in `folder`; on NFS, the server's."""
        with tempfile.TemporaryFile(dir=self.folder, prefix=".now.") as probe:
            os.utime(probe.fileno())
            return os.fstat(probe.fileno()).st_mtime - renewed

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        return [int(match[1]) for name in os.listdir(self.folder) if (match := NAME.fullmatch(name))]

    def _path(self, number: int) -> Path:
        return CellDir(self.folder).lease(number)
