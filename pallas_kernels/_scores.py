"""What becomes of `q k^T` before the softmax: scale, cap and mask, inside the attention kernels.

Scores are kept in the units in which they come out of the tensor cores as long as nothing but a
positive scale is asked for: `exp2(s * factor - m)` is then one multiply-add before the exponential.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
PART = 32  # columns that are masked at a time

type Mask = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """`s = softcap * tanh(q k^T * scale / softcap)`, or -inf where something forbids it.

    `mask(head, q_index, k_index)`, on index arrays of equal shape, is traced into the kernels. Keys
    from `keys` on do not exist (they fill a last block), nor those from `lengths[n]` on; tokens of
    different `segments` do not see each other. All this is asked in partial blocks only.
    """

    scale: float
    softcap: float | None = None
    mask: Mask | None = None
    keys: int | None = None
    lengths: bool = False
    segments: bool = False

    @property
    def masked(self) -> bool:
        """Whether partial blocks differ from full ones."""
        data = self.lengths or self.segments or self.keys is not None
        return data or self.mask is not None

    @property
    def crowded(self) -> bool:
        """Whether they take many registers in partial blocks."""
        return self.segments or (self.masked and self.softcap is not None)

    @property
    def factor(self) -> float:
        """Of what `of` returns, to be the exponent of two."""
        if self.softcap is not None:
            return self.softcap * LOG2E
        return self.scale * LOG2E if self.scale > 0 else LOG2E

    def of(self, products: Array) -> Array:
        """Over `factor`, before anything is masked."""
        if self.softcap is not None:
            return _tanh(products * (self.scale / self.softcap))
        return products if self.scale > 0 else products * self.scale

    def slope(self, scores: Array) -> Array | float:
        """Of the scores by the products, over the `scale`; `scores` are those of `of`."""
        return 1.0 if self.softcap is None else 1 - scores * scores


@dataclasses.dataclass(frozen=True)
class Place:
    """Whose scores a tile has, inside a kernel; with `flipped`, keys are rows."""

    spec: Scores
    batch: Any
    head: Any
    limits: tuple[Any, ...]  # lengths, q_segments, k_segments: as far as there are
    flipped: bool = False

    def masked(self, scores: Array, row: Any, column: Any) -> Array:
        """`scores` of the tile that begins there, and -inf where they are forbidden."""
        parts: list[Array] = []
        for first in range(0, scores.shape[1], PART):
            part = scores[:, first : first + PART]
            if parts:  # one after the other, or registers run out
                parts[-1], part = lax.optimization_barrier((parts[-1], part))
            parts.append(self._masked(part, row, column + first))
        return jnp.concatenate(parts, axis=1)

    def _masked(self, scores: Array, row: Any, column: Any) -> Array:
        rows, columns = _indices(scores.shape, row, column)
        query, key = (columns, rows) if self.flipped else (rows, columns)
        spec, limits, conditions = self.spec, list(self.limits), []
        if spec.mask is not None:
            conditions.append(spec.mask(self.head, query, key))
        if spec.keys is not None:
            conditions.append(key < spec.keys)
        if spec.lengths:
            conditions.append(key < limits.pop(0)[self.batch])
        if spec.segments:
            ids = reversed(limits) if self.flipped else limits
            own, other = (
                lax.broadcast_in_dim(
                    vector(source.at[self.batch], start, scores.shape[axis], axis),
                    scores.shape,
                    (axis,),
                )
                for axis, (source, start) in enumerate(zip(ids, (row, column), strict=True))
            )
            conditions.append(own == other)
        for condition in conditions:
            scores = jnp.where(condition, scores, -math.inf)
        return scores


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


def _tanh(x: Array) -> Array:
    """By the exponential: the instruction for it has 11 bits."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2E)))
