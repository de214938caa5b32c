"""Dense products of which one axis is a sample: slices of it are read where they lie.

An axis of k features is cut into slices of 64, and `order` lists them: `count` that are taken, then
the others. Three products:

    "contract"   y[n, m]  = sum_i a_i x[:, s_i] @ w[s_i, :]    over the slices that are taken
    "columns"    dx[n, k] : dx[:, s_i] = a_i dy @ w[s_i, :]^T  and zeros in the others
    "rows"       dw[k, m] : dw[s_i, :] = a_i x[:, s_i]^T @ dy  and zeros in the others

One persistent program on every multiprocessor. One warpgroup loads by TMA, led by the list in
shared memory, and runs ahead over a ring of stages, across output tiles. Two multiply. Programs of
a cluster have other rows and the same columns: what they read of the right operand each loads in
part, for all. What a slice counts scales the result of "columns" and "rows"; in "contract" the sums
are multiplied by the quotient of two slices' counts in between, in registers. Zeros are written
beside the products, while memory has nothing else to do.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring
from pallas_kernels.config import MULTIPROCESSORS, ROWS, SHARED_MEMORY, SLICE

type Product = Literal["contract", "columns", "rows"]
LINE = 128  # numbers of a table in a row
ZEROS = ROWS // 2  # rows of zeros, to be written many times
# time per column of narrower output tiles, over that of the widest
WIDTHS = {256: 1.0, 128: 1.15, 64: 1.5}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How the kernel is launched."""

    width: int = 256  # columns of an output tile
    warpgroups: int = 2  # that multiply, `ROWS` rows each
    cluster: int = 2
    stages: int = 3
    slots: int = 4  # for `SLICE` columns of an output tile each, while they are written
    workers: int = MULTIPROCESSORS
    band: int = 8  # columns of tiles that are walked together, so that a cache holds what they read

    @property
    def rows(self) -> int:
        return self.warpgroups * ROWS


