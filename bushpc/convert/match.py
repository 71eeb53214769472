"""Which tensor of a file becomes which tensor of a model.

    names and shapes of both ─match→ target name → source name, what stays unmatched, how much that is

First names are compared as they are and with one prefix exchanged for another (`module.`, `image_encoder.` →
`net.encoder.`). Only where too little fits is the order compared: two implementations of one network define its layers
in the same order, so shapes and the last part of every name (weight, bias, running_mean) have to agree one by one.
"""

from __future__ import annotations

import math
import re
import typing as t
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# A counter of batches, which many files leave out and no prediction needs.
COUNTER = "num_batches_tracked"
# A prefix counts if this share of the tensors have it.
LEAST_COVERED = 0.03
# Tensors at the end of a network that may differ when order is compared: weight and bias of a classifier.
HEAD = 2
# Prefix tokens before the patches' positions: none, CLS, CLS and distillation, CLS and registers.
TOKENS = (0, 1, 2, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Match:
    """A file's tensors placed in a model.

    how: `name`, `prefix` or `order`. strip, add: the prefix of the file's names, and the model's in its place.
    source_of: name in the model → name in the file. reshaped: name in the model → what is done to the shape.
    unused: names in the file without a place. part: prefix of the part of the model that was filled; empty is all of
    it. missing: names in that part that got nothing.
    share_of_file, share_of_part: of the numbers in the file (without a classifier at its end) and in the part.
    """

    how: str
    strip: str
    add: str
    source_of: dict[str, str]
    reshaped: dict[str, str]
    unused: list[str]
    part: str
    missing: list[str]
    share_of_file: float
    share_of_part: float

    @property
    def share(self) -> float:
        """The smaller share: low if much of the file has no place, or much of the part gets nothing."""
        return min(self.share_of_file, self.share_of_part)


def match(source: Shapes, target: Shapes, *, encoder: str = "", least: float = 0.0) -> Match:
    """The best match of a file's tensors with a model's.

    source, target: names and shapes in the order of definition. encoder: prefix of the model's encoder, if it has one.
    least: order is compared only where names give a smaller share.
    """
    by_name = _by_name(source, target)
    if by_name.share >= least:
        return by_name
    return _by_order(source, target, encoder) or by_name


def reshaping(name: str, source: Shape, target: Shape) -> str | None:
    """What makes a tensor fit: "" if it fits as it is, a few words, or None if nothing does."""
    if source == target:
        return ""
    last = name.rpartition(".")[2].rpartition("/")[2]
    if last == "pos_embed" and _grids(source, target):
        return "positions interpolated"
    if last.startswith("rel_pos_") and len(source) == len(target) == 2 and source[1] == target[1]:
        return "relative positions interpolated"
    if last == "weight" and len(source) == len(target) == 4 and source[0] == target[0] and source[2:] == target[2:]:
        if source[1] == 3 and target[1] == 1:
            return "3 channels summed to 1"
        if source[1] == 1 and target[1] == 3:
            return "1 channel divided among 3"
    return None


def _grids(source: Shape, target: Shape) -> bool:
    """Whether two position embeddings differ in their grids alone: 1 x h x w x C, or 1 x tokens x C."""
    if len(source) != len(target) or source[0] != target[0] or source[-1] != target[-1]:
        return False
    return len(source) == 4 or (len(source) == 3 and prefix_tokens(source[1], target[1]) is not None)


def prefix_tokens(source: int, target: int) -> int | None:
    """How many tokens come before the patches, if both counts are that many and a square."""
    return next((n for n in TOKENS if _is_square(source - n) and _is_square(target - n)), None)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


# --- by name ----------------------------------------------------------------------------------------------------


def _by_name(source: Shapes, target: Shapes) -> Match:
    strips, adds = _prefixes(source), _prefixes(target)
    rests: dict[str, list[str]] = defaultdict(list)
    for name in target:
        for add in _of(name, adds):
            rests[name.removeprefix(add)].append(add)
    placed: Counter[tuple[str, str]] = Counter()
    for name, shape in source.items():
        for strip in _of(name, strips):
            rest = name.removeprefix(strip)
            for add in rests.get(rest, ()):
                if reshaping(rest, shape, target[add + rest]) is not None:
                    placed[strip, add] += math.prod(shape) + 1
    # The shortest pair of those that place equally much; no exchange before any.
    strip, add = max(placed, key=lambda pair: (placed[pair], -len(pair[0]) - len(pair[1])), default=("", ""))
    source_of = {}
    for name in source:
        place = add + name.removeprefix(strip) if name.startswith(strip) else ""
        if place in target and reshaping(place, source[name], target[place]) is not None:
            source_of[place] = name
    return _result("prefix" if strip or add else "name", strip, add, source_of, source, target)


def _prefixes(names: t.Iterable[str]) -> set[str]:
    """Prefixes that enough names share, the empty one included."""
    names = list(names)
    counts = Counter(prefix for name in names for prefix in _all_prefixes(name))
    return {"", *(prefix for prefix, count in counts.items() if count >= max(2, LEAST_COVERED * len(names)))}


def _all_prefixes(name: str) -> list[str]:
    """`a.`, `a.b.` of `a.b.c`."""
    return [name[: found.end()] for found in re.finditer(r"[./]", name)]


def _of(name: str, known: set[str]) -> list[str]:
    return ["", *(prefix for prefix in _all_prefixes(name) if prefix in known)]


# --- by order ---------------------------------------------------------------------------------------------------


def _by_order(source: Shapes, target: Shapes, encoder: str) -> Match | None:
    """The part of the model whose tensors all, but a classifier's, agree with the file's one after the other."""
    ours = _ordered(source, "")
    found = {}
    for part in _prefixes(target):
        theirs = _ordered(target, part)
        run = _common(ours, theirs, source, target)
        if run and run >= len(theirs) - HEAD:
            found[part] = dict(zip(theirs[:run], ours[:run], strict=True))
    if not found:
        return None
    longest = max(len(pairs) for pairs in found.values())
    best = {part: pairs for part, pairs in found.items() if len(pairs) == longest}
    if encoder in best:
        best = {encoder: best[encoder]}
    if len({tuple(pairs) for pairs in best.values()}) > 1:  # two parts alike: nobody can tell which is meant
        return None
    part, pairs = max(best.items(), key=lambda each: len(each[0]))
    counters = _counters(pairs, source, target)
    return _result("order", "", part, pairs | counters, source, target)


def _ordered(names: Shapes, prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix) and not name.endswith(COUNTER)]


