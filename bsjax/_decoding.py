"""Attention to a cache of keys and values: only the blocks are read that the new queries need."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from bsjax._attention import LAYER, Options, grid, positioned, run, seen_from
from bsjax.ops._reference import accumulator
from bsjax.ops._top_blocks import block_means, by_query, choices
from bsjax.pattern import BlockPattern, is_concrete


def written(cache: Array, new: Array, start: Any) -> Array:
    """`cache[..., s, g, d]` with the positions `new` from `start` on."""
    if cache.shape[:-3] != new.shape[:-3] or cache.shape[-2:] != new.shape[-2:]:
        raise ValueError(
            f"{LAYER}: the cache has shape {cache.shape}, but new keys have {new.shape}: make it "
            "for inputs of these leading axes."
        )
    if new.shape[-3] > cache.shape[-3]:
        raise ValueError(
            f"{LAYER}: {new.shape[-3]} positions do not fit a cache of {cache.shape[-3]}: make it "
            "for the longest sequence."
        )
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=-3)


def check_cross(o: Options, pattern: Any) -> None:
    """Attention to other inputs does not know the positions of the queries that are decoded."""
    if o.rotary or o.mask is not None or pattern is not None:
        raise ValueError(
            f"{LAYER}: a mask, a pattern or rotary positions between decoded queries and "
            "`inputs_k` are not supported, since these have no cache that counts positions: "
            "leave them out of attention to an encoder."
        )


def room(start: Any, count: int, size: int) -> None:
    """An error if positions do not fit, where this can be seen."""
    if is_concrete(start) and int(start) + count > size:
        raise ValueError(
            f"{LAYER}: the cache holds {size} positions and {int(start)} are taken, so {count} "
            "more do not fit: make it for the longest sequence."
        )


def attend_cached(
    o: Options,
    q: Array,
    k: Array,
    v: Array,
    start: Any,
    means: Any = None,
    *,
    pattern: BlockPattern | None,
    bias: Any = None,
    **params: Any,
) -> Float[Array, "*n t hd"]:
    """Attention of `q[..., t, h, d]`, at positions from `start` on, to caches `[..., s, g, d]`.

    A query sees what it sees in the whole sequence, but no key behind itself. NaN where positions
    lie behind the cache.
    """
    t, s, (br, bc) = q.shape[-3], k.shape[-3], o.block
    start = jnp.asarray(start, jnp.int32)
    blocks = grid(o, pattern, (s, s))
    c, counted = blocks.shape[-1], isinstance(blocks, np.ndarray)
    most = int(blocks.sum(-1).max(initial=0)) if counted else c
    at = start + jnp.arange(t, dtype=jnp.int32)
    column = jnp.arange(c, dtype=jnp.int32)
    stored = jnp.asarray(blocks).at[..., at // br, :].get(mode="clip")
    past = (column[None] * bc <= at[:, None]).reshape((1,) * (blocks.ndim - 2) + (t, c))
    stored = stored & past
    # so many block-rows may share the positions of one block of queries
    shared = 1 if t == 1 else 2
    if o.top_blocks is not None:  # each of these positions makes choices of its own
        stored = choices(q, _padded(means, c), at // bc, stored, o.top_blocks)
        most, shared, counted = min(most, o.top_blocks), min(t, br), True
    width = min(c, shared * most)
    # lists that end early read less than blocks side by side where those may be all
    listed = t > br or not counted or (o.top_blocks is not None and t > 1 and width == c)

    def moved(head: Any, q: Any, k: Any) -> Any:
        return bias(head, start + q, k)

    functions = seen_from(o, start), None if bias is None else moved

    def out(o: Options) -> Array:
        return (_in_rows if listed else _gathered)(o, q, k, v, stored, width, functions, params)

    # `auto` takes slots for blocks, and of such lists most slots may be spare
    if o.implementation == "auto" and listed and (not counted or o.top_blocks is not None):
        lists = dataclasses.replace(o, implementation="xla")
        found = lax.platform_dependent(cpu=lambda: out(lists), default=lambda: out(o))
    else:
        found = out(o)
    return jnp.where(start + t <= s, found, jnp.nan)


def _gathered(
    o: Options, q: Array, k: Array, v: Array, stored: Bool[Array, "*n t c"], width: int,
    functions: tuple[Any, Any], params: dict[str, Any],
) -> Array:  # fmt: skip
    """One block of queries: its key blocks side by side, which any implementation reads."""
    if stored.ndim > 3:  # which differ between batch elements

        @jax.vmap
        def one(q: Array, k: Array, v: Array, stored: Array) -> Array:
            return _gathered(o, q, k, v, stored, width, functions, params)

        return one(q, k, v, stored)
    t, bc, c = stored.shape[-2], o.block[1], stored.shape[-1]

    def listed(need: Array) -> Int32[Array, " w"]:
        return jnp.nonzero(need, size=width, fill_value=c)[0].astype(jnp.int32)

    per_head = stored.ndim == 3
    need = stored.any(-2)
    cols = jax.vmap(listed)(need) if per_head else listed(need)
    chosen = jnp.take_along_axis(stored, jnp.minimum(cols, c - 1)[..., None, :], axis=-1)
    first = cols * bc  # of each block; behind all queries where there is none
    places = first[..., None] + jnp.arange(bc, dtype=jnp.int32).reshape((1,) * cols.ndim + (bc,))
    places = places.reshape(*cols.shape[:-1], width * bc)
    places = places.T if per_head else places[:, None]  # [w * bc, heads of keys]
    count = o.num_heads if per_head else k.shape[-2]
    head = np.arange(count, dtype=np.int32)[None] // (count // k.shape[-2])
    k, v = (a.at[..., places, head, :].get(mode="clip") for a in (k, v))

    def placed(function: Any) -> Any:
        def at(h: Any, i: Any, j: Any) -> Any:
            own = first[h] if per_head else first
            return function(h, i, own[j // bc] + j % bc)

        return None if function is None else at

    seen, bias = map(placed, functions)
    p = BlockPattern.from_mask(np.ones((1, width), bool), (t, bc))
    rows = () if t == 1 else (chosen.swapaxes(-1, -2)[..., None],)
    return run(o, q, k, v, p, seen, rows, bias=bias, **params)


def _in_rows(
    o: Options, q: Array, k: Array, v: Array, stored: Bool[Array, "*n t c"], width: int,
    functions: tuple[Any, Any], params: dict[str, Any],
) -> Array:  # fmt: skip
    """Many blocks of queries: a pattern of those that begin at `start`."""
    t, bc = stored.shape[-2], o.block[1]
    br = min(max(1, t), o.block[0])
    p, chosen = by_query(stored, (br, bc), -(-t // br) * width)
    seen, bias = functions
    return run(o, q, k, v, p, seen, (chosen,), bias=bias, **params)


class State(NamedTuple):
    """A cache, how many of its positions are taken, and what blocks are chosen by."""

    key: Float[Array, "*n s g d"]
    value: Float[Array, "*n s g d"]
    index: Int32[Array, ""]
    mean: Float[Array, "*n c g d"] | None = None  # of each whole block of keys


# what both dialects call its parts
CACHE = ("cached_key", "cached_value", "cache_index", "cached_mean")


def empty(o: Options, input_shape: tuple[int, ...], dtype: Any) -> State:
    """For inputs `(..., positions, features)`."""
    *lead, s, _ = input_shape
    kept = (o.num_kv_heads, o.head_dim)
    key, value = (jnp.zeros((*lead, s, *kept), dtype) for _ in range(2))
    mean = None
    if o.top_blocks is not None:
        mean = jnp.zeros((*lead, s // o.block[1], *kept), accumulator(key))
    return State(key, value, jnp.int32(0), mean)


def step(
    o: Options,
    state: State,
    q: Array,
    k: Array,
    v: Array,
    positions: Any,
    others: Any,
    **params: Any,
) -> tuple[Array, State]:
    """The next positions: what they see, and the cache with them in it."""
    if any(one is not None for one in others):
        raise ValueError(
            f"{LAYER}: segments and `kv_lengths` do not go with decoding: all sequences of a cache "
            "have the same positions. Decode sequences of other lengths apart."
        )
    count, start = q.shape[-3], state.index
    room(start, count, state.key.shape[-3])
    if positions is None:
        positions = start + jnp.arange(count, dtype=jnp.int32)
    q, k = positioned(o, q, k, positions, True)
    key, value = (written(a, b, start) for a, b in zip(state[:2], (k, v), strict=True))
    means = None if state.mean is None else _renewed(state.mean, key, start, count, o.block[1])
    y = attend_cached(o, q, key, value, start, means, **params)
    return y, State(key, value, start + count, means)


def _renewed(means: Array, key: Array, start: Any, count: int, bc: int) -> Array:
    """The means of the blocks that new positions are in; those of others remain."""
    few = min(means.shape[-3], (count - 1) // bc + 2)
    first = jnp.clip(start // bc, 0, means.shape[-3] - few)
    new = block_means(lax.dynamic_slice_in_dim(key, first * bc, few * bc, axis=-3), bc)
    old = lax.dynamic_slice_in_dim(means, first, few, axis=-3)
    begin = (first + jnp.arange(few, dtype=jnp.int32)) * bc
    changed = (begin < start + count) & (start < begin + bc)
    new = jnp.where(changed.reshape((1,) * (means.ndim - 3) + (few, 1, 1)), new, old)
    return lax.dynamic_update_slice_in_dim(means, new, first, axis=-3)


def _padded(means: Array, count: int) -> Array:
    """A last block that ends early is chosen by its own queries only, whatever its mean."""
    short = count - means.shape[-3]
    return jnp.pad(means, [(0, 0)] * (means.ndim - 3) + [(0, short), (0, 0), (0, 0)])
