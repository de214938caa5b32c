"""Batches of pairs of sentences of like length."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from models._parallel_text import BOS, EOS, PAD

ROUND = 4  # lengths of batches are multiples of it


class Batch(NamedTuple):
    """Pairs side by side, padded behind their ends. Rows beyond the pairs are empty."""

    source: np.ndarray  # int32 [n, s]
    lengths: np.ndarray  # int32 [n], of the sources
    target: np.ndarray  # int32 [n, 1 + t], BOS first and EOS last


@dataclasses.dataclass
class Batches:
    """All pairs once in each epoch, in batches of one of a few shapes.

    A pair's bucket depends on the longer of its sides; `edges` puts buckets apart. A batch has
    about `size` tokens on its longer side, padding included, and a number of rows that `multiple`
    divides. What is in a batch follows from the seed and the step alone.
    """

    source: Sequence[Sequence[int]]
    target: Sequence[Sequence[int]]
    size: int
    buckets: int = 4
    multiple: int = 1
    seed: int | None = 0  # None: in order

    def __post_init__(self) -> None:
        lengths = np.array([[len(s), len(t) + 1] for s, t in
                            zip(self.source, self.target, strict=True)]).reshape(-1, 2)  # fmt: skip
        longer = -(-lengths.max(1) // ROUND) * ROUND
        of = np.searchsorted(edges(longer, self.buckets), longer)
        self.members = [np.flatnonzero(of == i) for i in range(self.buckets)]
        self.members = [members for members in self.members if len(members)]
        self.shapes: list[tuple[int, int, int]] = []  # rows, s, t
        for members in self.members:
            s, t = (-(-max(1, int(side)) // ROUND) * ROUND for side in lengths[members].max(0))
            rows = max(1, self.size // max(s, t) // self.multiple) * self.multiple
            self.shapes.append((rows, s, t))
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] | None = None

    def reseed(self, seed: int) -> None:
        """Other batches from the same pairs."""
        self.seed, self._epoch = seed, None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(m) // s[0]) for m, s in zip(self.members, self.shapes, strict=True))

    def shape_counts(self, steps: int | None = None) -> dict[tuple[int, int, int], int]:
        """How many batches of so many steps (default: an epoch) have each shape (rows, s, t)."""
        planned = (
            self.plan(step // len(self))[step % len(self)][0] for step in range(steps or len(self))
        )
        return dict(collections.Counter(self.shapes[bucket] for bucket in planned))

    def plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(bucket, numbers of its pairs) of each batch of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
            planned = []
            for bucket, (members, (rows, _, _)) in enumerate(
                zip(self.members, self.shapes, strict=True)
            ):
                order = members if rng is None else rng.permutation(members)
                planned += [(bucket, order[i : i + rows]) for i in range(0, len(order), rows)]
            if rng is not None:
                planned = [planned[i] for i in rng.permutation(len(planned))]
            self._epoch = epoch, planned
        return self._epoch[1]

    def batch(self, step: int) -> Batch:
        """The batch of a training step."""
        bucket, chosen = self.plan(step // len(self))[step % len(self)]
        return self._padded(chosen, self.shapes[bucket])

    def once(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Every batch of the first epoch, with the numbers of its pairs."""
        for bucket, chosen in self.plan(0):
            yield chosen, self._padded(chosen, self.shapes[bucket])

    def _padded(self, chosen: np.ndarray, shape: tuple[int, int, int]) -> Batch:
        rows, s, t = shape
        source, target = np.full((rows, s), PAD, np.int32), np.full((rows, t + 1), PAD, np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, i in enumerate(chosen):
            one, other = self.source[i], [BOS, *self.target[i], EOS]
            source[row, : len(one)], target[row, : len(other)] = one, other
            lengths[row] = len(one)
        return Batch(source, lengths, target)


def edges(longer: np.ndarray, buckets: int) -> np.ndarray:
    """The greatest lengths of at most so many buckets: those with the least padding in all."""
    sides, counts = np.unique(longer, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: padded tokens of the pairs up to sides[j - 1], in the buckets so far
    cost, before = np.where(np.arange(len(sides) + 1) > 0, np.inf, 0.0), []
    for _ in range(min(buckets, len(sides))):
        last = sides[None] * (upto[None, 1:] - upto[:-1, None])  # of a bucket (i, j]
        ways = np.where(upto[:-1, None] < upto[None, 1:], cost[:-1, None] + last, np.inf)
        before.append(ways.argmin(0))
        cost = np.concatenate([[0.0], ways.min(0)])
    found, j = [], len(sides)
    for choices in reversed(before):
        if j:
            found.append(sides[j - 1])
            j = int(choices[j - 1])
    return np.array(found[::-1])
