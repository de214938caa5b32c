"""Tiles of tokens of one side, inside the attention kernels: whose they are, and what is common.

A tile stays in shared memory while steps of the other side come and go, led by a list.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring
from pallas_kernels._place import Spot
from pallas_kernels.attention_config import Config
from pallas_kernels.config import ROWS, SLICE

REGISTERS = 32, 240  # of a thread that loads, and of one that multiplies


class Tile(NamedTuple):
    """Tokens of one side that are worked on together."""

    batch: Array
    head: Array  # the first one
    start: Array  # token


class Span(NamedTuple):
    """The steps of a tile by the list of one head: first those that need no mask."""

    head: Array
    begin: Array
    middle: Array
    end: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """What all tiles of a program do, and in which order."""

    config: Config
    order: Any
    ptr: Any
    other: Any
    slots: Any  # or None, where it does not matter in which slot a block is
    heads: int  # that have a list
    shape: tuple[int, int]  # (heads, tokens) of the tiles' side
    sides: tuple[int, int]  # of blocks on the tiles' side and on the other

    @property
    def parts(self) -> int:
        """Of a tile, each for one warpgroup, or for all of them."""
        return self.config.warpgroups // (1 + self.config.split)

    @property
    def cut(self) -> int:
        """Steps in a block."""
        return self.sides[1] // self.config.step

    def share(self) -> Array:
        """How many tiles a program has."""
        workers = self.config.workers
        left = self.order.shape[0] - lax.axis_index("worker")
        return lax.div(left + workers - 1, workers)

    def tiles(self, body: Callable[[Tile, Array], Array]) -> Array:
        """`turn = body(tile, turn)` for all of them."""
        config, (heads, tokens) = self.config, self.shape
        groups, tiles = heads // config.heads, tokens // config.rows

        def one(i, turn):
            at = self.order[lax.axis_index("worker") + i * config.workers]
            of = lax.div(at, tiles)
            head, batch = lax.rem(of, groups) * config.heads, lax.div(of, groups)
            return body(Tile(batch, head, lax.rem(at, tiles) * config.rows), turn)

        return lax.fori_loop(0, self.share(), one, jnp.int32(0))

    def part(self, tile: Tile, part: Any) -> tuple[Any, Any]:
        """Its head and first token."""
        across = self.parts // self.config.heads
        return tile.head + lax.div(part, across), tile.start + lax.rem(part, across) * ROWS

    def spans(self, tile: Tile, body: Callable[[Span, Any], Any], state: Any) -> Any:
        """`state = body(span, state)` for the lists of a tile: of each head that has its keys, if
        tiles are keys."""
        block, each = lax.div(tile.start, self.sides[0]), self.heads // self.shape[0]

        def one(i, state):
            head = tile.head * each + i
            ends = [self.ptr[self._list(tile, head), 2 * block + i] * self.cut for i in range(3)]
            # or the compiler takes the first step out of the loop, and runs out of registers
            return body(Span(head, *ends), lax.optimization_barrier(state))

        return lax.fori_loop(0, each, one, state) if each > 1 else one(jnp.int32(0), state)

    def steps(self, span: Span, masked: bool, body: Callable[..., Any], state: Any) -> Any:
        """`state = body(s, state, partial)` for all steps, where partial blocks are `masked`."""
        full, partial = (functools.partial(body, partial=which) for which in (False, True))
        if not masked:
            return lax.fori_loop(span.begin, span.end, full, state)
        state = lax.fori_loop(span.begin, span.middle, full, state)
        return lax.fori_loop(span.middle, span.end, partial, state)

    def token(self, tile: Tile, span: Span, s: Any) -> Array:
        """The first on the other side of a step."""
        block = self.other[self._list(tile, span.head), lax.div(s, self.cut)]
        return block * self.sides[1] + lax.rem(s, self.cut) * self.config.step

    def spot(self, tile: Tile, span: Span, s: Any, start: Any) -> Spot:
        """Where the scores of a step are, for the tokens from `start` on."""
        token = self.token(tile, span, s)
        if self.slots is None:
            return Spot(start, token)
        slot = self.slots[self._list(tile, span.head), lax.div(s, self.cut)]
        inside = lax.rem(start, self.sides[0]), lax.rem(s, self.cut) * self.config.step
        return Spot(start, token, slot, inside)

    def _list(self, tile: Tile, head: Any) -> Any:
        lists = self.ptr.shape[0]
        return 0 if lists == 1 else head if lists == self.heads else tile.batch * self.heads + head

    def load(
        self,
        residents: Sequence[tuple[Any, Any]],
        streams: Sequence[tuple[Sequence[Any], Sequence[Any], _ring.Ring]],
        ready: Any,
        free: Any,
    ) -> None:
        """All that the program needs: (source, memory) of what stays, (sources, memories, ring) of
        what comes and goes. Sources are `[n, tokens, heads, d]`, or `[n, heads, tokens]`."""

        def one(tile: Tile, turn):
            plgpu.barrier_wait(free)
            for part in range(self.parts):
                head, start = self.part(tile, jnp.int32(part))
                for source, to in residents:
                    own = source.at[tile.batch, pl.ds(start, ROWS), head]
                    plgpu.copy_gmem_to_smem(own, to.at[part], ready)

            def along(span: Span, turn):
                def step(s, turn):
                    tokens = pl.ds(self.token(tile, span, s), self.config.step)
                    for sources, to, ring in streams:
                        stage, full = ring.free(turn)
                        for source, own in zip(sources, to, strict=True):
                            here = source.at[tile.batch, span.head]
                            if len(source.shape) == 4:
                                head = lax.div(span.head, self.heads // source.shape[2])
                                here = source.at[tile.batch, :, head]
                            plgpu.copy_gmem_to_smem(here.at[tokens], own.at[stage], full)
                    return turn + 1

                return lax.fori_loop(span.begin, span.end, step, turn)

            return self.spans(tile, along, turn)

        turn = self.tiles(one)
        for _, _, ring in streams:
            ring.drain(turn)
        plgpu.barrier_wait(free)


def numbers(shape: tuple[int, ...], value: Any) -> Array:
    """All the same, where sums of products are, or one for each row."""
    layout: Any = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def rows(vector: Array, shape: tuple[int, ...]) -> Array:
    """One for each row, for all of it."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def columns(source: Any, shape: tuple[int, ...]) -> Array:
    """One for each column, for all of it, from shared memory that may be overwritten then."""
    own = plgpu.load(source, layout=plgpu.Layout.WGMMA.reduce(0))
    plgpu.commit_smem()
    return lax.broadcast_in_dim(own, shape, (1,))


