"""What the modules of both Flax dialects share, so that neither has arithmetic of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax import ops
from bsjax.ops import _mlp, _sampled
from bsjax.ops._activations import ACTIVATIONS
from bsjax.ops._fused import Form
from bsjax.ops._mlp import Weights
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

    All are cast to `dtype`, or to the common dtype of x, values and bias.
    """
    in_features, out_features = features
    x, values, bias = cast(layer, dtype, in_features, x, values, bias)
    dtype = x.dtype
    k, m = p.shape
    if residual is not None:
        residual = jnp.asarray(residual, dtype)
        if residual.shape != (*x.shape[:-1], out_features):
            raise ValueError(
                f"{layer}: `residual` of shape {tuple(residual.shape)} must have shape "
                f"{(*x.shape[:-1], out_features)}, that of the output."
            )
        residual = padded(residual, m)
    y = ops.matmul(
        padded(x, k),
        values,
        p,
        bias=None if bias is None else padded(bias, m),
        activation=activation,
        residual=residual,
        precision=precision,
        implementation=implementation,
    )
    return y[..., :out_features]


def check_sampling(layer: str, shape: tuple[int, ...] | None, **options: Any) -> None:
    """The static arguments of `sampled_matmul`, for weights of a shape where it is known."""
    _sampled.checked(layer, **options)
    if shape is not None and (reason := why_not_sampled(shape, **options)):
        raise ValueError(f"{layer}: {reason}")


def why_not_sampled(shape: tuple[int, ...], **options: Any) -> str | None:
    """The reason why weights of a shape cannot be sampled so, or None if they can."""
    return _sampled.undivided(shape, options["policy"], options["block"])


def sampled_linear(
    x: Any,
    kernel: Float[Array | np.ndarray, "k m"],
    bias: Float[Array | np.ndarray, " m"] | None,
    key: Any,
    *,
    dtype: Any,
    **options: Any,
) -> Float[Array, "*n m"]:
    """`x @ kernel + bias`, the product from a sample of its terms, or exact if `key` is None."""
    check_sampling("SampledLinear", kernel.shape, **options)
    x, kernel, bias = cast("SampledLinear", dtype, kernel.shape[0], x, kernel, bias)
    y = ops.sampled_matmul(x, kernel, key=key, **options)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


def cast(
    layer: str, dtype: Any, in_features: int, x: Any, weights: Any, bias: Any
) -> tuple[Array, Array, Array | None]:
    """All in `dtype` or else in their common one, as Flax's own layers do; inputs that fit."""
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    if dtype is None:
        dtype = jnp.result_type(x, weights, *([] if bias is None else [bias]))
    if x.shape[-1:] != (in_features,):
        raise ValueError(
            f"{layer}: expected inputs of shape (..., {in_features}), got {tuple(x.shape)}."
        )
    bias = None if bias is None else jnp.asarray(bias, dtype)
    return x.astype(dtype), weights.astype(dtype), bias


def down_pattern(layer: str, up: BlockPattern, down: Any, block: Any) -> BlockPattern:
    """The pattern of the second layer of an MLP: that of the first transposed unless given."""
    return up.transpose()[0] if down is None else as_pattern(layer, down, block)


def mlp(
    x: Any,
    up: Any,
    gate: Any,
    down: Any,
    *,
    weights: Callable[[Any, int, Any], Weights],
    in_features: int,
    activation: Any,
    residual: Any,
) -> Float[Array, "*n m"]:
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`, plus a residual.

    With implementation="mosaic" it is one operation, whose derivatives are fused too, if the
    activation has a name, blocks divide the hidden features and gate and up can be seen to have one
    pattern; `weights(layer, features, dtype)` gives those of a layer that is called with such
    inputs. Everything else goes through the layers:
    on a CPU one product for gate and up takes longer with its derivatives than two.
    """
    x = jnp.asarray(x)
    layers = [layer for layer in (up, gate, down) if layer is not None]
    named = isinstance(activation, str) and activation in ACTIVATIONS
    # whatever does not fit goes through the layers too: they say what is wrong with it
    shapes = x.shape[-1:] == (in_features,)
    shapes &= residual is None or jnp.shape(residual) == (*x.shape[:-1], down.out_features)
    if named and shapes and all(layer.implementation == "mosaic" for layer in layers):
        sizes = (*[in_features] * (len(layers) - 1), up.out_features)
        own = [weights(one, size, x.dtype) for one, size in zip(layers, sizes, strict=True)]
        y = _fused_mlp(x, layers, own, activation, residual)
        if y is not None:
            return y
    if gate is None:
        hidden = up(x, activation=activation)
    else:
        hidden = gate(x, activation=activation) * up(x)
    return down(hidden, residual=residual)


def _fused_mlp(
    x: Array, layers: list[Any], weights: list[Weights], activation: str, residual: Any
) -> Array | None:
    """The same as one operation, or None if it cannot be one."""
    dtypes = {
        jnp.dtype(layer.dtype or jnp.result_type(x, *jax.tree.leaves((own.values, own.bias))))
        for layer, own in zip(layers, weights, strict=True)
    }
    if len(dtypes) > 1 or len({layer.precision for layer in layers}) > 1:
        return None
    dtype, gated = dtypes.pop(), len(layers) == 3
    up, *gate, down = (_mlp.cast(own, dtype) for own in weights)
    x = padded(x.astype(dtype), up.p.shape[0])
    whole = layers[0].out_features == up.p.shape[1]
    biased = gated and any(one.bias is not None for one in (up, *gate))
    if not whole or biased or not _mlp.fits(x, up.p, down.p, gated=gated):
        return None
    if gate and not _mlp.alike(gate[0].p, up.p):
        return None
    if gate:
        up = _mlp.pair(gate[0], up)
    out_features = down.p.shape[1]
    if down.bias is not None:
        down = down._replace(bias=padded(down.bias, out_features))
    if residual is not None:
        residual = padded(jnp.asarray(residual, dtype), out_features)
    form, precision = Form(activation, gated), layers[0].precision
    y = _mlp.mlp(x, up, down, residual, form=form, precision=precision)
    return y[..., : layers[-1].out_features]


def padded(a: Array, features: int) -> Array:
    """With zeros behind the last feature."""
    if a.shape[-1] == features:  # outside jit nothing else would leave it where it is
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, features - a.shape[-1])])
