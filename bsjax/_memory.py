"""Persistent memory of attention: keys and values that are parameters, in front of all others."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax.pattern import BlockPattern


class Memory(NamedTuple):
    """Keys and values that every query sees, as parameters. After Sukhbaatar et al. 2019."""

    key: Float[Array, "n g d"]
    value: Float[Array, "n g d"]


def joined(memory: Memory, k: Array, v: Array, width: int) -> tuple[Array, Array]:
    """Persistent keys and values, scaled and padded, before the others.

    They are kept small, keys of variance 1 / d and values of variance 1 / N, and used large: so
    they learn as fast as weights do (Sukhbaatar et al. 2019).
    """
    n, _, d = memory.key.shape

    def join(a: Array, scale: float, b: Array) -> Array:
        a = jnp.pad(
            a.astype(b.dtype) * jnp.asarray(scale, b.dtype), ((0, width - n), (0, 0), (0, 0))
        )
        return jnp.concatenate([jnp.broadcast_to(a, (*b.shape[:-3], *a.shape)), b], axis=-3)

    # keys of a gathered cache may have more heads than parameters have
    share = k.shape[-2] // memory.key.shape[1]
    key, value = (jnp.repeat(a, share, axis=1) for a in memory)
    return join(key, d**0.5, k), join(value, n**0.5, v)


def behind(mask: Any, count: int, width: int) -> Any:
    """`mask` of keys that begin at `width`; the first `count` keys are seen by all."""

    def see(head: Any, q: Any, k: Any) -> Any:
        seen = k >= width
        if mask is not None:
            seen = seen & mask(head, q, jnp.maximum(k - width, 0))
        return (k < count) | seen

    return see


def zero_on(bias: Any, width: int) -> Any:
    """`bias` of keys that begin at `width`, none of those before."""

    def add(head: Any, q: Any, k: Any) -> Any:
        found = bias(head, q, jnp.maximum(k - width, 0))
        return jnp.where(k < width, jnp.zeros((), found.dtype), found)

    return add


def in_front(p: BlockPattern, full: Any, chosen: Any, columns: int) -> tuple[Any, Any, Any]:
    """Block-columns that every block-row stores before those of `p`, and their slots first."""
    (r, c), lead = p.grid, p.row.shape[:-1]
    rows, cols = np.tile(np.arange(r, dtype=np.int32), columns), np.arange(columns, dtype=np.int32)
    first = (np.broadcast_to(a, (*lead, r * columns)) for a in (rows, np.repeat(cols, r)))
    row, col = (
        jnp.concatenate(pair, axis=-1) for pair in zip(first, (p.row, p.col + columns), strict=True)
    )
    if full is not None:
        full = jnp.concatenate([jnp.zeros((*full.shape[:-1], r * columns), bool), full], axis=-1)

    def with_front(a: Array) -> Array:
        front = [(0, 0)] * (a.ndim - 3) + [(r * columns, 0), (0, 0), (0, 0)]
        return jnp.pad(a, front, constant_values=True)

    return BlockPattern(row, col, (r, c + columns), p.block), full, tuple(map(with_front, chosen))


def inits(head_dim: int, count: int) -> tuple[Any, Any]:
    """Of persistent keys, of variance 1 / d, and values, of variance 1 / N."""
    normal = jax.nn.initializers.normal
    return normal(head_dim**-0.5), normal(count**-0.5)
