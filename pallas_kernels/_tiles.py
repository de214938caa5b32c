"""Tiles of tokens of one side, inside the attention kernels: whose they are, and what is common."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring
from pallas_kernels.attention_config import Config
from pallas_kernels.config import ROWS, SLICE


class Tile(NamedTuple):
    """Tokens of one side that are worked on together."""

    batch: Array
    head: Array  # the first one
    start: Array  # token


def walk(
    order: Any,
    config: Config,
    shape: tuple[int, int],
    body: Callable[[Tile, Array, Array], Array],
) -> Array:
    """`turn = body(tile, number, turn)` for the tiles of a program; `shape` is (heads, tokens)."""
    worker, (heads, tokens) = lax.axis_index("worker"), shape
    groups, tiles = heads // config.heads, tokens // config.rows

    def one(i, turn):
        at = order[worker + i * config.workers]
        of = lax.div(at, tiles)
        head, batch = lax.rem(of, groups) * config.heads, lax.div(of, groups)
        return body(Tile(batch, head, lax.rem(at, tiles) * config.rows), i, turn)

    return lax.fori_loop(0, share(order, config), one, jnp.int32(0))


def share(order: Any, config: Config) -> Array:
    """How many tiles a program has."""
    worker = lax.axis_index("worker")
    return lax.div(order.shape[0] - worker + config.workers - 1, config.workers)


class Walk(NamedTuple):
    """The steps of a tile, by a list: some for each block on the other side."""

    ptr: Any
    other: Any
    sides: tuple[int, int]  # of own and other blocks
    step: int
    heads: int

    def bounds(self, batch: Any, head: Any, start: Any) -> list[Array]:
        """Where the steps in full blocks begin, those in partial ones, and where both end."""
        block, cut = lax.div(start, self.sides[0]), self.sides[1] // self.step
        here = self.list(batch, head)
        return [self.ptr[here, 2 * block + i] * cut for i in range(3)]

    def token(self, batch: Any, head: Any, s: Any) -> Array:
        """The first on the other side of a step."""
        cut = self.sides[1] // self.step
        block = self.other[self.list(batch, head), lax.div(s, cut)]
        return block * self.sides[1] + lax.rem(s, cut) * self.step

    def list(self, batch: Any, head: Any) -> Any:
        lists = self.ptr.shape[0]
        return 0 if lists == 1 else head if lists == self.heads else batch * self.heads + head


def numbers(shape: tuple[int, ...], value: Any) -> Array:
    """All the same, where sums of products are, or one for each row."""
    layout: Any = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def rows(vector: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
    """One for each row (or column, with axis 1), for all of it."""
    return lax.broadcast_in_dim(vector, shape, (axis,))


def product(left: Any, right: Any, meanwhile: Callable[[], None] | None = None) -> Array:
    """`left @ right^T`, both in shared memory, and something to do before it is waited for."""

    def run(acc):
        plgpu.wgmma(acc, left, right.transpose((1, 0)))
        if meanwhile is not None:
            meanwhile()
        return acc[...]

    shape = left.shape[0], right.shape[0]
    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def write(sums: Array, staging: Any, out: Callable[[Any], Any]) -> None:
    """Rounds sums and starts writing them, a slice of columns after the other, to `out(columns)`."""
    slots = _ring.Slots(staging)
    width = slots.shape[1]
    for first in range(0, sums.shape[1], width):
        here = out(pl.ds(first, width))
        slots.put(
            sums[:, first : first + width],
            lambda slot, here=here: plgpu.copy_smem_to_gmem(slot, here),
        )


def memory(rows: int, head: int, dtype: Any, *many: int) -> Any:
    """Shared memory for tokens of a head."""
    return _ring.swizzled((*many, rows, head), math.gcd(SLICE, head), dtype)


def staging(config: Config, head: int, dtype: Any) -> Any:
    """Slices of output tiles, for each warpgroup."""
    columns = math.gcd(SLICE, head)
    return _ring.swizzled((config.warpgroups, config.slots, ROWS, columns), columns, dtype)
