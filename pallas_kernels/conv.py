"""A convolution over stored blocks of channels, and its transpose from the same values.

Images lie as they are, `x[n, pixels * channels]`, and an output tile is one pixel of many images
(or a few neighbours, see `conv_strip`), times one block of channels. So every (tap, stored block)
is a product of rows of x, at the columns of the pixel that the tap reads, and of a block of the
values: `matmul` with another list of steps. Nobody writes down windows or zeros around the image,
taps outside it are no steps at all, and any stride, dilation, padding and transpose is a table of a
few numbers for each pixel of an axis.

(A TMA copy of a box of neighbouring pixels, which the windows of one image want, cannot be had from
Pallas without a copy of x: where eight rows are a tile of what `wgmma` reads, the first one has to
be a multiple of eight, and a tap moves it by one. JAX 0.12 has `im2col_ref`, which the interpreter
does not know.)

A persistent program on every multiprocessor: one warpgroup loads over a ring of stages, across
output tiles, the others multiply.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, conv_strip, windows
from pallas_kernels.config import Config
from pallas_kernels.conv_strip import Strip
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.lists import Steps
from pallas_kernels.windows import Axis

NONE = Epilogue()


def conv(
    x: Array,
    values: Array,
    steps: Steps,
    config: Config,
    *operands: Array,
    axes: tuple[Axis, ...],
    tables: Sequence[Array],
    blocks: int,
    transpose: bool = False,
    epilogue: Epilogue = NONE,
    out_dtype: Any,
) -> tuple[Array, ...]:
    """`y[n, pixels * blocks * width]` of `x[n, pixels * channels]` and `values[e, taps, *block]`.

    Each output block of a pixel is the sum of `x[:, pixel', source[i]] @ values[slots[i], tap]`
    over the taps that read a pixel' inside the image, and over the steps of that block (see
    `lists`), after the `epilogue` with its `operands`; and what that keeps. A bias is `[1, blocks *
    width]`, a residual has the shape of y. With `transpose` images lie as the target does, and
    stored blocks are multiplied transposed.

    `tables` are those of `windows`. `n` must be a multiple of `config.tile / config.pixels`, and
    there must be images, pixels, output blocks and at least one slot. `config.columns` and
    `config.cluster` are 1. More than one of `config.pixels` share what they read (`conv_strip`).
    """
    n, (e, taps, *_) = x.shape[0], values.shape
    values = values.reshape(e * taps, *values.shape[2:])
    width = values.shape[1] if transpose else values.shape[2]
    pixels = math.prod(axis.sides(transpose)[1] for axis in axes)
    places = pixels
    if config.pixels > 1:
        tables = tables[:-1]
        strip = Strip(axes[-1], transpose, config.pixels)
        places = pixels // axes[-1].sides(transpose)[1] * strip.count
    tiles = n // (config.tile // config.pixels)
    run = plgpu.kernel(
        functools.partial(
            conv_strip.kernel if config.pixels > 1 else _conv,
            config=config,
            epilogue=epilogue,
            axes=axes,
            blocks=blocks,
            taps=taps,
            transpose=transpose,
            walk=functools.partial(_walk, tiles, places, blocks, config.workers),
        ),
        out_type=epilogue.outs(n, pixels * blocks * width, out_dtype),
        grid=(config.workers,),
        grid_names=("worker",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
    )
    return tuple(run(x, values, steps.ptr, steps.source, steps.slots[0], *tables, *operands))


def strips(axis: Axis, transpose: bool) -> dict[int, tuple[float, int, int]]:
    """How many neighbours along the last axis can share what they read, as `config` wants it."""
    _, out = axis.sides(transpose)
    every = [Strip(axis, transpose, pixels) for pixels in (2, 4, 8)]
    return {
        one.pixels: (one.count * one.pixels / out, one.reads, axis.window)
        for one in every
        if one.fits
    }


def _walk(tiles: int, places: int, blocks: int, workers: int, body: Callable[..., Any]) -> Any:
    """`turn = body(images, place, block, turn)` for the output tiles of this program."""
    worker, total = lax.axis_index("worker"), tiles * places * blocks

    def one(at, turn):
        place = _place(worker + at * workers, places, blocks, 2 * workers)
        return body(*place, turn)

    mine = lax.div(total - worker + workers - 1, workers)
    return lax.fori_loop(0, mine, one, jnp.int32(0))


def _place(
    tile: Any, pixels: int, blocks: int, band: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tile of images, pixel, output block): pixels of a band for each block, bands one after the
    other, so that a cache holds what programs read of x at a time."""
    images, rest = lax.div(tile, pixels * blocks), lax.rem(tile, pixels * blocks)
    start = lax.div(rest, band * blocks)
    size, inside = lax.min(band, pixels - start * band), lax.rem(rest, band * blocks)
    return images, start * band + lax.rem(inside, size), lax.div(inside, size)


