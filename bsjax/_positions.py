"""Learned positions: what the modules of both Flax dialects share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax.pattern import is_concrete

LAYER = "LearnedPositions"
INIT = jax.nn.initializers.normal(0.02)


def added(x: Array, table: Array, positions: Any, dtype: Any) -> Float[Array, "*n t d"]:
    """`x[..., t, d] + table[positions]`, of `positions[t]` or `[..., t]`; NaN past the end."""
    length, features = table.shape
    if x.ndim < 2 or x.shape[-1] != features:
        raise ValueError(
            f"{LAYER}: `x` of shape {x.shape} must be (..., positions, {features}): the table has "
            f"{features} features."
        )
    if is_concrete(positions):
        positions = np.asarray(positions)
        least, most = int(positions.min(initial=0)), int(positions.max(initial=0))
        if least < 0 or most >= length:
            raise ValueError(
                f"{LAYER}: position {most if most >= length else least} is not one of the {length} "
                "of the table: make it for the longest sequence."
            )
    positions = jnp.asarray(positions, jnp.int32)
    if positions.shape not in (x.shape[-2:-1], x.shape[:-1]):
        raise ValueError(
            f"{LAYER}: `input_positions` of shape {positions.shape} must have {x.shape[-2:-1]} or "
            f"{x.shape[:-1]}: a number for each position."
        )
    at = jnp.where(positions < 0, length, positions)  # which would count from the end
    rows = table.at[at].get(mode="fill", fill_value=jnp.nan)
    rows = rows.reshape((1,) * (x.ndim - rows.ndim) + rows.shape)
    dtype = x.dtype if dtype is None else dtype
    return x.astype(dtype) + rows.astype(dtype)
