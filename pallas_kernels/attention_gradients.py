"""Gradients of attention: weights are computed again from the saved logarithm, tile by tile, as in
FlashAttention-2 (Dao 2023).

dq walks the lists of queries, dk and dv those of keys, over all query heads that share them: every
number has one place where it is summed, in a fixed order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _gradients, _ring, _tiles
from pallas_kernels._place import Place, vector
from pallas_kernels._scores import LOG2E, Scores
from pallas_kernels._tiles import Span, Tile
from pallas_kernels.attention import launched, operands
from pallas_kernels.attention_config import MEDIUM, Config
from pallas_kernels.attention_lists import Lists
from pallas_kernels.config import ROWS


def exponent(lse: Array) -> Array:
    """The logarithm that `forward` saves, as the gradients want it: to base two, and without keys
    so large that every weight is zero."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)


def dq(
    q: Array,
    k: Array,
    v: Array,
    dy: Array,
    log2: Array,
    delta: Array,
    lists: Lists,
    order: Array,
    config: Config,
    scores: Scores,
    *limits: Array,
    block: tuple[int, int],
) -> list[Array]:
    """Of `forward`: `log2` is the `exponent` of what it saved, `delta` `[n, h, q]` in float32 the
    sum of `dy * y` over each head. Lists and order are those of queries.

    If scores have `numbers`, also what their gradient is the sum of: the gradients of scores
    `[n, h, e, steps, br]` in float32, each over the keys of a step. Those of slots that are in no
    list are not written.
    """
    (n, _, h, _), (br, bc) = q.shape, block
    outs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if scores.numbers:
        shape = (n, h, lists.other.shape[1], bc // config.step, br)
        outs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    run = plgpu.kernel(
        functools.partial(_dq, config=config, scores=scores, block=block),
        out_type=outs,
        **launched(config),
    )
    return run(q, k, v, dy, log2, delta, *operands(lists, order), *limits)


def dkv(
    q: Array,
    k: Array,
    v: Array,
    dy: Array,
    log2: Array,
    delta: Array,
    lists: Lists,
    order: Array,
    config: Config,
    scores: Scores,
    *limits: Array,
    block: tuple[int, int],
) -> tuple[Array, Array]:
    """dk and dv, by lists and an order of keys; `block` is still (queries, keys), but masks by slot
    are bits of 32 queries."""
    run = plgpu.kernel(
        functools.partial(_dkv, config=config, scores=scores, block=block),
        out_type=tuple(jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in range(2)),
        **launched(config),
    )
    return run(q, k, v, dy, log2, delta, *operands(lists, order), *limits)


def _dq(q, k, v, dy, log2, delta, ptr, other, order, *rest, config: Config, scores: Scores, block):
    rest = list(rest)
    dnumbers = rest.pop() if scores.numbers else None
    out, data = rest.pop(), scores.data(rest)
    _, length, h, d = q.shape
    walk = _tiles.Walk(
        config=config,
        order=order,
        ptr=ptr,
        other=other,
        slots=data.slots,
        heads=h,
        shape=(h, length),
        sides=block,
    )

    def load(queries, cotangents, keys, values, _, barriers, rings):
        streams = [((k,), (keys,), rings[0]), ((v,), (values,), rings[1])]
        walk.load([(q, queries), (dy, cotangents)], streams, *barriers)

    def multiply(queries, cotangents, keys, values, staging, barriers, rings):
        warpgroup, (ready, free) = lax.axis_index("warpgroup"), barriers
        slices, *sums_of_rows = staging if scores.numbers else (staging,)
        own_q, own_dy = queries.at[warpgroup], cotangents.at[warpgroup]
        key_ring, value_ring = rings

        def along(tile: Tile, span: Span, turn, sums):
            head, start = walk.part(tile, warpgroup)
            at = Place(scores, tile.batch, head, data).of_rows(start)
            of_rows = [vector(one.at[tile.batch, head], start, ROWS, 0) for one in (log2, delta)]

            def one(s, sums, partial):
                now = turn + s - span.begin
                stage = key_ring.stage(now)
                plgpu.barrier_wait(key_ring.full.at[stage])
                products, _ = _tiles.product(own_q, keys.at[stage])
                spot = None
                if partial or scores.everywhere:
                    spot = walk.spot(tile, span, s, start)
                log, less = (_tiles.rows(one, products.shape) for one in of_rows)

                def weigh():
                    return _gradients.weights(
                        at, products, log, spot, partial, q.dtype, scores.apart
                    )

                plgpu.barrier_wait(value_ring.full.at[stage])
                gradient, (_, weights, slope) = _tiles.product(own_dy, values.at[stage], weigh)
                value_ring.release(now)
                gradient = scores.whole(weights) * (scores.thinned(gradient, weights) - less)
                if dnumbers is not None and spot is not None:
                    here = dnumbers.at[tile.batch, head, spot.slot, lax.rem(s, walk.cut)]
                    here = here.at[pl.ds(lax.rem(start, walk.sides[0]), ROWS)]
                    _gradients.put(jnp.sum(gradient, axis=1), sums_of_rows[0].at[warpgroup], here)
                    gradient = gradient if slope is None else gradient * slope
                gradient = gradient.astype(q.dtype)
                sums = _ring.onto_product(sums, gradient, keys.at[stage])
                key_ring.release(now)
                return sums

            return walk.steps(span, scores.masked, one, sums)

        def tile_(tile: Tile, turn):
            plgpu.barrier_wait(ready)

            def one(span: Span, state):
                turn, sums = state
                return turn + span.end - span.begin, along(tile, span, turn, sums)

            turn, sums = walk.spans(tile, one, (turn, _tiles.numbers((ROWS, d), 0.0)))
            plgpu.barrier_arrive(free)
            head, start = walk.part(tile, warpgroup)
            _tiles.write(
                sums * scores.scale,
                _ring.Slots(slices.at[warpgroup]),
                lambda columns: out.at[tile.batch, pl.ds(start, ROWS), head, columns],
            )
            return turn

        plgpu.barrier_arrive(free)
        walk.tiles(tile_)
        plgpu.wait_smem_to_gmem(0)

    _gradients.scoped(load, multiply, walk, q, numbers=False, sums_of_rows=scores.numbers)


def _dkv(q, k, v, dy, log2, delta, ptr, other, order, *rest, config: Config, scores: Scores, block):
    *rest, dk, dv = rest
    data = scores.data(rest)
    _, length, g, d = k.shape
    walk = _tiles.Walk(
        config=config,
        order=order,
        ptr=ptr,
        other=other,
        slots=data.slots,
        heads=q.shape[2],
        shape=(g, length),
        sides=block[::-1],
    )

    def load(keys, values, queries, cotangents, _, barriers, rings):
        streams = [((q, log2), queries, rings[0]), ((dy, delta), cotangents, rings[1])]
        walk.load([(k, keys), (v, values)], streams, *barriers)

    def multiply(keys, values, queries, cotangents, slots, barriers, rings, wants):
        """`wants` names the sums of this warpgroup: of dv, of dk, or both."""
        warpgroup, (ready, free) = lax.axis_index("warpgroup"), barriers
        part = lax.rem(warpgroup, walk.parts)
        own_k, own_v = keys.at[part], values.at[part]
        (queries, logs), (cotangents, deltas), (query_ring, cotangent_ring) = (
            queries,
            cotangents,
            rings,
        )

        # weights are computed beside a product, if that leaves registers for a mask
        beside = d < MEDIUM or not (scores.masked or scores.everywhere)

        def along(tile: Tile, span: Span, turn, sums):
            start = walk.part(tile, part)[1]
            at = Place(scores, tile.batch, span.head, data, flipped=True)

            def one(s, sums, partial):
                sums = dict(zip(wants, sums, strict=True))
                now, spot = turn + s - span.begin, None
                if partial or scores.everywhere:
                    spot = walk.spot(tile, span, s, start)
                stage = query_ring.stage(now)
                plgpu.barrier_wait(query_ring.full.at[stage])
                products, _ = _tiles.product(own_k, queries.at[stage])

                def weigh():
                    log = _tiles.columns(logs.at[stage], products.shape)
                    return _gradients.weights(at, products, log, spot, partial, q.dtype)

                own_dy, together = cotangents.at[stage], beside and "dk" in sums
                gradient: Any = None
                if together:
                    plgpu.barrier_wait(cotangent_ring.full.at[stage])
                    gradient, (rounded, weights, _) = _tiles.product(own_v, own_dy, weigh)
                else:
                    rounded, weights, _ = weigh()
                    plgpu.barrier_wait(cotangent_ring.full.at[stage])
                if "dv" in sums:
                    sums["dv"] = _ring.onto_product(sums["dv"], rounded, own_dy)
                if "dk" in sums:
                    less = _tiles.columns(deltas.at[stage], products.shape)
                    if not together:
                        gradient, _ = _tiles.product(own_v, own_dy)
                    gradient = scores.thinned(gradient, weights) - less
                cotangent_ring.release(now)
                if "dk" in sums:
                    gradient = (scores.whole(weights) * gradient).astype(q.dtype)
                    sums["dk"] = _ring.onto_product(sums["dk"], gradient, queries.at[stage])
                query_ring.release(now)
                return tuple(sums.values())

            return walk.steps(span, scores.masked, one, sums)

        def tile_(tile: Tile, turn):
            plgpu.barrier_wait(ready)

            def one(span: Span, state):
                turn, *sums = state
                return turn + span.end - span.begin, *along(tile, span, turn, tuple(sums))

            state = (turn, *(_tiles.numbers((ROWS, d), 0.0) for _ in wants))
            turn, *sums = walk.spans(tile, one, state)
            plgpu.barrier_arrive(free)
            head, start = walk.part(tile, part)
            here, staging = pl.ds(start, ROWS), _ring.Slots(slots.at[warpgroup])
            outs = {"dk": (dk, scores.scale), "dv": (dv, float(scores.spread))}
            for name, own in zip(wants, sums, strict=True):
                out, factor = outs[name]
                _tiles.write(
                    own * factor,
                    staging,
                    lambda columns, out=out: out.at[tile.batch, here, head, columns],
                )
            return turn

        plgpu.barrier_arrive(free)
        walk.tiles(tile_)
        plgpu.wait_smem_to_gmem(0)

    def each(*scratch):
        if not config.split:
            multiply(*scratch, wants=("dv", "dk"))
            return
        for warpgroup, name in enumerate(("dv", "dk")):
            run = functools.partial(multiply, *scratch, wants=(name,))
            pl.when(lax.axis_index("warpgroup") == warpgroup)(run)

    _gradients.scoped(load, each, walk, q, numbers=True)
