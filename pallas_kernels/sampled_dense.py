"""The stored blocks of x^T y.

Stored blocks of one block-column share its tile of y: `Config.tile` rows of x^T at a time, so that
small blocks fill the tensor cores too. Workers cut the tokens where a share ends.

A product of the tensor cores has 64 rows. Blocks of 64 rows and more are read from x as it is, and
transposed on the way to the tensor cores. Smaller ones cannot be: no TMA copy puts two of them side
by side. They are read from a transposed copy of x, where one lies below the other.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, _workers
from pallas_kernels.config import ROWS, SLICE, Config
from pallas_kernels.windows import Axis, Pairs


def sddmm(
    x: Array,
    y: Array,
    row: Array,
    ptr: Array,
    config: Config,
    *,
    block: tuple[int, int],
    axes: tuple[Axis, ...] = (),
    table: Array | None = None,
    out_dtype: Any,
) -> Array:
    """`v[i] = x[:, row[i]]^T @ y[:, j]` for i in `ptr[j]..ptr[j + 1]`: `v[e, *block]`.

    With axes of space, and the `table` of their `Pairs`, x is `[n, source pixels * k]` and y
    `[n, target pixels * m]`, and `v[i, tap]` is the sum of that over the pairs of pixels of a tap:
    `v[e, taps, *block]`.

    Slots from `ptr[-1]` on hold anything. Tokens must be a multiple of `config.depth`,
    `config.tile` a multiple of the height of a block; there must be tokens and at least one slot.
    """
    height, width = block
    most = config.tile // height  # stored blocks in a group
    columns, e = ptr.shape[0] - 1, row.shape[0]
    groups, total = _groups(ptr, most, min(e, e // most + columns))
    pairs, chunks = Pairs(axes), x.shape[0] // config.depth
    group = jnp.arange(groups.shape[1] + 1, dtype=jnp.int32)
    if table is None:
        each, starts = chunks + 1, group * (chunks + 1)  # one more, to write
    else:
        ends = jnp.cumsum(chunks * table[:, 0] + 1, dtype=jnp.int32)
        each, before = ends[-1], ends - (chunks * table[:, 0] + 1)
        starts = (group[:-1, None] * each + before[None]).reshape((group.size - 1) * pairs.taps)
        starts = jnp.append(starts, group[-1] * each)
    shares = _workers.shares(starts, 1, config.workers, split=config.split, total=total * each)
    if height < ROWS:
        x = x.T
    run = plgpu.kernel(
        functools.partial(_sddmm, config=config, block=block, pairs=pairs),
        out_type=(
            jax.ShapeDtypeStruct((e * pairs.taps, *block), out_dtype),
            _workers.pieces(config, (config.tile, width)),
        ),
        grid=(config.workers,),
        grid_names=("worker",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
    )
    v, pieces = run(x, y, row, groups, shares.spans, *() if table is None else (table,))

    def write(tile, first_row, sums, outs, tables, staging):
        _write(sums, staging, outs[0], first_row, tables[0], tile, pairs.taps)

    scratch = (_staging(ROWS, width, out_dtype, 1),)
    (v,) = _workers.join((v,), pieces, shares, config, write, scratch, groups)
    return v.reshape(e, pairs.taps, *block) if axes else v


def _groups(ptr: Array, most: int, room: int) -> tuple[Array, Array]:
    """int32 [3, room]: first slot, slots and column of each group, and how many groups there are.

    The slots of a column are divided as evenly as groups of at most `most` allow.
    """
    counts = jnp.diff(ptr)
    of_column = -(-counts // most)
    ends = jnp.cumsum(of_column, dtype=jnp.int32)
    group = jnp.arange(room, dtype=jnp.int32)
    column = jnp.sum(ends[None] <= group[:, None], axis=1, dtype=jnp.int32)
    column = jnp.minimum(column, ptr.shape[0] - 2)
    i, n = group - (ends - of_column)[column], jnp.maximum(of_column[column], 1)
    first, last = (ptr[column] + k * counts[column] // n for k in (i, i + 1))
    return jnp.stack([first, last - first, column]).astype(jnp.int32), ends[-1]


def _sddmm(x, y, row, groups, spans, *rest, config: Config, block: tuple[int, int], pairs: Pairs):
    *tables, v, pieces = rest
    table = tables[0] if tables else None
    height, width = block
    depth, most, rows = config.depth, config.tile // height, config.tile // config.warpgroups
    narrow, wide = height < ROWS, min(height, ROWS)
    copies, chunks = height // wide, y.shape[0] // depth
    # of a pixel
    x_features, y_features = (
        size // math.prod(axis)
        for size, axis in (
            (x.shape[0 if narrow else 1], [axis.source for axis in pairs.axes]),
            (y.shape[1], [axis.target for axis in pairs.axes]),
        )
    )
    worker = lax.axis_index("worker")

    def steps_of(tile):
        return jnp.int32(chunks * pairs.count(table, lax.rem(tile, pairs.taps)))

    def walk(body):
        return _workers.walk(spans, worker, lambda tile: steps_of(tile) + 1, body)

    def load(x_tiles, y_tiles, ring):
        def piece(at: _workers.Piece, turn):
            group, tap = lax.div(at.tile, pairs.taps), lax.rem(at.tile, pairs.taps)
            first, count, column = (groups[k, group] for k in range(3))
            # once, not at every step: waiting for each would take longer than the copies
            starts = [row[first + lax.min(k, count - 1)] * height for k in range(most)]

            def step(s, turn):
                tokens = pl.ds(lax.rem(s, chunks) * depth, depth)
                x_pixel, y_pixel = pairs.at(table, tap, lax.div(s, chunks))
                features = pl.ds(y_pixel * y_features + column * width, width)
                stage, full = ring.free(turn)
                plgpu.copy_gmem_to_smem(y.at[tokens, features], y_tiles.at[stage], full)
                for i in range(most * copies):
                    k, part = divmod(i, copies)

                    @pl.when(k < count)
                    def _(i=i, k=k, part=part):
                        start = x_pixel * x_features + starts[k] + part * wide
                        if narrow:
                            source = x.at[pl.ds(start, wide), tokens]
                            target = x_tiles.at[stage, pl.ds(i * wide, wide)]
                        else:
                            source = x.at[tokens, pl.ds(start, wide)]
                            target = x_tiles.at[stage, i]
                        plgpu.copy_gmem_to_smem(source, target, full)

                    @pl.when(k >= count)
                    def _():
                        plgpu.barrier_arrive(full)

                return turn + 1

            return lax.fori_loop(at.first, lax.min(at.last, steps_of(at.tile)), step, turn)

        ring.drain(walk(piece))

    def multiply(x_tiles, y_tiles, ring, staging):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * rows, rows)

        def product(acc, stage):
            if narrow:
                plgpu.wgmma(acc, x_tiles.at[stage, mine], y_tiles.at[stage])
                return
            for m in range(rows // ROWS):
                left = x_tiles.at[stage, warpgroup * (rows // ROWS) + m]
                plgpu.wgmma(
                    acc.at[pl.ds(m * ROWS, ROWS)], left.transpose((1, 0)), y_tiles.at[stage]
                )

        def piece(at: _workers.Piece, turn):
            count = lax.max(lax.min(at.last, steps_of(at.tile)) - at.first, 0)
            run = _ring.Run(count, product, 1 if narrow else rows // ROWS)
            sums, turn = ring.sums(turn, (rows, width), [run])

            @pl.when(at.whole)
            def _():
                row = warpgroup * rows
                _write(sums, staging.at[:, mine], v, row, groups, at.tile, pairs.taps)

            _workers.keep(sums, at, worker, pieces, mine, config)
            return turn

        walk(piece)
        plgpu.wait_smem_to_gmem(0)

    swizzle = min(width, ROWS)
    x_tile = (config.tile, depth) if narrow else (config.tile // ROWS, depth, ROWS)
    pl.run_scoped(
        lambda x_tiles, y_tiles, ring, staging: _ring.roles(
            config.warpgroups,
            lambda: load(x_tiles, y_tiles, ring),
            lambda: multiply(x_tiles, y_tiles, ring, staging),
        ),
        _ring.swizzled((config.stages, *x_tile), swizzle, x.dtype),
        _ring.swizzled((config.stages, depth, width), swizzle, x.dtype),
        _ring.ring(config.stages, config.warpgroups, copies=most * copies + 1),
        _staging(config.tile, width, v.dtype, config.slots),
        collective_axes="warpgroup",
    )


def _staging(rows: int, width: int, dtype: Any, slots: int) -> Any:
    columns = min(SLICE, width)
    return _ring.swizzled((slots, rows, columns), columns, dtype)


def _write(sums, staging, v, first_row, groups, tile, taps) -> None:
    """Writes those rows of a group, from `first_row` on, that belong to stored blocks."""
    rows, height = sums.shape[0], v.shape[1]
    part = min(rows, height)
    group, tap = lax.div(tile, taps), lax.rem(tile, taps)
    first, count = groups[0, group], groups[1, group]

    def copy(slot, columns):
        for k in range(0, rows, part):
            i, start = lax.div(first_row + k, height), lax.rem(first_row + k, height)

            @pl.when(i < count)
            def _(k=k, i=i, start=start):
                to = v.at[(first + i) * taps + tap, pl.ds(start, part), columns]
                plgpu.copy_smem_to_gmem(slot.at[pl.ds(k, part)], to)

    slots = _ring.Slots(staging)
    for start in range(0, sums.shape[1], slots.shape[1]):
        columns = pl.ds(start, slots.shape[1])
        slots.put(sums[:, start : start + slots.shape[1]], functools.partial(copy, columns=columns))
