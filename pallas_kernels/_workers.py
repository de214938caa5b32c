"""Who computes what: all steps of all output tiles in a row, cut into equal parts.

An output tile takes as many steps as it has stored blocks, and one more to write it. A worker
takes an equal share of all steps, wherever the cuts fall: hub columns, few tokens and a number of
tiles that workers do not divide all cost their share and no more (Osama et al. 2023, "Stream-K").
Pieces of a tile that was cut are written as they are and added by `join`, always in the same order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import ROWS, Config

WHOLE = 2**31 - 1


class Shares(NamedTuple):
    """Tables for `workers`, and for the tiles that were cut."""

    spans: Array  # int32 [2 * workers, 4]: first tile, its first step, tiles, the last one's end
    joins: Array  # int32 [workers, 2]: tile, pieces after the first; a worker's last tile


def shares(
    starts: Array, tiles: int, workers: int, *, split: bool, total: Array | None = None
) -> Shares:
    """Cut columns of equal tiles among workers.

    Column `j` has `tiles` tiles of `(starts[j + 1] - starts[j]) / tiles` steps, more than none;
    those from step `total` on are left out. A worker's share is walked in two spans, so that all
    workers are at the start of a column at the same time: then they read the same tokens.
    """
    columns = starts.shape[0] - 1
    total = starts[-1] if total is None else total
    each = jnp.arange(workers + 1, dtype=jnp.int32)
    cuts = each * (total // workers) + jnp.minimum(each, total % workers)
    column = jnp.sum(starts[None, 1:] <= cuts[:, None], axis=1, dtype=jnp.int32)
    column = jnp.minimum(column, columns - 1)
    steps = (starts[column + 1] - starts[column]) // tiles
    offset = cuts - starts[column]
    tile = column * tiles + offset // steps
    inside = offset % steps
    if not split:  # a tile belongs to the worker in whose share it begins
        tile, inside = tile + _int(inside > 0), jnp.zeros_like(inside)
    cut = inside > 0
    first, last, begun, end = tile[:-1], tile[1:], _int(cut[:-1]), tile[1:] + _int(cut[1:])
    # the first column boundary in a share; tiles from there on come first
    turn = (first + begun + tiles - 1) // tiles * tiles
    turn = jnp.where(turn < end, turn, first)
    into = jnp.where(turn == first, inside[:-1], 0)
    ends = jnp.where(cut[1:], inside[1:], WHOLE)
    early = jnp.stack([turn, into, end - turn, ends], axis=1)
    late = jnp.stack([first, inside[:-1], turn - first, jnp.full_like(first, WHOLE)], axis=1)
    spans = jnp.stack([early, late], axis=1).reshape(2 * workers, 4)
    # a worker begins a tile that others end
    begins = cut[1:] & ((first != last) | ~cut[:-1])
    pieces = jnp.sum(cut[None] & (tile[None] == last[:, None]), axis=1, dtype=jnp.int32)
    joins = jnp.stack([last, jnp.where(begins, pieces, 0)], axis=1)
    return Shares(spans, joins)


def _int(a: Array) -> Array:
    return a.astype(jnp.int32)


class Order(NamedTuple):
    """In which order output tiles are numbered: those of a group of columns for every `strands`-th
    tile of tokens, then those of the next group; and all that again for the tiles in between.

    Workers walk equal shares of it side by side. With more strands fewer groups are under way at a
    time, so that a cache holds their weights, and all tokens are read more often.
    """

    tiles: int  # of tokens
    groups: int
    strands: int = 1

    @property
    def each(self) -> int:
        """Tiles of a group in a strand."""
        return self.tiles // self.strands

    def group(self, tile: Any) -> Array:
        return lax.rem(lax.div(tile, self.each), self.groups)

    def token(self, tile: Any) -> Array:
        """The tile of tokens."""
        strand = lax.div(tile, self.each * self.groups)
        return lax.rem(tile, self.each) * self.strands + strand

    def starts(self, steps: Array) -> Array:
        """From where the steps of each group begin for one tile to where they do in all strands."""
        strands = jnp.arange(self.strands, dtype=jnp.int32)[:, None] * steps[-1]
        starts = (strands + steps[None, :-1]).reshape(self.strands * self.groups)
        return jnp.append(starts, self.strands * steps[-1]) * self.each


class Piece(NamedTuple):
    """A part of one output tile, inside a kernel."""

    tile: Array
    first: Array  # step
    last: Array  # step
    whole: Array  # all steps of the tile, so that it can be written


def walk(
    spans: Any, worker: Array, steps_of: Callable[[Array], Array], body: Callable[..., Array]
) -> Array:
    """`turn = body(piece, turn)` for every piece of a worker's share, in order; the last turn."""

    def span(part, turn):
        row = 2 * worker + part
        begin, into, count, end = (spans[row, i] for i in range(4))

        def one(i, turn):
            tile = begin + i
            steps = steps_of(tile)
            first = lax.select(i == 0, into, 0)
            last = lax.select(i == count - 1, lax.min(end, steps), steps)
            return body(Piece(tile, first, last, (first == 0) & (last == steps)), turn)

        return lax.fori_loop(0, count, one, turn)

    return lax.fori_loop(0, 2, span, jnp.int32(0))


def pieces(config: Config, tile: tuple[int, int]) -> jax.ShapeDtypeStruct:
    """Room for the pieces of tiles: a worker ends one that others began, and begins one."""
    return jax.ShapeDtypeStruct((2 * config.workers if config.split else 1, *tile), jnp.float32)


def keep(sums: Array, at: Piece, worker: Array, pieces: Any, rows: Any, config: Config) -> None:
    """Inside a kernel: stores the sums of a tile that was cut."""
    if config.split:

        @pl.when(jnp.logical_not(at.whole))
        def _():
            pieces[2 * worker + lax.select(at.first == 0, 1, 0), rows, :] = sums


def join(
    outs: tuple[Array, ...],
    pieces: Array,
    shares: Shares,
    config: Config,
    write: Callable[..., None],
    scratch: tuple[Any, ...],
    *tables: Array,
) -> tuple[Array, ...]:
    """`outs` with the tiles that were cut, each the sum of its pieces in the order of workers.

    `write(tile, row, sums, outs, tables, *scratch)` starts writing `ROWS` rows of a tile.
    """
    if not config.split:
        return outs
    _, rows, _ = pieces.shape

    def kernel(*refs):
        outs, (pieces, joins), rest = refs[:many], refs[many : many + 2], refs[many + 2 :]
        tables, scratch = rest[: len(rest) - room], rest[len(rest) - room :]
        worker, part = lax.axis_index("worker"), lax.axis_index("part")

        def load(piece):
            own = pieces.at[piece, pl.ds(part * ROWS, ROWS), :]
            return plgpu.load(own, layout=plgpu.Layout.WGMMA, optimized=False)

        @pl.when(joins[worker, 1] > 0)
        def _():
            sums = lax.fori_loop(
                1,
                joins[worker, 1] + 1,
                lambda i, sums: sums + load(2 * (worker + i)),
                load(2 * worker + 1),
            )
            write(joins[worker, 0], part * ROWS, sums, outs, tables, *scratch)
            plgpu.wait_smem_to_gmem(0)

    many, room = len(outs), len(scratch)
    refs = tuple(jax.new_ref(out) for out in outs)  # written in place
    plgpu.kernel(
        kernel,
        grid=(config.workers, rows // ROWS),
        grid_names=("worker", "part"),
        scratch_types=scratch,
    )(*refs, pieces, shares.joins, *tables)
    return tuple(ref[...] for ref in refs)
