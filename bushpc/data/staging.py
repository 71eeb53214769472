"""Shared folder → a disk of the node, once per node: shards, files of features, and a place for decoded images.

    cluster.staging ─place→ <place>/bushpc-stage-<user id>/
      lock                     held while copies are made or deleted; who comes second waits, and finds the copy
      <name>_<host>_<boot>/    a complete copy: verified, then renamed to this
        users                  locked (shared) by every process that reads the copy, until it ends
      cache/                   decoded images (bushpc.data.cache)

A place that does not exist or has no room is reported in one line, and the run then reads the shared folders.
Node-local folders are not always emptied after a job, so each job deletes copies that earlier ones left: those of an
earlier boot (a disk may then have names without their content), those that nobody has used for a day, and unused ones
where room is needed. Only folders of this user with such names are touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import socket
import time
import typing as t
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc.cluster.scratch import Unusable, place
from bushpc.config import CellConfig
from bushpc.data.cache import DecodingStopped, boot, is_idle, try_lock
from bushpc.data.feature_files import FeatureStore
from bushpc.data.loader import FoldData
from bushpc.data.room import places, room
from bushpc.errors import DataError
from bushpc.files import is_own_folder, sha256_of, size_text

BLOCK = 1 << 22
POLL_S = 0.2
UNUSED_S = 24 * 3600.0

# Copies that this process reads: they stay in use until it ends.
_users: list[t.IO[bytes]] = []


class Source(t.NamedTuple):
    """A file to be copied. sha256: what it must be; None where nobody has written it down."""

    path: Path
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Our folder on the node's disk. keep_going: called several times a second. say: takes a line for the log."""

    home: Path
    keep_going: Callable[[], bool]
    say: Callable[[str], None]

    @property
    def cache(self) -> Path:
        """The place for decoded images."""
        return self.home / "cache"

    def copy(self, name: str, sources: Sequence[Source]) -> Path | None:
        """The folder with a copy of these files; None, with a line in the log, if there is no room.

        Raises: DecodingStopped if `keep_going` returned False; DataError for a file that is not what it must be.
        """
        target = self.home / f"{name}_{_suffix()}"
        try:
            with self._locked():
                if not _is_complete(target, sources):
                    self._make(target, sources)
                users = (target / "users").open("rb+")
                fcntl.flock(users, fcntl.LOCK_SH)
                os.utime(target / "users")  # the last use
        except (OSError, Unusable) as error:
            self.say(f"not copied to the node: {error}; {name} is read from {sources[0].path.parent}")
            return None
        _users.append(users)
        return target

    def _make(self, target: Path, sources: Sequence[Source]) -> None:
        """Raises: Unusable, OSError."""
        needed = sum(source.bytes for source in sources)
        self._reclaim(target, needed)
        free = room(self.home)
        if free < needed:
            raise Unusable(f"{self.home} has room for {size_text(free)}, {size_text(needed)} are needed")
        aside = self.home / f".{target.name}"
        shutil.rmtree(target, ignore_errors=True)  # a cleaner of temporary folders deleted some of it
        shutil.rmtree(aside, ignore_errors=True)
        began = time.monotonic()
        try:
            aside.mkdir(mode=0o700)
            for source in sources:
                self._copy_file(source, aside / source.path.name)
            (aside / "users").touch()
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.say(f"copied {size_text(needed)} to {target} in {time.monotonic() - began:.1f} s")

    def _copy_file(self, source: Source, target: Path) -> None:
        digest = hashlib.sha256()
        with source.path.open("rb") as from_file, target.open("wb") as to_file:
            while block := from_file.read(BLOCK):
                if not self.keep_going():
                    raise DecodingStopped(f"{source.path} is being copied to {target}")
                digest.update(block)
                to_file.write(block)
        read, written = digest.hexdigest(), sha256_of(target)
        if source.sha256 not in (None, read):
            raise DataError(
                f"{source.path} is altered: its SHA-256 is {read}, the manifest has {source.sha256}. Restore it, or "
                f"run: bushpc pack data={source.path.parent.name} src=FOLDER"
            )
        if target.stat().st_size != source.bytes or written != read:
            raise Unusable(f"{target} is not what was copied to it")

    def _reclaim(self, target: Path, needed: int) -> None:
        """Delete what earlier jobs left here, under the lock: no copy can come into use meanwhile."""
        for aside in self.home.glob(f".*_{_host()}_*"):  # its maker held the lock, so it has died
            _delete(aside)
        idle = []
        for copy in self.home.glob(f"[!.]*_{_host()}_*"):
            if copy == target or not is_own_folder(copy) or not is_idle(copy):
                continue
            if copy.name.endswith(f"_{boot()}") and time.time() - _last_use(copy) < UNUSED_S:
                idle.append(copy)
            else:
                _delete(copy)
        for copy in sorted(idle, key=_last_use):
            if room(self.home) >= needed:
                break
            _delete(copy)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.home / "lock").open("ab") as lock:
            while not try_lock(lock):
                if not self.keep_going():
                    raise DecodingStopped(f"another process copies to {self.home}")
                time.sleep(POLL_S)
            yield


