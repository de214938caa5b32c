"""`top_blocks`: patterns of attention that depend on the data."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from bsjax.ops import _attention_validate as validate
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern
from bsjax.pattern._validate import pair, size

OP = "top_blocks"
ROWS = 1024  # queries whose scores are computed at a time


def top_blocks(
    q: Any,
    k: Any,
    *,
    block: Any,
    count: int,
    causal: bool = True,
    among: Any = None,
    capacity: int | None = None,
) -> tuple[BlockPattern, Bool[Array, "*n h e br 1"]]:
    """The `count` key blocks that fit each query best: `(p, chosen)`, under `jit` too.

        p, chosen = bsjax.top_blocks(q, k, block=64, count=3)
        y = bsjax.attention(q, k, v, p, mask=(chosen, bsjax.masks.causal()))

    The score of a key block is `<q, mean of its keys>`, for every query and head of
    `q[..., q, h, d]` and `k[..., s, g, d]`. If `causal`, the block of the query itself is always
    among the `count`, and later blocks never. `p`, one pattern for each batch element and head, has
    the blocks that any query of a query block chose; `chosen[..., h, e, br, 1]` says which queries
    of the block those are, so that a query sees nothing that only its neighbours chose. Neither has
    a gradient.

    `among`, bool that broadcasts to `[..., h, q, c]`: the blocks that each query chooses from.
    Where these are fewer than `count`, it has all of them. Or a function of query indices
    `[rows]` that gives `[..., h, rows, c]`: scores are computed for some thousand queries at a
    time, so that no array over all queries and key blocks is needed.

    `capacity` is the number of slots. If not given, it is the most that could ever be needed; if
    given and too small for one head, that head has no valid slot, and `bsjax.check(p)` says so.

    After Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs".
    """
    validate.heads(q, k, k, OP)
    br, bc = pair(OP, "block", block)
    count = size(OP, "count", count, least=1)
    (*lead, length, h, _), s = q.shape, k.shape[-3]
    if causal and length > s:
        raise ValueError(
            f"{OP}: {length} queries and {s} keys: with `causal` a query is at the position of a "
            "key, so there must be as many keys: give causal=False for cross-attention."
        )
    r, c = math.ceil(length / br), math.ceil(s / bc)
    reach = np.minimum(np.arange(1, r + 1) * br - 1, length - 1) // bc + 1 if causal else c
    most = int(np.minimum(np.broadcast_to(reach, r), br * count).sum())
    capacity = most if capacity is None else size(OP, "capacity", capacity)
    if among is not None and not callable(among):
        among = _among(among, (*lead, h, length, c))
    if not r * c:
        p = BlockPattern.from_mask(np.zeros((r, c), bool), (br, bc), capacity=capacity)
        empty = p, jnp.zeros((capacity, br, 1), bool)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, h, *a.shape)), empty)
    own = jnp.arange(length, dtype=jnp.int32) // bc if causal else None
    return select(q, block_means(k, bc), own, among, count, (br, bc), capacity)


def _among(value: Any, shape: tuple[int, ...]) -> Array:
    value = validate.boolean("among", value, OP)
    if value.ndim > len(shape) or any(
        size not in (1, want) for size, want in zip(value.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"{OP}: `among` of shape {value.shape} must broadcast to {shape}: the blocks of keys "
            "that each query of each head may choose."
        )
    return value.reshape((1,) * (len(shape) - value.ndim) + value.shape)


def block_means(k: Float[Array, "*n s g d"], bc: int) -> Float[Array, "*n c g d"]:
    """The mean of each block of keys, in what sums are kept in."""
    *lead, s, g, d = k.shape
    c = math.ceil(s / bc)
    k = lax.stop_gradient(k).astype(accumulator(k))
    k = jnp.pad(k, [(0, 0)] * len(lead) + [(0, c * bc - s), (0, 0), (0, 0)])
    members = np.minimum(bc, s - bc * np.arange(c)).reshape((1,) * len(lead) + (c, 1, 1))
    return k.reshape(*lead, c, bc, g, d).sum(-3) / jnp.asarray(members, k.dtype)


def choices(
    q: Float[Array, "*n q h d"],
    means: Float[Array, "*n c g d"],
    own: Int32[Array, " q"] | None,
    among: Bool[Array, "..."] | None,
    count: int,
) -> Bool[Array, "*n h q c"]:
    """The `count` blocks that fit each query best: its `own` first, none of the later ones."""
    best, allowed = _best(q, means, own, among, count)
    shape = (*best.shape[:-1], means.shape[-3])
    chosen = jnp.put_along_axis(jnp.zeros(shape, bool), best, True, -1, inplace=False)
    return chosen & allowed


def _best(q: Any, means: Any, own: Any, among: Any, count: int) -> tuple[Array, Array]:
    """The best blocks `[..., h, q, count]`, and which are allowed at all, `[..., h, q, c]`."""
    *lead, length, h, d = q.shape
    c, g = means.shape[-3:-1]
    q = lax.stop_gradient(q).astype(means.dtype).reshape(*lead, length, g, h // g, d)
    score = jnp.einsum("...qgjd,...cgd->...gjqc", q, means, precision=lax.Precision.HIGHEST)
    score = score.reshape(*lead, h, length, c)
    column, allowed = jnp.arange(c, dtype=jnp.int32)[None], jnp.ones((1, 1), bool)
    if own is not None:
        score = jnp.where(_lift(column == own[:, None], score), jnp.inf, score)
        allowed = column <= own[:, None]
    allowed = _lift(allowed, score)
    allowed = allowed if among is None else allowed & _lift(among, score)
    return lax.top_k(jnp.where(allowed, score, -jnp.inf), min(count, c))[1], allowed


def select(
    q: Float[Array, "*n q h d"],
    means: Float[Array, "*n c g d"],
    own: Int32[Array, " q"] | None,
    among: Any,
    count: int,
    block: tuple[int, int],
    capacity: int,
) -> tuple[BlockPattern, Bool[Array, "*n h e br 1"]]:
    """`by_query` of the `choices`, of so many queries at a time that their scores are few."""
    (*lead, length, h, _), c, br = q.shape, means.shape[-3], block[0]
    rows = br * max(1, ROWS // br)

    def narrowed(at: Array) -> Any:
        if callable(among):
            return _among(among(at), (*lead, h, at.shape[0], c))
        if among is None or among.ndim < 2 or among.shape[-2] == 1:
            return among
        return among.at[..., at, :].get(mode="clip")

    index = jnp.arange(length, dtype=jnp.int32)
    if length <= rows:
        return by_query(choices(q, means, own, narrowed(index), count), block, capacity)

    def some(first: Array) -> tuple[Array, Array]:
        at = first + jnp.arange(rows, dtype=jnp.int32)
        few = q.at[..., at, :, :].get(mode="clip")
        there = None if own is None else own.at[at].get(mode="clip")
        best, allowed = _best(few, means, there, narrowed(at), count)
        allowed = allowed & _lift((at < length)[:, None], allowed)
        allowed = jnp.broadcast_to(allowed, (*best.shape[:-1], c))
        best = jnp.where(jnp.take_along_axis(allowed, best, axis=-1), best, c)
        chosen = jnp.zeros((*best.shape[:-1], c), bool)
        chosen = chosen.at[(*jnp.indices(best.shape, sparse=True)[:-1], best)].set(
            True, mode="drop"
        )
        return best, chosen.reshape(*lead, h, rows // br, br, c).any(-2)

    parts = lax.map(some, jnp.arange(0, length, rows, dtype=jnp.int32))
    best, joined = (jnp.concatenate(list(a), axis=-2) for a in parts)
    r = math.ceil(length / br)

    @jax.vmap
    def one(best: Array, joined: Array) -> tuple[BlockPattern, Array]:
        p = BlockPattern.from_mask(joined[:r], block, capacity=capacity)
        best = best[: r * br].reshape(r, br, -1)
        return p, (best.at[p.row].get(mode="fill", fill_value=-1) == p.col[:, None, None]).any(-1)[
            ..., None
        ]

    found = one(*(a.reshape(-1, *a.shape[-2:]) for a in (best, joined)))
    return jax.tree.map(lambda a: a.reshape(*lead, h, *a.shape[1:]), found)


def _lift(a: Array, like: Array) -> Array:
    """With axes of size one, as many as `like` has."""
    return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def by_query(
    chosen: Bool[Array, "*n q c"], block: tuple[int, int], capacity: int
) -> tuple[BlockPattern, Bool[Array, "*n e br 1"]]:
    """The pattern of the key blocks that queries chose, and which of a block's queries did; none in
    spare slots."""
    (*lead, length, c), (br, _) = chosen.shape, block
    r = math.ceil(length / br)

    @jax.vmap
    def one(chosen: Array) -> tuple[BlockPattern, Array]:
        chosen = jnp.pad(chosen, ((0, r * br - length), (0, 0))).reshape(r, br, c)
        p = BlockPattern.from_mask(chosen.any(1), block, capacity=capacity)
        return p, chosen.at[p.row, :, p.col].get(mode="fill", fill_value=False)[..., None]

    found = one(chosen.reshape(math.prod(lead), length, c))
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), found)
