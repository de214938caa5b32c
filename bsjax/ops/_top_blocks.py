"""`top_blocks`: patterns of attention that depend on the data."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from bsjax.ops import _attention_validate as validate
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern
from bsjax.pattern._validate import pair, size

OP = "top_blocks"


def top_blocks(
    q: Any, k: Any, *, block: Any, count: int, causal: bool = True, capacity: int | None = None
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

    `capacity` is the number of slots. If not given, it is the most that could ever be needed; if
    given and too small for one head, that head has no valid slot, and `bsjax.check(p)` says so.

    After Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs".
    """
    validate.heads(q, k, k, OP)
    br, bc = pair(OP, "block", block)
    count = size(OP, "count", count, least=1)
    *lead, length, h, d = q.shape
    s, g = k.shape[-3:-1]
    if causal and length > s:
        raise ValueError(
            f"{OP}: {length} queries and {s} keys: with `causal` a query is at the position of a "
            "key, so there must be as many keys: give causal=False for cross-attention."
        )
    r, c, n = math.ceil(length / br), math.ceil(s / bc), math.prod(lead)
    reach = np.minimum(np.arange(1, r + 1) * br - 1, length - 1) // bc + 1 if causal else c
    most = int(np.minimum(np.broadcast_to(reach, r), br * count).sum())
    capacity = most if capacity is None else size(OP, "capacity", capacity)
    q, k = (lax.stop_gradient(a).reshape(n, *a.shape[len(lead) :]) for a in (q, k))
    q, k = (a.astype(accumulator(a)) for a in (q, k))
    own = jnp.arange(length, dtype=jnp.int32)[:, None] // bc
    column = jnp.arange(c, dtype=jnp.int32)[None]
    allowed = column <= own if causal else jnp.ones((length, c), bool)

    def chosen_by(q: Array, k: Array) -> Array:
        """`q[q, d]`, `k[s, d]` of one head: bool `[q, c]`."""
        padded = jnp.pad(k, ((0, c * bc - s), (0, 0))).reshape(c, bc, d).sum(1)
        members = jnp.minimum(bc, s - bc * jnp.arange(c)).astype(k.dtype)
        score = jnp.matmul(q, (padded / members[:, None]).T, precision=lax.Precision.HIGHEST)
        if causal:
            score = jnp.where(column == own, jnp.inf, jnp.where(allowed, score, -jnp.inf))
        best = lax.top_k(score, min(count, c))[1]
        rows = jnp.arange(length, dtype=jnp.int32)[:, None]
        return jnp.zeros((length, c), bool).at[rows, best].set(True) & allowed

    def one(q: Array, k: Array) -> tuple[BlockPattern, Array]:
        if not r * c:
            p = BlockPattern.from_mask(np.zeros((r, c), bool), (br, bc), capacity=capacity)
            return p, jnp.zeros((capacity, br, 1), bool)
        return by_query(chosen_by(q, k), (br, bc), capacity)

    k = jnp.repeat(k, h // g, axis=2)
    p, chosen = jax.vmap(jax.vmap(one, (1, 1)))(q, k)
    shape = (*lead, h)
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[2:]), (p, chosen))


def by_query(
    chosen: Bool[Array, "q c"], block: tuple[int, int], capacity: int
) -> tuple[BlockPattern, Bool[Array, "e br 1"]]:
    """The pattern of the key blocks that queries chose, and which of a block's queries did."""
    length, c = chosen.shape
    r, br = math.ceil(length / block[0]), block[0]
    chosen = jnp.pad(chosen, ((0, r * br - length), (0, 0))).reshape(r, br, c)
    p = BlockPattern.from_mask(chosen.any(1), block, capacity=capacity)
    return p, chosen.at[p.row, :, p.col].get(mode="clip")[..., None]
