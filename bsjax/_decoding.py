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
from bsjax.ops._top_blocks import block_means, by_query, choices, select
from bsjax.pattern import BlockPattern, is_concrete


def fits(cache: Array, new: Array) -> None:
    """An error if `cache[..., s, g, d]` is not one for `new[..., t, g, d]`."""
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


def written(cache: Array, new: Array, start: Any) -> Array:
    """`cache[..., s, g, d]` with the positions `new` from `start` on."""
    fits(cache, new)
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=-3)


def check_cross(o: Options, pattern: Any) -> None:
    """Attention to other inputs does not know the positions of the queries that are decoded."""
    if o.rotary or o.mask is not None or pattern is not None:
        raise ValueError(
            f"{LAYER}: a mask, a pattern or rotary positions between decoded queries and "
            "`inputs_k` are not supported, since these have no cache that counts positions: "
            "leave them out of attention to an encoder."
        )


def room(start: Any, count: Any, size: int) -> None:
    """An error if positions do not fit, where this can be seen."""
    if not is_concrete(start, count):
        return
    taken, more = (a.ravel() for a in np.broadcast_arrays(np.asarray(start), np.asarray(count)))
    if len(taken) and (taken + more).max() > size:
        worst = int((taken + more).argmax())
        raise ValueError(
            f"{LAYER}: the cache holds {size} positions and {taken[worst]} are taken, so "
            f"{more[worst]} more do not fit: make it for the longest sequence."
        )


def coming(layer: str, index: Array, count: int, lengths: Any) -> tuple[Array, Array | int]:
    """The positions `[..., t]` of the next `count` ones, and how many of them each sequence has, of
    a cache that has counted `index[...]` for each sequence, or `index` for all."""
    steps = jnp.arange(count, dtype=jnp.int32).reshape((1,) * index.ndim + (count,))
    at = index[..., None] + steps
    if lengths is None:
        return at, count
    if not index.ndim:
        raise ValueError(
            f"{layer}: `kv_lengths` do not go with this cache, in which all sequences have the "
            "same positions: make one that counts those of each sequence, with `ragged=True`."
        )
    lengths = jnp.asarray(lengths, jnp.int32)
    if lengths.shape != index.shape:
        raise ValueError(
            f"{layer}: `kv_lengths` of shape {lengths.shape} must have {index.shape}: how many of "
            "the new positions each sequence has."
        )
    more = lengths.clip(0, count)
    # those that do not count may lie past the end of a table: they are where the last one is
    return jnp.minimum(at, (index + more - 1).clip(0)[..., None]), more


def attend_cached(
    o: Options,
    q: Array,
    k: Array,
    v: Array,
    start: Any,
    means: Any = None,
    *,
    more: Any = None,
    pattern: BlockPattern | None,
    bias: Any = None,
    **params: Any,
) -> Float[Array, "*n t hd"]:
    """Attention of `q[..., t, h, d]`, at positions from `start` on, to caches `[..., s, g, d]`.

    A query sees what it sees in the whole sequence, but no key behind itself. NaN where positions
    lie behind the cache, of the first `more` queries if not of all.
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
        most, shared, counted = min(most, o.top_blocks), min(t, br), True
    width = min(c, shared * most)
    # lists that end early read less than blocks side by side where those may be all
    listed = t > br or not counted or (o.top_blocks is not None and t > 1 and width == c)
    rows = (min(max(1, t), br), bc)
    slots = -(-t // rows[0]) * width
    if o.top_blocks is not None:
        to_choose = q, _padded(means, c), at // bc, stored, o.top_blocks
        found = select(*to_choose, rows, slots) if listed else choices(*to_choose)
    else:
        found = by_query(stored, rows, slots) if listed else stored

    def moved(head: Any, q: Any, k: Any) -> Any:
        return bias(head, start + q, k)

    functions = seen_from(o, start), None if bias is None else moved

    def out(o: Options) -> Array:
        if not isinstance(found, tuple):
            return _gathered(o, q, k, v, found, width, functions, params)
        (p, chosen), (seen, bias) = found, functions  # many blocks of queries
        return run(o, q, k, v, p, seen, (chosen,), bias=bias, **params)

    # `auto` takes slots for blocks, and of such lists most slots may be spare
    if o.implementation == "auto" and listed and (not counted or o.top_blocks is not None):
        lists = dataclasses.replace(o, implementation="xla")
        y = lax.platform_dependent(cpu=lambda: out(lists), default=lambda: out(o))
    else:
        y = out(o)
    return jnp.where(start + (t if more is None else more) <= s, y, jnp.nan)


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


class State(NamedTuple):
    """A cache, how many of its positions are taken, and what blocks are chosen by."""

    key: Float[Array, "*n s g d"]
    value: Float[Array, "*n s g d"]
    index: Int32[Array, "..."]  # [*n] where each sequence has positions of its own
    mean: Float[Array, "*n c g d"] | None = None  # of each whole block of keys


# what both dialects call its parts
CACHE = ("cached_key", "cached_value", "cache_index", "cached_mean")


def empty(o: Options, input_shape: tuple[int, ...], dtype: Any, ragged: bool) -> State:
    """For inputs `(..., positions, features)`."""
    *lead, s, _ = input_shape
    kept = (o.num_kv_heads, o.head_dim)
    key, value = (jnp.zeros((*lead, s, *kept), dtype) for _ in range(2))
    mean = None
    if o.top_blocks is not None:
        mean = jnp.zeros((*lead, s // o.block[1], *kept), accumulator(key))
    return State(key, value, jnp.zeros(lead if ragged else (), jnp.int32), mean)


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
    *segments, lengths = others
    if any(ids is not None for ids in segments):
        raise ValueError(
            f"{LAYER}: segments do not go with decoding: decode each document as a sequence of its "
            "own, with `kv_lengths` and a cache that is `ragged`."
        )
    count, start = q.shape[-3], state.index
    at, more = coming(LAYER, start, count, lengths)
    room(start, more, state.key.shape[-3])
    fits(state.key, k)
    q, k = positioned(o, q, k, at if positions is None else positions, True)
    if start.ndim:
        return _ragged(o, state, q, k, v, at, jnp.broadcast_to(more, start.shape), **params)
    key, value = (written(a, b, start) for a, b in zip(state[:2], (k, v), strict=True))
    means = None if state.mean is None else _renewed(state.mean, key, start, count, o.block[1])
    y = attend_cached(o, q, key, value, start, means, **params)
    return y, State(key, value, start + count, means)


def _ragged(
    o: Options, state: State, q: Array, k: Array, v: Array, at: Array, more: Array, **params: Any
) -> tuple[Array, State]:
    """`step` of sequences with positions of their own: the first `more[...]` of the new ones count,
    and the others are not written. What these give is of no use, but finite."""
    count, size = q.shape[-3], state.key.shape[-3]
    steps = jnp.arange(count, dtype=jnp.int32).reshape((1,) * more.ndim + (count,))
    at = jnp.where(steps < more[..., None], at, size)

    def one(state: State, q: Array, k: Array, v: Array, at: Array, more: Array) -> Any:
        key, value = (
            old.at[at].set(new.astype(old.dtype), mode="drop")
            for old, new in zip(state[:2], (k, v), strict=True)
        )
        start, means = state.index, state.mean
        # blocks behind the last new position are renewed in vain, and again when they are written
        means = None if means is None else _renewed(means, key, start, count, o.block[1])
        y = attend_cached(o, q, key, value, start, means, more=more, **params)
        return y, State(key, value, start + more, means)

    for _ in range(more.ndim):
        one = jax.vmap(one)
    return one(state, q, k, v, at, more)


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