def open_stage(
    wanted: str | None,
    *,
    scratch: Sequence[str] = (),
    keep_going: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = print,
    environment: Mapping[str, str] = os.environ,
) -> Stage | None:
    """Our folder in the place that `cluster.staging` names; None, with a line in the log, if there is no such place.

    scratch: as in `place`.
    """
    if wanted is None:
        return None
    try:
        home = place(wanted, scratch, environment) / f"bushpc-stage-{os.getuid()}"
        try:
            home.mkdir(mode=0o700, exist_ok=True)
            if not is_own_folder(home) or home.stat().st_mode & 0o022:
                raise Unusable(f"{home} is a link, or others can write to it")
        except OSError as error:
            raise Unusable(f"{home} cannot be used ({error})") from error
    except Unusable as error:
        say(f"cluster.staging={wanted}: {error}; data is read from where it lies")
        return None
    return Stage(home=home, keep_going=keep_going, say=say)


def stage_shards(cell: CellConfig, data: FoldData, stage: Stage | None) -> tuple[CellConfig, FoldData]:
    """The same cell and data, read from the node's disk as far as they fit there.

    Features are still computed in the shared folder, where every node finds them. Raises: as Stage.copy.
    """
    if stage is None or cell.data.stream:
        return cell, data
    loader = dataclasses.replace(
        cell.loader,
        # The first one with room. A folder that the user named is used as it is.
        cache_dir=cell.loader.cache_dir or os.pathsep.join(map(str, (stage.cache, *places(cell.loader)))),
        features_dir=cell.loader.features_dir or str(data.folder / "features"),
    )
    # Synthetic scans carry their folder in the manifest, and are read from there.
    own = [shard for shard in data.manifest.shards if not Path(shard.file).is_absolute()]
    sources = [Source(data.folder / shard.file, shard.bytes, shard.sha256) for shard in own]
    folder = stage.copy(f"{data.manifest.dataset}-{data.manifest.hash[:16]}", sources)
    return dataclasses.replace(cell, loader=loader), dataclasses.replace(data, folder=folder or data.folder)


def stage_features(features: FeatureStore, files: Sequence[Path], stage: Stage | None) -> FeatureStore:
    """The same features, read from the node's disk if they fit there. files: of `features`, all of them complete."""
    if stage is None:
        return features
    copies = {}
    for folder in (features.plain, features.changed):
        sources = [Source(path, path.stat().st_size) for path in sorted(files) if path.parent == folder]
        if not sources:
            continue
        names = "\n".join(f"{source.path.name} {source.bytes}" for source in sources)
        content = hashlib.sha256(names.encode()).hexdigest()[:8]
        copies[folder] = stage.copy(f"features-{folder.parent.name}-{folder.name}-{content}", sources)
    return dataclasses.replace(
        features,
        plain=copies.get(features.plain) or features.plain,
        changed=copies.get(features.changed) or features.changed,
    )


def _host() -> str:
    return socket.gethostname()


def _suffix() -> str:
    return f"{_host()}_{boot()}"


def _is_complete(copy: Path, sources: Sequence[Source]) -> bool:
    """Whether the copy has all its files; it was verified before it got its name."""
    try:
        sizes = [(copy / source.path.name).stat().st_size for source in sources]
    except OSError:
        return False
    return sizes == [source.bytes for source in sources] and (copy / "users").exists()


def _last_use(copy: Path) -> float:
    with contextlib.suppress(OSError):
        return (copy / "users").stat().st_mtime
    return 0.0


def _delete(copy: Path) -> None:
    if is_own_folder(copy):
        shutil.rmtree(copy, ignore_errors=True)