def _conv(
    x,
    values,
    ptr,
    source,
    slots,
    *rest,
    config: Config,
    epilogue: Epilogue,
    axes: Sequence[Axis],
    blocks: int,
    taps: int,
    transpose: bool,
    walk: Any,
):
    tables, rest = rest[: len(axes)], rest[len(axes) :]
    operands, outs = rest[: epilogue.operands], rest[epilogue.operands :]
    width_in, width_out = values.shape[:0:-1] if transpose else values.shape[1:]
    channels = x.shape[1] // math.prod(axis.sides(transpose)[0] for axis in axes)
    depth, tile = config.depth, config.tile
    rows, cut = tile // config.warpgroups, width_in // depth
    sizes = [axis.sides(transpose)[1] for axis in axes]

    def load(x_tiles, v_tiles, ring):
        def tile_of(images, pixel, block, turn):
            rows = pl.ds(images * tile, tile)
            first, last = ptr[block] * cut, ptr[block + 1] * cut

            def tap_of(tap, pixel, turn):
                def step(s, turn):
                    i, start = lax.div(s, cut), lax.rem(s, cut) * depth
                    # read before waiting, so that waiting hides it
                    features = pl.ds(pixel * channels + source[i] * width_in + start, depth)
                    slot, own = slots[i] * taps + tap, pl.ds(start, depth)
                    stage, full = ring.free(turn)
                    plgpu.copy_gmem_to_smem(x.at[rows, features], x_tiles.at[stage], full)
                    stored = values.at[slot, :, own] if transpose else values.at[slot, own]
                    plgpu.copy_gmem_to_smem(stored, v_tiles.at[stage], full)
                    return turn + 1

                return lax.fori_loop(first, last, step, turn)

            at = windows.split(pixel, sizes)
            return windows.each(tables, at, axes, transpose, tap_of, turn)

        ring.drain(walk(tile_of))

    def multiply(x_tiles, v_tiles, ring, staging, barriers):
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * rows, rows)

        def product(acc, stage):
            stored = v_tiles.at[stage]
            plgpu.wgmma(
                acc, x_tiles.at[stage, mine], stored.transpose((1, 0)) if transpose else stored
            )

        def tile_of(images, pixel, block, turn):
            reads = windows.count(tables, windows.split(pixel, sizes))
            count = reads * (ptr[block + 1] - ptr[block]) * cut
            sums, turn = ring.sums(turn, (rows, width_out), [_ring.Run(count, product)])
            epilogue.write(
                sums,
                images * tile + warpgroup * rows,
                pixel * blocks + block,
                tuple(outs),
                tuple(operands),
                _ring.Slots(staging.at[:, mine]),
                barriers.at[warpgroup],
                biased=block,
            )
            return turn

        walk(tile_of)
        plgpu.wait_smem_to_gmem(0)

    block = (width_out, depth) if transpose else (depth, width_out)
    swizzle = min(depth, width_out, 64)  # both operands want the same
    pl.run_scoped(
        lambda x_tiles, v_tiles, ring, scratch: _ring.roles(
            config.warpgroups,
            lambda: load(x_tiles, v_tiles, ring),
            lambda: multiply(x_tiles, v_tiles, ring, *scratch),
        ),
        _ring.swizzled((config.stages, tile, depth), swizzle, x.dtype),
        _ring.swizzled((config.stages, *block), swizzle, x.dtype),
        _ring.ring(config.stages, config.warpgroups, copies=2),
        epilogue.scratch(tile, width_out, outs[0].dtype, config.warpgroups, 1, config.slots),
        collective_axes="warpgroup",
    )
