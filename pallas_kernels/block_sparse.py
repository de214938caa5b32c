"""x @ S and x @ S^T for a block-sparse S, from the same stored values.

One program on every multiprocessor, for the whole product. One warpgroup loads: it runs ahead over
a ring of stages, across output tiles, led by the lists of stored blocks. The others multiply.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, _workers
from pallas_kernels.config import ROWS, SLICE, Config
from pallas_kernels.epilogue import Epilogue

NONE = Epilogue()


def matmul(
    x: Array,
    values: Array,
    source: Array,
    slot: Array | None,
    ptr: Array,
    config: Config,
    *operands: Array,
    epilogue: Epilogue = NONE,
    out_dtype: Any,
) -> tuple[Array, ...]:
    """`y[n, o]`: output block j is the sum of `x[:, source[i]] @ values[i]` over i in
    `ptr[j]..ptr[j + 1]`, after the `epilogue` with its `operands`; and what that keeps.

    With `slot`, the stored block of `i` is the transpose of `values[slot[i]]`. `n` must be a
    multiple of `config.tile`, and there must be tokens, output blocks and at least one slot.
    """
    n = x.shape[0]
    width_in, width_out = values.shape[1:] if slot is None else values.shape[:0:-1]
    blocks, tiles = ptr.shape[0] - 1, n // config.tile
    parts = width_in // config.depth
    steps = ptr * parts + jnp.arange(blocks + 1, dtype=ptr.dtype)  # one more for each, to write
    shares = _workers.shares(steps * tiles, tiles, config.workers, split=config.split)
    run = plgpu.kernel(
        functools.partial(
            _matmul,
            config=config,
            epilogue=epilogue,
            width_in=width_in,
            transpose=slot is not None,
        ),
        out_type=(
            *epilogue.outs(n, blocks * width_out, out_dtype),
            _workers.pieces(config, (config.tile, width_out)),
        ),
        grid=(config.workers,),
        grid_names=("worker",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
    )
    *outs, pieces = run(
        x, values, source, source if slot is None else slot, ptr, shares.spans, *operands
    )

    def write(tile, row, sums, outs, operands, staging, barriers):
        start = lax.rem(tile, tiles) * config.tile + row
        block = lax.div(tile, tiles)
        epilogue.write(sums, start, block, outs, operands, staging, barriers.at[0])

    scratch = epilogue.scratch(ROWS, width_out, out_dtype, 1)
    return _workers.join(tuple(outs), pieces, shares, config, write, scratch, *operands)


def _matmul(
    x,
    values,
    source,
    slot,
    ptr,
    spans,
    *rest,
    config: Config,
    epilogue: Epilogue,
    width_in: int,
    transpose: bool,
):
    *rest, pieces = rest
    operands, outs = rest[: epilogue.operands], rest[epilogue.operands :]
    _, tile, width_out = pieces.shape
    depth, tiles, rows = config.depth, x.shape[0] // tile, tile // config.warpgroups
    parts = width_in // depth
    worker = lax.axis_index("worker")

    def products(tile):
        j = lax.div(tile, tiles)
        return (ptr[j + 1] - ptr[j]) * parts

    def walk(body):
        return _workers.walk(spans, worker, lambda tile: products(tile) + 1, body)

    def load(x_tiles, v_tiles, ring):
        def piece(at: _workers.Piece, turn):
            j, t = lax.div(at.tile, tiles), lax.rem(at.tile, tiles)
            tokens, first = pl.ds(t * tile, tile), ptr[j] * parts

            def step(s, turn):
                i, part = lax.div(first + s, parts), lax.rem(first + s, parts)
                features = pl.ds(part * depth, depth)
                stage, full = ring.free(turn)
                plgpu.copy_gmem_to_smem(
                    x.at[tokens, pl.ds(source[i] * width_in + part * depth, depth)],
                    x_tiles.at[stage],
                    full,
                )
                block = values.at[slot[i], :, features] if transpose else values.at[i, features]
                plgpu.copy_gmem_to_smem(block, v_tiles.at[stage], full)
                return turn + 1

            return lax.fori_loop(at.first, lax.min(at.last, products(at.tile)), step, turn)

        ring.drain(walk(piece))

    def multiply(x_tiles, v_tiles, ring, staging, barriers):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * rows, rows)

        def product(acc, stage):
            block = v_tiles.at[stage]
            plgpu.wgmma(
                acc, x_tiles.at[stage, mine], block.transpose((1, 0)) if transpose else block
            )

        def piece(at: _workers.Piece, turn):
            count = lax.max(lax.min(at.last, products(at.tile)) - at.first, 0)
            sums = ring.sums(turn, count, (rows, width_out), product)

            @pl.when(at.whole)
            def _():
                row = lax.rem(at.tile, tiles) * tile + warpgroup * rows
                block = lax.div(at.tile, tiles)
                own = (staging.at[mine], barriers.at[warpgroup])
                epilogue.write(sums, row, block, tuple(outs), tuple(operands), *own)

            _workers.keep(sums, at, worker, pieces, mine, config)
            return turn + count

        walk(piece)
        plgpu.wait_smem_to_gmem(0)

    block = (width_out, depth) if transpose else (depth, width_out)
    swizzle = min(depth, width_out, SLICE)  # both operands want the same
    pl.run_scoped(
        lambda x_tiles, v_tiles, ring, scratch: _ring.roles(
            config.warpgroups,
            lambda: load(x_tiles, v_tiles, ring),
            lambda: multiply(x_tiles, v_tiles, ring, *scratch),
        ),
        _ring.swizzled((config.stages, tile, depth), swizzle, x.dtype),
        _ring.swizzled((config.stages, *block), swizzle, x.dtype),
        _ring.ring(config.stages, config.warpgroups, copies=2),
        epilogue.scratch(tile, width_out, outs[0].dtype, config.warpgroups),
        collective_axes="warpgroup",
    )
