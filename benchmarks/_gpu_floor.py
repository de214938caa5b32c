"""The least time that a product can take on a GPU: its FLOPs, or its bytes, over a ceiling.

What decides for block-sparse products is how often tokens and weights are read through the L2
cache. An output tile of `tile x width` that walks the stored blocks of its column reads
`tile + width` numbers for `2 tile width` FLOPs; sharing makes that less. Block-columns side by side
in one program share the tokens of their union of stored rows, and a cluster of programs with the
same blocks gets them by one read ("multicast").
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax.patterns import reads_per_block

SIZE = 2  # bytes of a number
# what is left of the tensor cores' rate where a product is so narrow: one operand is read again
# from shared memory for each of its columns
NARROW = {8: 0.22, 16: 0.4, 32: 0.67}
SUMS = 2 * 128 * 128  # float32 numbers that two warpgroups can add to
TILES, COLUMNS, CLUSTERS = (64, 128, 256), (1, 2, 4, 8, 16), (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rates of a machine. These are an H200's: L2 as assumed, the others as once measured."""

    flops: float = 790e12  # of a dense bfloat16 product, a second
    memory: float = 4.3e12  # bytes of a copy, read and written, a second
    l2: float = 5.5e12  # bytes read through the L2 cache, a second
    measured: bool = False  # on the machine at hand, all of them


class Work(NamedTuple):
    """What a product has to do."""

    flops: float
    width: int  # columns of a product of the tensor cores
    l2: float  # bytes
    memory: float  # bytes


class Floor(NamedTuple):
    """Seconds, and which ceiling they come from."""

    seconds: float
    by: str


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """The largest of the times that each ceiling asks for."""
    rate = ceilings.flops * narrow(work.width)
    times = {
        "flops": work.flops / rate,
        "l2": work.l2 / ceilings.l2,
        "memory": work.memory / ceilings.memory,
    }
    by = max(times, key=lambda name: times[name])
    return Floor(times[by], by)


def narrow(width: int) -> float:
    """The share of the peak that products of so many columns reach."""
    return next((NARROW[most] for most in sorted(NARROW) if width <= most), 1.0)


class Sizes(NamedTuple):
    """A product: `n` tokens, features in and out, blocks (in, out) and how many are stored."""

    n: int
    shape: tuple[int, int]
    block: tuple[int, int]
    stored: int

    @property
    def flops(self) -> float:
        return 2.0 * self.n * self.stored * self.block[0] * self.block[1]

    @property
    def bytes(self) -> float:
        """Both matrices of tokens and the values, once each."""
        values = self.stored * self.block[0] * self.block[1]
        return SIZE * (self.n * sum(self.shape) + values)


def matmul(sizes: Sizes, tile: int, *, reads: float = 1.0, cluster: int = 1) -> Work:
    """Output tiles of `tile` rows, whose tokens are read `reads` times for each stored block: less
    than once where block-columns share them. Weights are shared by `cluster` programs."""
    n, _, (height, width), stored = sizes
    tokens = n * height * stored * reads
    weights = math.ceil(n / tile) * stored * height * width / cluster
    return Work(sizes.flops, width, SIZE * (tokens + weights), sizes.bytes)


def sddmm(sizes: Sizes, groups: int, *, cluster: int = 1) -> Work:
    """Stored blocks in `groups` that share a tile of y, or `cluster` programs that do."""
    n, _, (height, width), stored = sizes
    read = n * (height * stored + width * groups / cluster)
    return Work(sizes.flops, width, SIZE * read, sizes.bytes)


def dense(n: int, shape: tuple[int, int]) -> Work:
    """The dense product, of which only the FLOPs and the memory are asked."""
    (k, m) = shape
    return Work(2.0 * n * k * m, 256, 0.0, SIZE * (n * (k + m) + k * m))


def unions(mask: np.ndarray, columns: int) -> float:
    """Stored rows of so many neighbouring block-columns together, over those of one on average."""
    r, c = mask.shape
    whole = np.zeros((r, -(-c // columns) * columns), bool)
    whole[:, :c] = mask
    together = whole.reshape(r, -1, columns).any(-1).sum()
    return float(columns * together / max(1, mask.sum()))


def groups(mask: np.ndarray, most: int) -> int:
    """How many groups of at most `most` stored blocks of one block-column there are."""
    return int(np.sum(-(-mask.sum(0) // max(1, most))))


def launched(
    product: str, sizes: Sizes, mask: np.ndarray, tile: int, columns: int = 1, cluster: int = 1
) -> Work:
    """As kernels with such tiles do it: of so many `columns` side by side, those that store the
    same rows read them once, as `reads_per_block` counts, and a `cluster` reads weights once.
    `mask` is that of the product: transposed for dx."""
    if product == "dvalues":
        return sddmm(sizes, groups(mask, tile // sizes.block[0]))
    return matmul(sizes, tile, reads=reads_per_block(mask, columns), cluster=cluster)


def best(product: str, sizes: Sizes, mask: np.ndarray, ceilings: Ceilings) -> Floor:
    """The least over tiles and ways to share."""
    height, width = sizes.block
    works: list[Work] = []
    for tile in TILES:
        for cluster in CLUSTERS:
            if product == "dvalues" and tile * width <= SUMS:
                most = max(1, tile // height)
                works.append(sddmm(sizes, groups(mask, most), cluster=cluster))
            elif product != "dvalues":
                works += [
                    matmul(sizes, tile, reads=unions(mask, columns) / columns, cluster=cluster)
                    for columns in COLUMNS
                    if tile * columns * width <= SUMS
                ]
    return min((floor(work, ceilings) for work in works), key=lambda one: one.seconds)


def ceilings_from(
    records: Iterable[Mapping[str, Any]], names: Sequence[str] = ("flops", "memory", "l2")
) -> Ceilings:
    """The assumed ceilings, replaced by those that were measured: all of `names`, or it says so."""
    found = {one.get("ceiling"): one["value"] for one in records if one.get("value")}
    found = {name: found[name] for name in names if name in found}
    return Ceilings(**found, measured=len(found) == len(names))