def _common(ours: Sequence[str], theirs: Sequence[str], source: Shapes, target: Shapes) -> int:
    """How many tensors agree from the start."""
    count = 0
    for our, their in zip(ours, theirs, strict=False):
        if source[our] != target[their] or our.rpartition(".")[2] != their.rpartition(".")[2]:
            break
        count += 1
    return count


def _counters(pairs: Mapping[str, str], source: Shapes, target: Shapes) -> dict[str, str]:
    """The batch counters beside matched running means."""
    found = {}
    for their, our in pairs.items():
        of_theirs, of_ours = (f"{name.rpartition('.')[0]}.{COUNTER}" for name in (their, our))
        if their.endswith("running_mean") and of_theirs in target and of_ours in source:
            found[of_theirs] = of_ours
    return found


# --- what it comes to -------------------------------------------------------------------------------------------


def _result(how: str, strip: str, add: str, source_of: dict[str, str], source: Shapes, target: Shapes) -> Match:
    used = set(source_of.values())
    unused = [name for name in source if name not in used]
    part = _common_prefix(list(source_of))
    missing = [name for name in target if name.startswith(part) and name not in source_of]
    head = set(_classifier(source, used))
    given = _count({name for name in source if name not in head}, source)
    wanted = _count({name for name in target if name.startswith(part)}, target)
    reshaped = {place: reshaping(place, source[name], target[place]) for place, name in source_of.items()}
    return Match(
        how=how,
        strip=strip,
        add=add,
        source_of=source_of,
        reshaped={place: words for place, words in reshaped.items() if words},
        unused=[name for name in unused if not name.endswith(COUNTER)],
        part=part,
        missing=[name for name in missing if not name.endswith(COUNTER)],
        share_of_file=_count(used, source) / max(1, given),
        share_of_part=_count(set(source_of), target) / max(1, wanted) if source_of else 0.0,
    )


def _classifier(source: Shapes, used: set[str]) -> list[str]:
    """The linear layer at the file's end, if it has no place: another task's labels."""
    last = [name for name in source if not name.endswith(COUNTER)][-HEAD:]
    of_linear = [name.rpartition(".")[2] for name in last] == ["weight", "bias"] and len(source[last[0]]) == 2
    return last if of_linear and not used & set(last) else []


def _count(names: set[str], shapes: Shapes) -> int:
    return sum(math.prod(shapes[name]) for name in names if not name.endswith(COUNTER))


def _common_prefix(names: Sequence[str]) -> str:
    """The longest prefix of whole name parts that all have in common."""
    if not names:
        return ""
    first = _all_prefixes(names[0])
    return next((prefix for prefix in reversed(first) if all(name.startswith(prefix) for name in names)), "")
