"""A convolution whose output tiles are strips: neighbouring pixels of 64 images, times one block of
channels.

The windows of neighbours read the same pixels, so what is read of x serves all of them: a step is
one stored block and one row of taps, which lie along the last axis of space. It reads each pixel
under the strip once and the values of these taps once, and multiplies all pairs of an output pixel
and a tap. Pixels outside the image are zeros: they are read behind the last image, where TMA finds
none.

Rows of taps that are outside, along the other axes, are no steps. For transposes this takes a
stride of 1 along the last axis.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, windows
from pallas_kernels.config import ROWS, Config
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.windows import Axis

PENDING = 7  # products of the tensor cores that a program can wait beside


@dataclasses.dataclass(frozen=True, slots=True)
class Strip:
    """The last axis: `pixels` that come out side by side, and what they read: `reads` pixels."""

    axis: Axis
    transpose: bool
    pixels: int

    @property
    def reads(self) -> int:
        stride = 1 if self.transpose else self.axis.stride
        return stride * (self.pixels - 1) + self.axis.dilation * (self.axis.window - 1) + 1

    @property
    def count(self) -> int:
        """Strips of an image's line."""
        return -(-self.axis.sides(self.transpose)[1] // self.pixels)

    def start(self, strip: Any) -> Any:
        """The first pixel that a strip reads; it may lie outside the image."""
        first, axis = strip * self.pixels, self.axis
        if self.transpose:
            return first + axis.low - axis.dilation * (axis.window - 1)
        return first * axis.stride - axis.low

    def place(self, pixel: Any, tap: int) -> Any:
        """Which of the pixels that are read a tap of an output pixel wants."""
        if self.transpose:
            return pixel + self.axis.dilation * (self.axis.window - 1 - tap)
        return pixel * self.axis.stride + self.axis.dilation * tap

    @property
    def fits(self) -> bool:
        """Whether every pixel that is read is wanted, and no other."""
        if self.transpose and self.axis.stride > 1:
            return False
        every = ((i, t) for i in range(self.pixels) for t in range(self.axis.window))
        return {self.place(i, t) for i, t in every} == set(range(self.reads))


def kernel(
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
    *outer, last = axes
    strip = Strip(last, transpose, config.pixels)
    tables, rest = rest[: len(outer)], rest[len(outer) :]
    operands, outs = rest[: epilogue.operands], rest[epilogue.operands :]
    width_in, width_out = values.shape[:0:-1] if transpose else values.shape[1:]
    (into, out), window = last.sides(transpose), last.window
    channels = x.shape[1] // math.prod(axis.sides(transpose)[0] for axis in axes)
    depth = config.depth
    mine, cut = config.pixels // config.warpgroups, width_in // depth
    sizes = [axis.sides(transpose)[1] for axis in outer]

    def line(place):
        """Where a strip is, along all axes but the last."""
        return windows.split(lax.div(place, strip.count), sizes) if outer else []

    def load(x_tiles, v_tiles, ring):
        def tile_of(images, place, block, turn):
            first, last = ptr[block] * cut, ptr[block + 1] * cut
            start = strip.start(lax.rem(place, strip.count))

            def row_of(row, from_line, turn):
                def step(s, turn):
                    i, begin = lax.div(s, cut), lax.rem(s, cut) * depth
                    # read before waiting, so that waiting hides it
                    column, slot = source[i] * width_in + begin, slots[i] * taps + row * window
                    stage, full = ring.free(turn)
                    for u in range(strip.reads):
                        at = start + u
                        inside = (at >= 0) & (at < into)
                        rows = pl.ds(lax.select(inside, images * ROWS, x.shape[0]), ROWS)
                        pixel = from_line * into + lax.select(inside, at, 0)
                        features = pl.ds(pixel * channels + column, depth)
                        plgpu.copy_gmem_to_smem(x.at[rows, features], x_tiles.at[stage, u], full)
                    for tap in range(window):
                        own = pl.ds(begin, depth)
                        index = (slot + tap, slice(None), own) if transpose else (slot + tap, own)
                        plgpu.copy_gmem_to_smem(values.at[index], v_tiles.at[stage, tap], full)
                    return turn + 1

                return lax.fori_loop(first, last, step, turn)

            return windows.each(tables, line(place), outer, transpose, row_of, turn)

        ring.drain(walk(tile_of))

    def multiply(x_tiles, v_tiles, ring, staging, barriers):
        warpgroup = lax.axis_index("warpgroup")

        def product(acc, stage):
            for tap in range(window):
                stored = v_tiles.at[stage, tap]
                for k in range(mine):
                    read = x_tiles.at[stage, strip.place(warpgroup * mine + k, tap)]
                    sums = acc.at[pl.ds(k * ROWS, ROWS)] if mine > 1 else acc
                    plgpu.wgmma(sums, read, stored.transpose((1, 0)) if transpose else stored)

        def tile_of(images, place, block, turn):
            count = windows.count(tables, line(place)) * (ptr[block + 1] - ptr[block]) * cut
            run = _ring.Run(count, product, min(window * mine, PENDING))
            sums, turn = ring.sums(turn, (mine * ROWS, width_out), [run])
            free = _ring.Slots(staging.at[:, pl.ds(warpgroup * ROWS, ROWS)])
            lines, first = lax.div(place, strip.count), lax.rem(place, strip.count) * strip.pixels
            for k in range(mine):
                pixel = first + warpgroup * mine + k

                @pl.when(pixel < out)
                def _(k=k, pixel=pixel):
                    epilogue.write(
                        sums[k * ROWS : (k + 1) * ROWS],
                        images * ROWS,
                        (lines * out + pixel) * blocks + block,
                        tuple(outs),
                        tuple(operands),
                        free,
                        barriers.at[warpgroup],
                        biased=block,
                    )

            return turn

        walk(tile_of)
        plgpu.wait_smem_to_gmem(0)

    block = (width_out, depth) if transpose else (depth, width_out)
    swizzle = min(depth, width_out, 64)  # both operands want the same
    rows, slices = config.warpgroups * ROWS, config.slots
    pl.run_scoped(
        lambda x_tiles, v_tiles, ring, scratch: _ring.roles(
            config.warpgroups,
            lambda: load(x_tiles, v_tiles, ring),
            lambda: multiply(x_tiles, v_tiles, ring, *scratch),
        ),
        _ring.swizzled((config.stages, strip.reads, ROWS, depth), swizzle, x.dtype),
        _ring.swizzled((config.stages, window, *block), swizzle, x.dtype),
        _ring.ring(config.stages, config.warpgroups, copies=strip.reads + window),
        epilogue.scratch(rows, width_out, outs[0].dtype, config.warpgroups, mine, slices),
        collective_axes="warpgroup",
    )
