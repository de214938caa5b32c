"""Which pixels the taps of a window read, one axis of space at a time: tables for the kernels.

    source pixel = stride * target pixel + dilation * tap - low

A pixel outside the source is a zero of the padding, and no step: no table lists it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Sizes of a convolution along one axis of space."""

    source: int
    target: int
    window: int
    stride: int = 1
    dilation: int = 1
    low: int = 0  # zeros before the first pixel of the source

    def sides(self, transpose: bool) -> tuple[int, int]:
        """Pixels that go in, and pixels that come out."""
        return (self.target, self.source) if transpose else (self.source, self.target)

    def triples(self) -> list[tuple[int, int, int]]:
        """All (target pixel, tap, source pixel) with a source pixel inside the image."""
        return [
            (q, t, p)
            for q in range(self.target)
            for t in range(self.window)
            if 0 <= (p := self.stride * q + self.dilation * t - self.low) < self.source
        ]


def reads(axis: Axis, transpose: bool) -> Array:
    """int32 [pixels out, 1 + 2 * window]: for each pixel that comes out how many taps it has, and
    each tap with the pixel that it reads."""
    _, out = axis.sides(transpose)
    rows: list[list[int]] = [[] for _ in range(out)]
    for q, t, p in axis.triples():
        rows[p if transpose else q] += [t, q if transpose else p]
    width = 1 + 2 * axis.window
    padded = [[len(row) // 2, *row, *[0] * (width - 1 - len(row))] for row in rows]
    return jnp.asarray(padded, jnp.int32)


class Pairs:
    """For each tap the pairs of a source and a target pixel that it joins, all inside the image.

    Without axes there is one tap, and one pixel.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes, self.taps = axes, math.prod(axis.window for axis in axes)
        met = [_met(axis) for axis in axes]
        places = (split(tap, [axis.window for axis in axes]) for tap in range(self.taps))
        runs = [[one[t] for one, t in zip(met, place, strict=False)] for place in places]
        self.counts = [math.prod(many for _, many, _ in run) for run in runs]  # for each tap
        self.rows = [
            [count, *(number for one in run for number in one)]
            for count, run in zip(self.counts, runs, strict=True)
        ]

    def table(self) -> Array:
        """What a kernel has to be given: for each tap how many, and for each axis `_met`."""
        return jnp.asarray(self.rows, jnp.int32)

    def count(self, table: Any, tap: Any) -> Any:
        """How many, inside a kernel."""
        return table[tap, 0] if self.axes else 1

    def at(self, table: Any, tap: Any, pair: Any) -> tuple[Any, Any]:
        """The source and the target pixel of a pair, flat."""
        source = target = 0
        if not self.axes:
            return source, target
        runs = [[table[tap, 1 + 3 * i + k] for k in range(3)] for i in range(len(self.axes))]
        along = split(pair, [many for _, many, _ in runs])
        for axis, (first, _, begin), k in zip(self.axes, runs, along, strict=True):
            source = source * axis.source + begin + axis.stride * k
            target = target * axis.target + first + k
        return source, target


def _met(axis: Axis) -> list[tuple[int, int, int]]:
    """For each tap: the first target pixel for which it is inside the source, how many there are
    (one after the other), and the source pixel of the first."""
    found = []
    for tap in range(axis.window):
        pairs = [(q, p) for q, t, p in axis.triples() if t == tap]
        first, source = pairs[0] if pairs else (0, 0)
        found.append((first, len(pairs), source))
    return found


def tables(axes: Sequence[Axis], transpose: bool) -> tuple[Array, ...]:
    """What a kernel has to be given."""
    return tuple(reads(axis, transpose) for axis in axes)


def split(index: Any, sizes: Sequence[Any]) -> list[Any]:
    """A flat index by axes, of which the last runs fastest."""
    parts = []
    for size in sizes[:0:-1]:
        parts.append(index % size if isinstance(index, int) else lax.rem(index, size))
        index = index // size if isinstance(index, int) else lax.div(index, size)
    return [index, *parts[::-1]]


def count(tables: Sequence[Any], pixel: Sequence[Any]) -> Any:
    """How many taps of a window are inside the image: for each axis a table of `reads`."""
    return math.prod(table[at, 0] for table, at in zip(tables, pixel, strict=True))


def each(
    tables: Sequence[Any],
    pixel: Sequence[Any],
    axes: Sequence[Axis],
    transpose: bool,
    body: Callable[[Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """`carry = body(tap, pixel that it reads, carry)` for every tap inside the image, both flat."""

    def along(i: int, tap: Any, source: Any, carry: Any) -> Any:
        if i == len(axes):
            return body(tap, source, carry)
        table, at, axis = tables[i], pixel[i], axes[i]
        into, _ = axis.sides(transpose)

        def one(u, carry):
            own = tap * axis.window + table[at, 1 + 2 * u]
            return along(i + 1, own, source * into + table[at, 2 + 2 * u], carry)

        return lax.fori_loop(0, table[at, 0], one, carry)

    return along(0, jnp.int32(0), jnp.int32(0), carry)
