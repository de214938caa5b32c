"""What the modules of both Flax dialects share, so that neither has arithmetic of its own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax import ops
from bsjax.pattern import BlockPattern


def as_pattern(layer: str, pattern: Any, block: int | tuple[int, int] | None) -> BlockPattern:
    """A `BlockPattern`, or a bool mask together with `block`."""
    if not isinstance(pattern, BlockPattern):
        if block is None:
            raise ValueError(
                f"{layer}: `pattern` is a mask, so its block size is not known: give `block=`, for "
                "example block=64, or a BlockPattern."
            )
        return BlockPattern.from_mask(pattern, block)
    sides = (block, block) if isinstance(block, int) else block
    if sides is not None and tuple(sides) != pattern.block:
        raise ValueError(
            f"{layer}: `block` is {tuple(sides)} but the pattern has blocks {pattern.block}: leave "
            "`block` out when a BlockPattern is given."
        )
    return pattern


def check_features(layer: str, p: BlockPattern, features: tuple[int, int]) -> None:
    """The grid must be as many blocks as the features need, the last one padded."""
    names = ("in_features", "out_features")
    for name, size, side, count in zip(names, features, p.block, p.grid, strict=True):
        if -(-size // side) != count:
            low, high = max(0, (count - 1) * side + 1), count * side
            raise ValueError(
                f"{layer}: {name}={size} needs {-(-size // side)} blocks of {side}, but `pattern` "
                f"has a grid {p.grid} of blocks {p.block}: its {name} may be {low} to {high}."
            )


def linear(
    x: Any,
    values: Float[Array | np.ndarray, "e br bc"],
    bias: Float[Array | np.ndarray, " m"] | None,
    p: BlockPattern,
    *,
    layer: str,
    features: tuple[int, int],
    dtype: Any,
    precision: Any,
    implementation: Any,
    activation: Any = None,
    residual: Any = None,
) -> Float[Array, "*n m"]:
    """`activation(x @ S + bias) + residual` for features that blocks do not divide: zeros in,
    surplus columns out.

    All are cast to `dtype`, or to the common dtype of x, values and bias, as Flax's own layers do.
    """
    x, values = jnp.asarray(x), jnp.asarray(values)
    if dtype is None:
        dtype = jnp.result_type(x, values, *([] if bias is None else [bias]))
    x, values = x.astype(dtype), values.astype(dtype)
    in_features, out_features = features
    if x.shape[-1:] != (in_features,):
        raise ValueError(
            f"{layer}: expected inputs of shape (..., {in_features}), got {tuple(x.shape)}."
        )
    k, m = p.shape
    if x.shape[-1] < k:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, k - x.shape[-1])])
    if bias is not None:
        bias = jnp.pad(jnp.asarray(bias, dtype), (0, m - out_features))
    if residual is not None:
        residual = jnp.asarray(residual, dtype)
        if residual.shape != (*x.shape[:-1], out_features):
            raise ValueError(
                f"{layer}: `residual` of shape {tuple(residual.shape)} must have shape "
                f"{(*x.shape[:-1], out_features)}, that of the output."
            )
        residual = jnp.pad(residual, [(0, 0)] * (x.ndim - 1) + [(0, m - out_features)])
    y = ops.matmul(
        x,
        values,
        p,
        bias=bias,
        activation=activation,
        residual=residual,
        precision=precision,
        implementation=implementation,
    )
    return y[..., :out_features]


def down_pattern(layer: str, up: BlockPattern, down: Any, block: Any) -> BlockPattern:
    """The pattern of the second layer of an MLP: that of the first transposed unless given."""
    return up.transpose()[0] if down is None else as_pattern(layer, down, block)
