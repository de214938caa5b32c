"""What can be wrong with the arguments of `attention`, and what to do about it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.ops import _validate as validate
from bsjax.pattern import BlockPattern, is_concrete
from bsjax.pattern._index import as_leaf
from bsjax.pattern._validate import sorted_coords

OP = "attention"


def heads(q: Any, k: Any, v: Any, op: str = OP) -> None:
    """`q[..., q, h, d]`, `k[..., s, g, d]`, `v[..., s, g, f]` of one dtype, g a divisor of h."""
    for name, a in (("q", q), ("k", k), ("v", v)):
        validate.array(op, name, a)
        if a.ndim < 3:
            raise ValueError(
                f"{op}: `{name}` must have axes (..., positions, heads, features), got shape "
                f"{a.shape}: add an axis for one head."
            )
        if a.dtype != q.dtype:
            raise TypeError(
                f"{op}: `q`, `k` and `v` must have one dtype, got {q.dtype} and {a.dtype} for "
                f"`{name}`: cast them before."
            )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{op}: `k` of shape {k.shape} and `v` of shape {v.shape} must agree in all axes but "
            "the last: each key has one value."
        )
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(
            f"{op}: `q` of shape {q.shape} and `k` of shape {k.shape} must have the same leading "
            "axes: broadcast one of them, or use jax.vmap."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: `q` of shape {q.shape} and `k` of shape {k.shape} must have equally many "
            "features, their last axis: scores are their products."
        )
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{op}: {k.shape[-2]} heads of keys do not divide {q.shape[-2]} heads of queries: each "
            "head of keys serves a group of equally many heads of queries."
        )


def pattern(p: Any, q: jax.Array, s: int) -> BlockPattern:
    """One pattern, one for each head, or one for each batch element and head, that fits."""
    if not isinstance(p, BlockPattern):
        raise TypeError(
            f"{OP}: `p` must be a BlockPattern, got {type(p).__name__}: build one with "
            "BlockPattern.from_mask(mask, block=...)."
        )
    for name, leaf in (("row", p.row), ("col", p.col)):
        found = getattr(leaf, "dtype", type(leaf).__name__)
        if found != jnp.int32:
            raise TypeError(
                f"{OP}: `p.{name}` must be int32, got {found}. Coordinates are indices: leave them "
                "out when a model is cast or averaged."
            )
    lead = p.row.shape[:-1]
    *batch, length, h, _ = q.shape
    if p.col.shape != p.row.shape or lead not in ((), (h,), (*batch, h)):
        raise ValueError(
            f"{OP}: expected one pattern with leaves [e], one for each head with [{h}, e], or one "
            f"for each batch element and head with [{', '.join(map(str, (*batch, h)))}, e], got "
            f"row {tuple(p.row.shape)} and col {tuple(p.col.shape)}."
        )
    (br, bc), wanted = p.block, (math.ceil(length / p.block[0]), math.ceil(s / p.block[1]))
    if p.grid != wanted:
        raise ValueError(
            f"{OP}: {length} queries in blocks of {br} and {s} keys in blocks of {bc} are a grid "
            f"of {wanted}, but the pattern has {p.grid}: build it for these lengths."
        )
    if p.capacity and not all(p.grid):
        raise ValueError(
            f"{OP}: the pattern has {p.capacity} slots, but no block exists in its grid {p.grid}: "
            "build it without spare capacity."
        )
    if is_concrete(p.row, p.col) and getattr(p.row, "is_fully_addressable", True):
        rows, cols = np.asarray(p.row), np.asarray(p.col)
        for i in np.ndindex(lead):
            sorted_coords(OP, rows[i], cols[i], p.grid)
    return jax.tree.map(as_leaf, p) if not isinstance(p.row, jax.Array) else p


def per_slot(name: str, a: Any, q: jax.Array, p: BlockPattern) -> jax.Array:
    """An array that broadcasts to `[..., h, e, br, bc]`, as `[#n, #h, #e, #br, #bc]`."""
    *batch, _, h, _ = q.shape
    wanted = (*batch, h, p.capacity, *p.block)
    own = (1,) * max(0, len(wanted) - a.ndim) + a.shape
    fits = len(own) == len(wanted) and all(
        size in (1, want) for size, want in zip(own, wanted, strict=True)
    )
    mixed = own[: len(batch)] not in (tuple(batch), (1,) * len(batch))
    if a.ndim < 3 or not fits or mixed:
        raise ValueError(
            f"{OP}: `{name}` of shape {a.shape} must broadcast to (..., h, e, br, bc) = {wanted}, "
            "a block for each slot of the pattern, with at least the last three axes: for an array "
            f"over all queries and keys, pass a function of indices that reads it."
        )
    return a.reshape(math.prod(own[: len(batch)]), *own[len(batch) :])


def sinks(a: Any, h: int) -> jax.Array:
    """One logit for each head."""
    a = validate.array(OP, "sinks", a)
    validate.shape(OP, "sinks", a, (h,), "one logit for each head")
    return a


def number(name: str, value: Any, positive: bool = False) -> float:
    """A number that is known when Python runs."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(
            f"{OP}: `{name}` must be a number that is known when Python runs, got {value!r}: to "
            "learn it, multiply q by it."
        )
    if not math.isfinite(value) or (positive and value <= 0):
        kind = "finite and over 0" if positive else "finite"
        raise ValueError(f"{OP}: `{name}` must be {kind}, got {value}.")
    return float(value)


def rate(value: Any) -> float:
    """A share from 0 to below 1."""
    value = number("dropout_rate", value)
    if not 0 <= value < 1:
        raise ValueError(f"{OP}: `dropout_rate` must be from 0 to below 1, got {value}.")
    return value


def whole(name: str, value: Any, lead: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Whole numbers `[*lead, *shape]`, or the same for all leading axes; int32 `[n, *shape]`."""
    if not hasattr(value, "dtype") and not isinstance(value, int):
        raise TypeError(
            f"{OP}: `{name}` must be an array, got {type(value).__name__}: wrap it in jnp.asarray."
        )
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{OP}: `{name}` must hold whole numbers, got {value.dtype}.")
    if value.shape not in (shape, (*lead, *shape)):
        raise ValueError(
            f"{OP}: `{name}` of shape {value.shape} must have shape {(*lead, *shape)}, or "
            f"{shape} for all leading axes."
        )
    value = jnp.broadcast_to(value, (*lead, *shape)).astype(jnp.int32)
    return value.reshape(math.prod(lead), *shape)


def key(value: Any) -> jax.Array:
    """The key of a dropout."""
    if value is None:
        raise ValueError(
            f"{OP}: `dropout_rate` is over 0, which needs a `key`: pass jax.random.key(seed), "
            "split for every call, or dropout_rate=0.0 outside training."
        )
    return validate.key(OP, value)


def boolean(name: str, a: Any, op: str = OP) -> jax.Array:
    """A bool array."""
    if not hasattr(a, "dtype") or a.dtype != jnp.bool_:
        found = getattr(a, "dtype", type(a).__name__)
        also = " or a function of (head, q_index, k_index)" if name == "mask" else ""
        raise TypeError(
            f"{op}: `{name}` must be a bool array{also}, got {found}: say what holds, for example "
            f"`{name} != 0`."
        )
    return jnp.asarray(a)
