"""What can be wrong with the arguments of an operation, and what to do about it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.pattern import BlockPattern, is_concrete
from bsjax.pattern._index import as_leaf
from bsjax.pattern._validate import sorted_coords

KINDS = "float32, bfloat16, float16 or float64"
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def array(op: str, name: str, value: Any, ndim: int | None = None) -> jax.Array:
    """A floating-point array with `ndim` axes."""
    if isinstance(value, BlockPattern):
        raise TypeError(
            f"{op}: `{name}` is a BlockPattern, expected an array: the pattern comes last."
        )
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(
            f"{op}: `{name}` must be an array, got {type(value).__name__}: wrap it in jnp.asarray."
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: `{name}` must be floating point ({KINDS}), got {value.dtype}: "
            f"cast it first, for example `{name}.astype(jnp.float32)`."
        )
    if ndim is not None and len(value.shape) != ndim:
        raise ValueError(f"{op}: `{name}` must have {ndim} axes, got shape {tuple(value.shape)}.")
    return jnp.asarray(value)


def pattern(op: str, p: Any) -> BlockPattern:
    """A single pattern, with int32 coordinates that are in order where they can be seen."""
    if not isinstance(p, BlockPattern):
        hint = ": build one with BlockPattern.from_mask(mask, block=...)"
        raise TypeError(f"{op}: `p` must be a BlockPattern, got {type(p).__name__}{hint}.")
    for name, leaf in (("row", p.row), ("col", p.col)):
        found = getattr(leaf, "dtype", type(leaf).__name__)
        if found != jnp.int32:
            raise TypeError(
                f"{op}: `p.{name}` must be int32, got {found}. Coordinates are indices: leave "
                "them out when a model is cast or averaged (with nnx, update only nnx.Param; else "
                "cast only floating-point leaves)."
            )
    if p.row.ndim != 1 or p.col.shape != p.row.shape:
        raise ValueError(
            f"{op}: expected one pattern with leaves [e], got row {tuple(p.row.shape)} and col "
            f"{tuple(p.col.shape)}: use jax.vmap over the leading axes."
        )
    if p.capacity and not all(p.grid):
        raise ValueError(
            f"{op}: the pattern has {p.capacity} slots, but no block exists in its grid {p.grid}: "
            "build it without spare capacity."
        )
    if is_concrete(p.row, p.col) and getattr(p.row, "is_fully_addressable", True):
        sorted_coords(op, np.asarray(p.row), np.asarray(p.col), p.grid)
    if not isinstance(p.row, jax.Array):  # on the host, as restored or after jax.device_get
        p = jax.tree.map(as_leaf, p)
    return p


def values(op: str, name: str, value: Any, p: BlockPattern) -> jax.Array:
    """Values `[e, br, bc]` of `p`."""
    value = array(op, name, value)
    wanted = (p.capacity, *p.block)
    if value.shape != wanted:
        raise ValueError(
            f"{op}: `{name}` of shape {value.shape} does not fit the pattern: expected "
            f"(e, br, bc) = {wanted}, one block for each slot."
        )
    return value


def last_axis(op: str, name: str, value: jax.Array, size: int, p: BlockPattern, doing: str) -> None:
    """The features of an activation."""
    if value.ndim == 0 or value.shape[-1] != size:
        raise ValueError(
            f"{op}: `{name}` of shape {value.shape} cannot {doing} a sparse matrix of shape "
            f"{p.shape}: expected (..., {size})."
        )


def same_lead(op: str, x: jax.Array, y: jax.Array, name: str = "y") -> None:
    """Two activations over the same tokens."""
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{op}: `x` and `{name}` must have the same leading axes, got shapes {x.shape} and "
            f"{y.shape}."
        )


def shape(op: str, name: str, value: jax.Array, wanted: tuple[int, ...], meaning: str) -> None:
    """An exact shape."""
    if value.shape != wanted:
        raise ValueError(
            f"{op}: `{name}` of shape {value.shape} must have shape {wanted}, {meaning}."
        )


def optional(
    op: str, name: str, value: Any, wanted: tuple[int, ...], meaning: str
) -> jax.Array | None:
    """A floating-point array of an exact shape, if any."""
    if value is None:
        return None
    value = array(op, name, value)
    shape(op, name, value, wanted, meaning)
    return value


def extras(
    op: str, p: BlockPattern, gate: Any, bias: Any, residual: Any, out: tuple[int, ...], axis: str
) -> tuple[jax.Array | None, ...]:
    """What a product of shape `out` may have besides its operands."""
    gate = optional(op, "gate", gate, (p.capacity,), "one number for each slot")
    bias = optional(op, "bias", bias, out[-1:], f"one number for each {axis} of the output")
    return gate, bias, optional(op, "residual", residual, out, "that of the output")


def flag(op: str, name: str, value: Any) -> bool:
    """A plain truth value: neither a permutation of axes nor a tracer."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: `{name}` must be True or False, got {value!r}.")
    return bool(value)


def key(op: str, key: Any) -> jax.Array:
    """A PRNG key, typed or raw; an integer seed is a mistake that would repeat silently."""
    if hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if hasattr(key, "dtype") and key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(
        f"{op}: `key` must be one PRNG key, got {key!r}: make one with jax.random.key(seed) and "
        "split it for every call."
    )


def one_of(op: str, name: str, got: Any, names: tuple[str, ...]) -> None:
    """One of some names."""
    if got not in names:
        wanted = ", ".join(f'"{one}"' for one in names)
        raise ValueError(f"{op}: `{name}` must be one of {wanted}, got {got!r}.")


def fraction(op: str, value: Any) -> float:
    """What is computed of the whole: known when Python runs, since shapes depend on it."""
    if not isinstance(value, int | float | np.floating) or isinstance(value, bool):
        raise TypeError(
            f"{op}: `fraction` must be a number that is known when Python runs, since shapes "
            f"depend on it, got {value!r}: under jit make it a static argument."
        )
    if not 0 < value <= 1:
        raise ValueError(f"{op}: `fraction` must be over 0 and at most 1, got {value}.")
    return float(value)


def finite(op: str, scores: jax.Array, names: str) -> jax.Array:
    """Scores, from the arguments `names`, without NaN where they can be seen."""
    if is_concrete(scores) and getattr(scores, "is_fully_addressable", True):
        wrong = scores.size - int(np.isfinite(np.asarray(scores)).sum())
        if wrong:
            raise ValueError(
                f"{op}: {wrong} of {scores.size} scores are NaN or infinite, expected finite "
                f"norms: look for NaN, or numbers over 1e19, in {names}."
            )
    return scores


def precision(op: str, value: Any) -> Any:
    """None means full float32 for float32 operands."""
    if value is None:
        return jax.lax.Precision.HIGHEST
    try:
        return jax.lax.Precision(value)
    except ValueError:
        names = ", ".join(f'"{p.name.lower()}"' for p in jax.lax.Precision)
        raise ValueError(
            f"{op}: `precision` must be None, a jax.lax.Precision or one of {names}, got {value!r}."
        ) from None
