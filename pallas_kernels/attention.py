"""Attention over stored (query block, key block) pairs, without a `[q, k]` array (Dao 2023,
"FlashAttention-2"; Shah et al. 2024, "FlashAttention-3").

One program on every multiprocessor. One warpgroup loads: led by the lists of stored key blocks, it
runs ahead over rings of stages, across tiles of queries. The others multiply, `ROWS` queries of one
head each, with an online softmax in registers, and take turns: while one multiplies, the other is
at its softmax.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ring, _tiles
from pallas_kernels._place import Place
from pallas_kernels._scores import LOG2E, Scores
from pallas_kernels._tiles import Span, Tile
from pallas_kernels.attention_config import Config
from pallas_kernels.attention_lists import Lists
from pallas_kernels.config import ROWS

# What the maximum of a row begins with: finite, so that a row of -inf needs no exception.
LEAST = -1.5e38


def forward(
    q: Array,
    k: Array,
    v: Array,
    lists: Lists,
    order: Array,
    config: Config,
    scores: Scores,
    *limits: Array,
    block: tuple[int, int],
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """`softmax(scores) v`, `[n, q, h, d]` in the dtype of q, and the logarithm of what it divides
    by, `[n, h, q]` in float32: -inf, and zeros, for queries without keys.

    q is `[n, q, h, d]`, k and v are `[n, k, g, d]`, of whole blocks (queries, keys). `sinks` `[h]`
    in float32 are logits that only divide. `order` is that of the tiles (`attention_lists`).
    `limits` are, as far as `scores` names them, in int32: lengths `[n]`; segments `[n, q]` and
    `[n, k]`; masks by slot as bits of 32 keys, `[#n, #h, #e, #bc / 32, #br]`; then in float32
    numbers by slot `[#n, #h, #e]`; and in int32 the words of a dropout `[2, n, h, q]`.
    """
    n, length, h, _ = q.shape
    last = () if sinks is None else (sinks,)
    run = plgpu.kernel(
        functools.partial(
            _forward, config=config, scores=scores, block=block, sinks=sinks is not None
        ),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((n, h, length), jnp.float32),
        ),
        **launched(config),
    )
    return run(q, k, v, *operands(lists, order), *limits, *last)


def operands(lists: Lists, order: Array) -> list[Array]:
    """What leads a kernel: slots come last, if there are."""
    slots = [] if lists.slot is None else [lists.slot]
    return [lists.ptr, lists.other, order, *slots]


def launched(config: Config) -> dict[str, Any]:
    """How all attention kernels are."""
    return {
        "grid": (config.workers,),
        "grid_names": ("worker",),
        "num_threads": config.warpgroups + 1,
        "thread_name": "warpgroup",
        "compiler_params": plgpu.CompilerParams(approx_math=True),
    }


def _forward(q, k, v, ptr, other, order, *rest, config: Config, scores: Scores, block, sinks: bool):
    *rest, out, lse = rest
    sink = rest.pop() if sinks else None
    data = scores.data(rest)
    _, length, h, d = q.shape
    step, many = config.step, config.warpgroups
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

    def load(queries, keys, values, _, barriers, rings):
        ready, free, _ = barriers
        streams = [((k,), (keys,), rings[0]), ((v,), (values,), rings[1])]
        walk.load([(q, queries)], streams, ready, free)

    def multiply(queries, keys, values, staging, barriers, rings):
        warpgroup, (ready, free, turns) = lax.axis_index("warpgroup"), barriers
        mine, (slots, numbers) = queries.at[warpgroup], (one.at[warpgroup] for one in staging)
        key_ring, value_ring = rings

        def swap():
            """Lets the other warpgroup multiply, once it lets this one."""
            if many == 2:
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(turns)

        def along(tile: Tile, span: Span, turn, state):
            head, start = walk.part(tile, warpgroup)
            at = Place(scores, tile.batch, head, data).of_rows(start)

            def one(s, state, partial):
                total, most, sums = state
                now = turn + s - span.begin
                stage = key_ring.stage(now)
                plgpu.barrier_wait(key_ring.full.at[stage])
                own, _ = _tiles.product(mine, keys.at[stage], swap)
                key_ring.release(now)
                own, spot = scores.of(own), None
                if partial or scores.everywhere:
                    spot = walk.spot(tile, span, s, start)
                    own = at.scores(own, spot, partial)
                before, most = most, lax.max(most, jnp.max(own, axis=1) * scores.factor)
                weights = jnp.exp2(own * scores.factor - _tiles.rows(most, own.shape))
                fade = jnp.exp2(before - most)
                total = total * fade + jnp.sum(weights, axis=1)
                sums = sums * _tiles.rows(fade, sums.shape)
                weights = at.dropped(weights, spot, jnp.zeros_like).astype(q.dtype)
                plgpu.barrier_wait(value_ring.full.at[stage])
                swap()
                sums = _ring.onto_product(sums, weights, values.at[stage])
                value_ring.release(now)
                return total, most, sums

            return walk.steps(span, scores.masked, one, state)

        def tile_(tile: Tile, turn):
            head, start = walk.part(tile, warpgroup)
            plgpu.barrier_wait(ready)
            # half a step after the other; both end together, since the next tile waits for both
            pl.when(warpgroup == 1)(swap)

            def one(span: Span, state):
                turn, *state = state
                return turn + span.end - span.begin, *along(tile, span, turn, tuple(state))

            state = (turn, *_begin(sink, head), _tiles.numbers((ROWS, d), 0.0))
            turn, total, most, sums = walk.spans(tile, one, state)
            pl.when(warpgroup == 0)(swap)
            plgpu.barrier_arrive(free)
            seen = total > 0
            total = jnp.where(seen, total, 1.0)
            sums = sums * _tiles.rows(jnp.where(seen, scores.spread / total, 0.0), sums.shape)
            here = pl.ds(start, ROWS)
            _tiles.write(
                sums, _ring.Slots(slots), lambda columns: out.at[tile.batch, here, head, columns]
            )
            numbers[...] = jnp.where(seen, (most + jnp.log2(total)) / LOG2E, -math.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(numbers, lse.at[tile.batch, head, here])
            return turn

        plgpu.barrier_arrive(free)
        walk.tiles(tile_)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        lambda *scratch: _ring.roles(
            many, lambda: load(*scratch), lambda: multiply(*scratch), _tiles.REGISTERS
        ),
        _tiles.memory(config, ROWS, d, q.dtype, many),
        _tiles.memory(config, step, d, q.dtype, config.stages),
        _tiles.memory(config, step, d, q.dtype, config.stages),
        (_tiles.staging(config, d, q.dtype), plgpu.SMEM((many, ROWS), jnp.float32)),
        tuple(plgpu.Barrier(num_arrivals=many) for _ in range(3)),
        [_ring.ring(config.stages, many, 1) for _ in range(2)],
        collective_axes="warpgroup",
    )


def _begin(sink: Any, head: Any) -> tuple[Array, Array]:
    """Sum and maximum of a row before the first step: those of its sink, if there is one."""
    if sink is None:
        return _tiles.numbers((ROWS,), 0.0), _tiles.numbers((ROWS,), LEAST)
    logit = sink[head] * LOG2E
    most = _tiles.numbers((ROWS,), lax.max(logit, jnp.float32(LEAST)))
    return jnp.exp2(_tiles.numbers((ROWS,), logit) - most), most