def product(
    left: Any, right: Any, meanwhile: Callable[[], Any] = lambda: None
) -> tuple[Array, Any]:
    """`left @ right^T`, both in shared memory, and what `meanwhile()` returns, run beside it."""

    def run(acc):
        plgpu.wgmma(acc, left, right.transpose((1, 0)))
        other = meanwhile()
        return acc[...], other

    shape = left.shape[0], right.shape[0]
    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def write(sums: Array, slots: _ring.Slots, out: Callable[[Any], Any]) -> None:
    """Rounds sums and starts writing them by slices of columns, to `out(columns)`."""
    width = slots.shape[1]
    for first in range(0, sums.shape[1], width):
        here = out(pl.ds(first, width))
        slots.put(
            sums[:, first : first + width],
            lambda slot, here=here: plgpu.copy_smem_to_gmem(slot, here),
        )


def memory(config: Config, rows: int, head: int, dtype: Any, many: int) -> Any:
    """Shared memory for tokens of a head. A product sums over a step by so many at a time as there
    are columns in a swizzle, and all its operands want the same."""
    return _ring.swizzled((many, rows, head), math.gcd(SLICE, head, config.step), dtype)


def staging(config: Config, head: int, dtype: Any) -> Any:
    """Slices of output tiles, for each warpgroup."""
    columns = math.gcd(SLICE, head)
    return _ring.swizzled((config.warpgroups, config.slots, ROWS, columns), columns, dtype)
