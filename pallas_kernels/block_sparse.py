"""x @ S and x @ S^T for a block-sparse S, from the same stored values.

One program on every multiprocessor, for the whole product. One warpgroup loads: it runs ahead over
a ring of stages, across output tiles, led by the lists of stored blocks. The others multiply. With
`Config.columns`, output blocks side by side share what is read of x where they store the same rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, _workers
from pallas_kernels.config import ROWS, SLICE, Config, interleaved
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.lists import Steps, parts

NONE = Epilogue()


def matmul(
    x: Array,
    values: Array,
    steps: Steps,
    config: Config,
    *operands: Array,
    blocks: int,
    transpose: bool = False,
    epilogue: Epilogue = NONE,
    out_dtype: Any,
) -> tuple[Array, ...]:
    """`y[n, o]`: each of so many output `blocks` is the sum of `x[:, source[i]] @ values[slots[i]]`
    over its steps (see `lists`), after the `epilogue` with its `operands`; and what that keeps.

    With `transpose`, stored blocks are multiplied transposed. `n` must be a multiple of
    `config.cluster` tiles, and there must be tokens, output blocks and at least one slot.
    """
    n = x.shape[0]
    width_in, width_out = values.shape[:0:-1] if transpose else values.shape[1:]
    rows = config.cluster * config.tile  # of an output tile, for all programs of a cluster
    groups, tiles = -(-blocks // config.columns), n // rows
    x_bytes, value_bytes = x.size * x.dtype.itemsize, values.size * values.dtype.itemsize
    strands = interleaved(tiles, groups, config.workers, x_bytes, value_bytes)
    order = _workers.Order(tiles, groups, strands)
    of_group = steps.ptr[:: len(parts(config.columns))] * (width_in // config.depth)
    starts = of_group + jnp.arange(groups + 1, dtype=jnp.int32)  # one more for each, to write
    starts = order.starts(starts)
    shares = _workers.shares(starts, order.each, config.workers, split=config.split)
    run = plgpu.kernel(
        functools.partial(
            _matmul,
            config=config,
            epilogue=epilogue,
            order=order,
            width_in=width_in,
            blocks=blocks,
            transpose=transpose,
        ),
        out_type=(
            *epilogue.outs(n, blocks * width_out, out_dtype),
            _workers.pieces(config, (rows, config.columns * width_out)),
        ),
        grid=(config.workers,),
        grid_names=("worker",),
        **(
            {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
            if config.cluster > 1
            else {}
        ),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
    )
    *outs, pieces = run(x, values, *steps, shares.spans, *operands)

    def write(tile, row, sums, outs, operands, staging, barriers):
        start = order.token(tile) * rows + row
        staging = _ring.Slots(staging)

        def one(sums, block):
            epilogue.write(sums, start, block, outs, operands, staging, barriers.at[0])

        _each(sums, order.group(tile), config.columns, blocks, one)

    scratch = epilogue.scratch(ROWS, width_out, out_dtype, 1, config.columns)
    return _workers.join(tuple(outs), pieces, shares, config, write, scratch, *operands)


def _each(sums: Array, group: Any, columns: int, blocks: int, write: Callable[..., None]) -> None:
    """`write(sums, block)` for each output block of a group; the last group may have fewer."""
    width = sums.shape[1] // columns
    for i in range(columns):
        block = group * columns + i
        one = functools.partial(write, sums[:, i * width : (i + 1) * width], block)
        pl.when(block < blocks)(one) if blocks % columns else one()


def _matmul(
    x,
    values,
    ptr,
    source,
    slots,
    spans,
    *rest,
    config: Config,
    epilogue: Epilogue,
    order: _workers.Order,
    width_in: int,
    blocks: int,
    transpose: bool,
):
    *rest, pieces = rest
    operands, outs = rest[: epilogue.operands], rest[epilogue.operands :]
    _, height, width = pieces.shape
    columns, width_out = config.columns, width // config.columns
    depth, tile = config.depth, config.tile
    rows, cut, kinds = tile // config.warpgroups, width_in // depth, parts(columns)
    worker, below, together = lax.axis_index("worker"), 0, None
    if config.cluster > 1:
        below, together = lax.axis_index("cluster") * tile, "cluster"

    def products(tile):
        first = order.group(tile) * len(kinds)
        return (ptr[first + len(kinds)] - ptr[first]) * cut

    def walk(body):
        return _workers.walk(spans, worker, lambda tile: products(tile) + 1, body)

    def spans_of(at: _workers.Piece):
        """For each kind of part, those of its steps that belong to a piece."""
        first = order.group(at.tile) * len(kinds)
        ends = [ptr[first + i] * cut for i in range(len(kinds) + 1)]
        begin, end = ends[0] + at.first, ends[0] + at.last
        for i, kind in enumerate(kinds):
            low, high = lax.max(begin, ends[i]), lax.min(end, ends[i + 1])
            yield kind, low, lax.max(low, high)

    def place(member):
        return pl.ds(member * width_out, width_out) if transpose else member

    def load(x_tiles, v_tiles, ring):
        def piece(at: _workers.Piece, turn):
            tokens = pl.ds(order.token(at.tile) * height + below, tile)
            for (first, width), low, high in spans_of(at):

                def step(s, turn, first=first, width=width):
                    i, start = lax.div(s, cut), lax.rem(s, cut) * depth
                    # read before waiting, so that waiting hides it
                    features = pl.ds(source[i] * width_in + start, depth)
                    members = [slots[first + k, i] for k in range(width)]
                    stage, full = ring.free(turn)
                    plgpu.copy_gmem_to_smem(x.at[tokens, features], x_tiles.at[stage], full)
                    for k, slot in enumerate(members):
                        own = pl.ds(start, depth)
                        block = values.at[slot, :, own] if transpose else values.at[slot, own]
                        to = v_tiles.at[stage, place(first + k)]
                        plgpu.copy_gmem_to_smem(block, to, full, collective_axes=together)
                    for _ in range(columns - width):
                        plgpu.barrier_arrive(full)
                    return turn + 1

                turn = lax.fori_loop(low, high, step, turn)
            return turn

        ring.drain(walk(piece))

    def multiply(x_tiles, v_tiles, ring, staging, barriers):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * rows, rows)

        def product(acc, stage, first, width):
            def add(first, width, block):
                sums = pl.ds(first * width_out, width * width_out)
                plgpu.wgmma(
                    acc.at[:, sums] if width < columns else acc, x_tiles.at[stage, mine], block
                )

            if transpose:  # one below the other
                there = pl.ds(first * width_out, width * width_out)
                add(first, width, v_tiles.at[stage, there].transpose((1, 0)))
                return
            for i in range(first, first + width):
                add(i, 1, v_tiles.at[stage, i])

        def piece(at: _workers.Piece, turn):
            runs = [
                _ring.Run(
                    high - low,
                    functools.partial(product, first=first, width=width),
                    1 if transpose else width,
                )
                for (first, width), low, high in spans_of(at)
            ]
            sums, turn = ring.sums(turn, (rows, width), runs)

            @pl.when(at.whole)
            def _():
                row = order.token(at.tile) * height + below + warpgroup * rows
                own = (_ring.Slots(staging.at[:, mine]), barriers.at[warpgroup])

                def one(sums, block):
                    epilogue.write(sums, row, block, tuple(outs), tuple(operands), *own)

                _each(sums, order.group(at.tile), columns, blocks, one)

            own = pl.ds(below + warpgroup * rows, rows)
            _workers.keep(sums, at, worker, pieces, own, config)
            return turn

        walk(piece)
        plgpu.wait_smem_to_gmem(0)

    # side by side blocks would have gaps between their rows, which no copy leaves
    block = (width, depth) if transpose else (columns, depth, width_out)
    swizzle = min(depth, width_out, SLICE)  # both operands want the same
    pl.run_scoped(
        lambda x_tiles, v_tiles, ring, scratch: _ring.roles(
            config.warpgroups,
            lambda: load(x_tiles, v_tiles, ring),
            lambda: multiply(x_tiles, v_tiles, ring, *scratch),
        ),
        _ring.swizzled((config.stages, tile, depth), swizzle, x.dtype),
        _ring.swizzled((config.stages, *block), swizzle, x.dtype),
        _ring.ring(config.stages, config.warpgroups, 1 + columns, config.cluster > 1),
        epilogue.scratch(tile, width_out, outs[0].dtype, config.warpgroups, columns, config.slots),
        collective_axes="warpgroup",
    )
