"""Whose scores a tile has, inside the attention kernels: what is added, masked and dropped."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._scores import LOG2E, Data, Scores
from pallas_kernels.config import ROWS

PART = 32  # columns that are masked at a time: as many as a word of a mask by slot has


class Spot(NamedTuple):
    """Where a tile of scores begins: row and column, and the slot and where in its block, if asked
    for."""

    row: Any
    column: Any
    slot: Any = None
    inside: tuple[Any, Any] | None = None

    def right(self, columns: int) -> "Spot":
        """So many columns on."""
        inside = self.inside and (self.inside[0], self.inside[1] + columns)
        return self._replace(column=self.column + columns, inside=inside)


@dataclasses.dataclass(frozen=True)
class Place:
    """Whose scores tiles are; with `flipped`, keys are rows. `ahead` was read before the loop."""

    spec: Scores
    batch: Any
    head: Any
    data: Data
    flipped: bool = False
    ahead: Any = None

    def of_rows(self, row: Any) -> "Place":
        """With what a dropout needs of queries that are rows, if there is one."""
        if self.spec.dropout is None:
            return self
        ahead = [vector(self._words(i), row, ROWS, 0) for i in range(2)]
        return dataclasses.replace(self, ahead=ahead)

    def scores(self, own: Array, at: Spot, partial: bool) -> Array:
        """Those of `Scores.of` with their bias, over `Scores.factor`, and -inf where one is
        forbidden, if the block is `partial`."""
        if not (partial or self.spec.biased):
            return own

        def one(part: Array, at: Spot) -> Array:
            if self.spec.biased:
                part = self._biased(part, at)
            return self._masked(part, at) if partial else part

        return _by_parts(own, at, one)

    def dropped(self, weights: Array, at: Spot | None, to: Callable[[Array], Any]) -> Array:
        """`weights`, and what `to` makes of those that are dropped."""
        dropout = self.spec.dropout
        if dropout is None or at is None:
            return weights

        def one(part: Array, at: Spot) -> Array:
            rows, columns = _indices(part.shape, at.row, at.column)
            key = rows if self.flipped else columns
            first, second = self._words_of(part.shape, at)
            kept = dropout.kept(first, second, key)
            return jnp.where(kept, part, to(part))

        return _by_parts(weights, at, one)

    def _words_of(self, shape: tuple[int, ...], at: Spot) -> list[Array]:
        if self.flipped:
            found = [vector(self._words(i), at.column, shape[1], 1) for i in range(2)]
        else:
            found = self.ahead
        return [lax.broadcast_in_dim(one, shape, (int(self.flipped),)) for one in found]

    def _words(self, which: int) -> Any:
        return self.data.words.at[which, self.batch, self.head]

    def _biased(self, scores: Array, at: Spot) -> Array:
        """In exponents of two."""
        scores = scores * self.spec.unit
        if self.spec.bias is not None:
            bias = self.spec.bias(self.head, *self._pairs(scores.shape, at))
            scores = scores + bias.astype(jnp.float32) * LOG2E
        if self.spec.numbers:
            own = self.data.numbers[self._slot(self.data.numbers, at)]
            scores = scores + own * LOG2E
        return scores

    def _pairs(self, shape: tuple[int, ...], at: Spot) -> tuple[Array, Array]:
        """Queries and keys."""
        rows, columns = _indices(shape, at.row, at.column)
        return (columns, rows) if self.flipped else (rows, columns)

    def _masked(self, scores: Array, at: Spot) -> Array:
        spec, data, conditions = self.spec, self.data, []
        query, key = self._pairs(scores.shape, at)
        if spec.mask is not None:
            conditions.append(spec.mask(self.head, query, key))
        if spec.keys is not None:
            conditions.append(key < spec.keys)
        if spec.lengths:
            conditions.append(key < data.lengths[self.batch])
        if spec.segments:
            ids = reversed(data.segments) if self.flipped else data.segments
            own, other = (
                lax.broadcast_in_dim(
                    vector(source.at[self.batch], start, scores.shape[axis], axis),
                    scores.shape,
                    (axis,),
                )
                for axis, (source, start) in enumerate(zip(ids, (at.row, at.column), strict=True))
            )
            conditions.append(own == other)
        for source in data.arrays:
            conditions.append(self._bits(source, scores.shape, at))
        for condition in conditions:
            scores = jnp.where(condition, scores, -math.inf)
        return scores

    def _bits(self, source: Any, shape: tuple[int, ...], at: Spot) -> Array:
        """Of a mask by slot, as words `[#n, #h, #e, #parts, #rows]` of `PART` columns each."""
        assert at.inside is not None
        parts, rows = source.shape[3:]
        part = lax.div(at.inside[1], PART) if parts > 1 else 0
        here = (*self._slot(source, at), part)
        if rows > 1:
            words = vector(source.at[here], at.inside[0], shape[0], 0)
            words = lax.broadcast_in_dim(words, shape, (0,))
        else:
            words = jnp.full(shape, source[(*here, 0)], jnp.int32)
            words = plgpu.layout_cast(words, plgpu.Layout.WGMMA)
        _, columns = _indices(shape, 0, 0)
        return lax.shift_right_logical(words, columns) & 1 != 0

    def _slot(self, source: Any, at: Spot) -> tuple[Any, Any, Any]:
        """The index of an array `[#n, #h, #e, ...]`."""
        where = zip((self.batch, self.head, at.slot), source.shape[:3], strict=True)
        return tuple(i if size > 1 else 0 for i, size in where)  # pyright: ignore


def _by_parts(tile: Array, at: Spot, one: Callable[[Array, Spot], Array]) -> Array:
    """`one(part, its spot)` for `PART` columns at a time."""
    parts: list[Array] = []
    for first in range(0, tile.shape[1], PART):
        part = tile[:, first : first + PART]
        if parts:  # one after the other, or registers run out
            parts[-1], part = lax.optimization_barrier((parts[-1], part))
        parts.append(one(part, at.right(first)))
    return jnp.concatenate(parts, axis=1)


def _indices(shape: tuple[int, ...], row: Any, column: Any) -> tuple[Array, Array]:
    """Of the rows and the columns of a tile that begins there."""
    few = shape[0], 8
    rows, columns = (
        plgpu.broadcasted_iota(jnp.int32, few, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    # or they are computed outside of the loop, and held in registers that are not there
    rows, columns = lax.optimization_barrier((rows, columns))
    starts = range(0, shape[1], few[1])
    return (
        jnp.concatenate([rows + row for _ in starts], axis=1),
        jnp.concatenate([columns + (column + start) for start in starts], axis=1),
    )


def vector(source: Any, start: Any, size: int, axis: int) -> Array:
    """From global memory, as a row (axis 0) or a column of it wants to be added to a tile."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return plgpu.load(source.at[pl.ds(start, size)], layout=layout, optimized=False)
