"""Attention to a cache of keys and values: only the blocks are read that the new queries need."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from bsjax._attention import LAYER, Memory, Options, positioned, run
from bsjax.ops._top_blocks import by_query
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
    *,
    pattern: BlockPattern | None,
    sinks: Any = None,
    memory: Memory | None = None,
) -> Float[Array, "*n t hd"]:
    """Attention of `q[..., t, h, d]`, at positions from `start` on, to caches `[..., s, g, d]`.

    A query sees what it sees in the whole sequence, but no key behind itself. NaN where positions
    lie behind the cache.
    """
    t, s, (br, bc) = q.shape[-3], k.shape[-3], o.block
    start = jnp.asarray(start, jnp.int32)
    grid = _grid(o, pattern, s)
    c = grid.shape[-1]
    most = int(grid.sum(-1).max(initial=0)) if isinstance(grid, np.ndarray) else c
    at = start + jnp.arange(t, dtype=jnp.int32)
    column = jnp.arange(c, dtype=jnp.int32)
    stored = jnp.asarray(grid).at[..., at // br, :].get(mode="clip")
    stored = stored & (column[None] * bc <= at[:, None]).reshape((1,) * (grid.ndim - 2) + (t, c))
    # so many block-rows may share the positions of one block of queries
    shared = 1 if t == 1 else 2
    counted = isinstance(grid, np.ndarray)
    # where blocks cannot be counted, lists that end early read less than a block of them all
    form = _gathered if t <= br and counted else _in_rows

    def out(o: Options) -> Array:
        return form(o, q, k, v, start, stored, min(c, shared * most), sinks, memory)

    if counted or o.implementation != "auto":
        found = out(o)
    else:  # which takes slots for blocks, and here there is room for all of them
        lists = dataclasses.replace(o, implementation="xla")
        found = lax.platform_dependent(cpu=lambda: out(lists), default=lambda: out(o))
    return jnp.where(start + t <= s, found, jnp.nan)


def _grid(o: Options, pattern: BlockPattern | None, s: int) -> Any:
    """`[*h, r, c]`: which blocks the whole sequence stores."""
    shape = tuple(math.ceil(s / side) for side in o.block)
    if pattern is not None:
        if pattern.grid != shape:
            raise ValueError(
                f"{LAYER}: a cache of {s} positions in blocks of {o.block} is a grid of {shape}, "
                f"but `pattern` has {pattern.grid}: make the cache as long as the sequences that "
                "the pattern is for."
            )
        return pattern.mask()
    return np.ones(shape, bool) if o.mask is None else o.mask.blocks((s, s), o.block)[0]


def _seen(o: Options, start: Any) -> Any:
    """The mask at positions that begin at `start`; nothing behind a query."""

    def see(head: Any, q: Any, k: Any) -> Any:
        past = k <= start + q
        return past if o.mask is None else past & o.mask(head, start + q, k)

    return see


def _gathered(
    o: Options, q: Array, k: Array, v: Array, start: Any, stored: Bool[Array, "*h t c"],
    width: int, sinks: Any, memory: Memory | None,
) -> Array:  # fmt: skip
    """One block of queries: its key blocks side by side, which any implementation reads."""
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
    seen = _seen(o, start)

    def mask(h: Any, i: Any, j: Any) -> Any:
        own = first[h] if per_head else first
        return seen(h, i, own[j // bc] + j % bc)

    p = BlockPattern.from_mask(np.ones((1, width), bool), (t, bc))
    rows = () if t == 1 else (chosen.swapaxes(-1, -2)[..., None],)
    return run(o, q, k, v, p, mask, rows, sinks=sinks, memory=memory)


def _in_rows(
    o: Options, q: Array, k: Array, v: Array, start: Any, stored: Bool[Array, "*h t c"],
    width: int, sinks: Any, memory: Memory | None,
) -> Array:  # fmt: skip
    """Many blocks of queries: a pattern of those that begin at `start`."""
    t, bc = stored.shape[-2], o.block[1]
    br = min(max(1, t), o.block[0])
    pack = functools.partial(by_query, block=(br, bc), capacity=-(-t // br) * width)
    p, chosen = jax.vmap(pack)(stored) if stored.ndim == 3 else pack(stored)
    return run(o, q, k, v, p, _seen(o, start), (chosen,), sinks=sinks, memory=memory)


class State(NamedTuple):
    """A cache, and how many of its positions are taken."""

    key: Float[Array, "*n s g d"]
    value: Float[Array, "*n s g d"]
    index: Int32[Array, ""]


def empty(o: Options, input_shape: tuple[int, ...], dtype: Any) -> State:
    """For inputs `(..., positions, features)`."""
    shape = (*input_shape[:-1], o.num_kv_heads, o.head_dim)
    return State(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0))


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
    y = attend_cached(o, q, key, value, start, **params)
    return y, State(key, value, start + count)
