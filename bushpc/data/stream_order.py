"""The order of samples in a stream: lanes over shards, as pure arithmetic."""

from __future__ import annotations

import typing as t
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bushpc.dist import keyed_seed


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