def tiling(rows: int, columns: int, slices: int, workers: int = MULTIPROCESSORS) -> Tiling:
    """For an output that large (of the part that is computed), by a list of so many slices."""
    warpgroups = 1 if rows <= ROWS else 2
    cluster = 2 if rows > warpgroups * ROWS else 1
    high = -(-rows // (warpgroups * ROWS * cluster)) * cluster

    def cost(width: int) -> float:
        waves = -(-high * -(-columns // width) // workers)
        return waves * width * WIDTHS[width]

    width = min(WIDTHS, key=cost)
    chosen = Tiling(
        width=width,
        warpgroups=warpgroups,
        cluster=cluster,
        slots=width // SLICE,
        workers=workers,
    )
    return dataclasses.replace(chosen, stages=_stages(chosen, slices))


def _stages(chosen: Tiling, slices: int) -> int:
    """As many as fit beside the rest."""
    step = 2 * SLICE * (chosen.rows + chosen.width)
    rest = 2 * SLICE * chosen.warpgroups * (chosen.slots * ROWS + ZEROS) + 8 * _padded(slices)
    return min(8, (SHARED_MEMORY - rest) // step)


def _padded(slices: int) -> int:
    """Of a table: one more than slices, in whole lines."""
    return -(-(slices + 1) // LINE) * LINE


def table(numbers: Array) -> Array:
    """As the kernel reads it."""
    return jnp.pad(numbers, (0, _padded(numbers.shape[0]) - numbers.shape[0])).reshape(-1, LINE)


def product(
    which: Product,
    left: Array,
    right: Array,
    order: Array,
    factors: Array,
    config: Tiling,
    *,
    count: int,
    slices: int,
    every: int | None = None,
) -> Array:
    """One of the products of `left` and `right`: x and w, dy and w, or x and dy; in their dtype.

    `order` and `factors` are tables: the numbers of all `slices`, and what each that is taken
    counts. For "contract" `factors[i]` is instead what the sums before slice `i` are multiplied by,
    for `i` a multiple of `every`, and `factors[count]` what the result is; `every=None` does the
    last only. Rows of the result that are not sampled must be whole tiles of a cluster, and its
    columns and what is summed over whole slices.
    """
    n = left.shape[1 if which == "rows" else 0]
    m = right.shape[0 if which == "columns" else 1]
    cluster = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
    run = plgpu.kernel(
        functools.partial(
            _product, which=which, config=config, count=count, every=every, slices=slices
        ),
        out_type=jax.ShapeDtypeStruct((n, m), left.dtype),
        grid=(config.workers // config.cluster,),
        grid_names=("worker",),
        **(cluster if config.cluster > 1 else {}),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
    )
    return run(left, right, order, factors)


def _product(
    left, right, order, factors, out, *, which: Product, config: Tiling, count, every, slices
):
    summed, sampled_rows, sampled_columns = (
        which == one for one in ("contract", "rows", "columns")
    )
    width, rows, parts = config.width, config.rows, config.width // SLICE
    height, across = out.shape
    if sampled_rows:
        height = count * SLICE
    if sampled_columns:
        across = count * SLICE
    steps = count if summed else left.shape[0 if sampled_rows else 1] // SLICE
    tiles = (-(-height // (rows * config.cluster)), -(-across // width))
    workers, worker = config.workers // config.cluster, lax.axis_index("worker")
    member, together = 0, None
    if config.cluster > 1:
        member, together = lax.axis_index("cluster"), "cluster"

    def walk(body):
        """`turn = body(i, j, turn)` for the output tiles of this program."""

        def one(at, turn):
            tile = worker + at * workers
            i, j = plgpu.planar_snake(tile, tiles, 1, min(config.band, tiles[1]))
            return body(i * config.cluster + member, j, turn)

        mine = lax.div(tiles[0] * tiles[1] - worker + workers - 1, workers)
        return lax.fori_loop(0, mine, one, jnp.int32(0))

    def at(table, i):
        return table[lax.div(i, LINE), lax.rem(i, LINE)]

    def load(lefts, rights, ring, order, *_):
        def taken(i):  # the last tile may have fewer
            return pl.ds(at(order, lax.min(i, count - 1)) * SLICE, SLICE)

        def tile(i, j, turn):
            def step(s, turn):
                here = taken(s) if summed else pl.ds(s * SLICE, SLICE)
                stage, full = ring.free(turn)

                def own(source, target):
                    plgpu.copy_gmem_to_smem(source, target, full)

                def shared(source, target):
                    plgpu.copy_gmem_to_smem(source, target, full, collective_axes=together)

                if sampled_rows:
                    for part in range(config.warpgroups):
                        columns = taken(i * config.warpgroups + part)
                        own(left.at[here, columns], lefts.at[stage, part])
                else:
                    own(left.at[pl.ds(i * rows, rows), here], lefts.at[stage])
                if sampled_columns:
                    for part in range(parts):
                        there = rights.at[stage, pl.ds(part * SLICE, SLICE)]
                        shared(right.at[taken(j * parts + part), here], there)
                else:
                    shared(right.at[here, pl.ds(j * width, width)], rights.at[stage])
                return turn + 1

            return lax.fori_loop(0, steps, step, turn)

        ring.drain(walk(tile))

    def multiply(lefts, rights, ring, order, factors, staging, zeros):
        warpgroup = lax.axis_index("warpgroup")
        staging, zeros = staging.at[warpgroup], zeros.at[warpgroup]
        if not summed:
            zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
            plgpu.commit_smem()

        def add(acc, stage):
            if sampled_rows:
                own = lefts.at[stage, warpgroup].transpose((1, 0))
            else:
                own = lefts.at[stage, pl.ds(warpgroup * ROWS, ROWS)]
            block = rights.at[stage]
            plgpu.wgmma(acc, own, block.transpose((1, 0)) if sampled_columns else block)

        def sums(turn):
            if every is None:
                return ring.sums(turn, (ROWS, width), [_ring.Run(steps, add)])
            return _rescaled(ring, turn, (ROWS, width), steps, every, add, lambda i: at(factors, i))

        def tile(i, j, turn):
            result, turn = sums(turn)
            mine = i * config.warpgroups + warpgroup  # of the rows, by `ROWS`
            for k in range(parts):
                # whose slice this is, of those that are taken
                piece = j * parts + k if sampled_columns else mine

                def write(k=k, piece=piece):
                    # what was written last may still be read, and so may the zeros of a tile
                    if not 0 < k < config.slots:
                        plgpu.wait_smem_to_gmem(config.slots - 1 if k else 0, wait_read_only=True)
                    part = result[:, k * SLICE : (k + 1) * SLICE]
                    part = part * at(factors, count if summed else piece)
                    staging[k % config.slots] = part.astype(staging.dtype)
                    plgpu.commit_smem()
                    r = at(order, piece) if sampled_rows else mine
                    c = at(order, piece) if sampled_columns else j * parts + k
                    to = out.at[pl.ds(r * ROWS, ROWS), pl.ds(c * SLICE, SLICE)]
                    plgpu.copy_smem_to_gmem(staging.at[k % config.slots], to)

                write() if summed else pl.when(piece < count)(write)
            if not summed:
                clear(i, j, mine)
            return turn

        def clear(i, j, mine):
            """A tile's share of the slices that were not taken."""
            others = slices - count
            place, places = (j, tiles[1]) if sampled_columns else (i, tiles[0] * config.cluster)
            first, last = (lax.div((place + k) * others, places) for k in (0, 1))

            @pl.loop(first, last)
            def _(k):
                other = at(order, count + k)
                for part in range(1 if sampled_columns else parts):
                    r, c = (mine, other) if sampled_columns else (other, j * parts + part)

                    def write(r=r, c=c):
                        for half in range(ROWS // ZEROS):
                            tokens = pl.ds(r * ROWS + half * ZEROS, ZEROS)
                            to = out.at[tokens, pl.ds(c * SLICE, SLICE)]
                            plgpu.copy_smem_to_gmem(zeros, to)

                    # rows of another tile are for the warpgroups to share
                    own = part % config.warpgroups == warpgroup
                    write() if sampled_columns else pl.when(own)(write)

        walk(tile)
        plgpu.wait_smem_to_gmem(0)

    def run(lefts, rights, ring, tables, ready, *scratch):
        def role(work):
            def start():
                if work is load:
                    for own, source in zip(tables, (order, factors), strict=True):
                        plgpu.copy_gmem_to_smem(source, own, ready)
                plgpu.barrier_wait(ready)
                work(lefts, rights, ring, *tables, *scratch)

            return start

        _ring.roles(config.warpgroups, role(load), role(multiply))

    dtype = left.dtype
    a_tile = (config.warpgroups, SLICE, ROWS) if sampled_rows else (rows, SLICE)
    b_tile = (width, SLICE) if sampled_columns else (SLICE, width)
    copies = (config.warpgroups if sampled_rows else 1) + (parts if sampled_columns else 1)
    pl.run_scoped(
        run,
        _ring.swizzled((config.stages, *a_tile), SLICE, dtype),
        _ring.swizzled((config.stages, *b_tile), SLICE, dtype),
        _ring.ring(config.stages, config.warpgroups, copies, config.cluster > 1),
        (plgpu.SMEM(order.shape, order.dtype), plgpu.SMEM(factors.shape, factors.dtype)),
        plgpu.Barrier(num_arrivals=2),
        _ring.swizzled((config.warpgroups, config.slots, ROWS, SLICE), SLICE, dtype),
        plgpu.SMEM((config.warpgroups, ZEROS, SLICE), dtype),
        collective_axes="warpgroup",
    )


def _rescaled(ring, turn, shape, steps, every, add, factor) -> tuple[Array, Any]:
    """What the steps add up to, where the sums before each `every`-th are multiplied first."""

    def group(i, sums):
        first = turn + i * every

        def accumulate(acc):
            for part in range(every):
                plgpu.barrier_wait(ring.full.at[ring.stage(first + part)])
                add(acc, ring.stage(first + part))
                if part:  # the slice before has been read, this one is still running
                    plgpu.wgmma_wait(1)
                    ring.release(first + part - 1)
            plgpu.wgmma_wait(0)

        sums = _ring.onto(sums * factor(i * every), accumulate)
        ring.release(first + every - 1)
        return sums

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, steps // every, group, zeros), turn + steps
