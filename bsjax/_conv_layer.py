"""What the convolutions of both Flax dialects share."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax import _layers, ops
from bsjax.ops._reference import accumulator
from bsjax.pattern import BlockPattern
from bsjax.pattern._validate import size

MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def as_window(layer: str, kernel_size: Any) -> tuple[int, ...]:
    """One to three sizes; one number is a convolution with one axis of space, as in Flax."""
    several = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size,)
    if not 1 <= len(several) <= 3:
        raise ValueError(
            f"{layer}: `kernel_size` must have one to three sizes, one for each axis of space, got "
            f"{kernel_size!r}."
        )
    return tuple(size(layer, "kernel_size", one, least=1) for one in several)


def conv(
    x: Any,
    values: Float[Array | np.ndarray, "e ..."],
    bias: Float[Array | np.ndarray, " m"] | None,
    p: BlockPattern,
    *,
    features: tuple[int, int],
    strides: Any,
    padding: Any,
    kernel_dilation: Any,
    dtype: Any,
    precision: Any,
    implementation: Any,
    activation: Any,
    residual: Any,
) -> Float[Array, "..."]:
    """`activation(conv(x) + bias) + residual` for channels that blocks do not divide: zeros in,
    surplus channels out. All are cast to `dtype`, or to their common dtype."""
    in_features, out_features = features
    window = values.shape[1:-2]
    x, values, bias = _layers.cast("BlockConv", dtype, in_features, x, values, bias)
    k, m = p.shape
    x, padding = _bordered(x, window, padding, kernel_dilation)
    if residual is not None:
        residual = jnp.asarray(residual, x.dtype)
        if residual.shape[-1:] != (out_features,):
            raise ValueError(
                f"BlockConv: `residual` of shape {tuple(residual.shape)} must have shape "
                f"(..., {out_features}), that of the output."
            )
        residual = _layers.padded(residual, m)
    y = ops.conv(
        _layers.padded(x, k),
        values,
        p,
        strides=1 if strides is None else strides,
        padding=padding,
        dilation=1 if kernel_dilation is None else kernel_dilation,
        bias=None if bias is None else _layers.padded(bias, m),
        activation=activation,
        residual=residual,
        precision=precision,
        implementation=implementation,
    )
    return y[..., :out_features]


def _bordered(x: Array, window: Any, padding: Any, dilation: Any) -> tuple[Array, Any]:
    """The image with a border of other numbers than zeros, and the padding that is left to do."""
    if padding not in (*MODES, "CAUSAL"):
        return x, padding
    axes = len(window)
    steps = dilation if isinstance(dilation, tuple | list) else (dilation or 1,) * axes
    reach = [(w - 1) * d for w, d in zip(window, steps, strict=True)]
    border = [(0, 0)] * (x.ndim - axes - 1)
    if padding in MODES:
        border += [(r // 2, r - r // 2) for r in reach]
        return jnp.pad(x, [*border, (0, 0)], mode=MODES[padding]), "VALID"
    if axes > 1:
        raise ValueError(
            f'BlockConv: `padding` "CAUSAL" is for one axis of space, but kernel_size is {window}: '
            "give a pair (before, after) for each axis."
        )
    return x, ((reach[0], 0),)


def check_foldable(layer: Any, norm: Any, layers: tuple[type, ...], batch_norm: type) -> None:
    """Raises for anything but one of these layers, and the normalisation of its channels."""
    op = "fold_batch_norm"
    if isinstance(layer, batch_norm):
        raise TypeError(
            f"{op}: `layer` is a BatchNorm: only a convolution followed by its normalisation can "
            "be folded, fold_batch_norm(conv, norm) for norm(conv(x))."
        )
    if not isinstance(layer, layers):
        raise TypeError(
            f"{op}: `layer` must be a BlockConv or a BlockLinear, got {type(layer).__name__}."
        )
    if not isinstance(norm, batch_norm):
        raise TypeError(f"{op}: `norm` must be a BatchNorm, got {type(norm).__name__}.")
    axis: Any = vars(norm)["axis"]
    if axis not in (-1, (-1,)):
        raise ValueError(
            f"{op}: `norm` normalises axis {axis}, but the channels out of a layer are the last "
            "axis: expected axis=-1."
        )


def check_normalised(out_features: int, normalised: int) -> None:
    """Raises where a normalisation is not that of the layer."""
    if normalised != out_features:
        raise ValueError(
            f"fold_batch_norm: `norm` has {normalised} features, but `layer` has {out_features} "
            "out: give the normalisation that follows the layer."
        )


def folded(
    values: Float[Array, "e ..."],
    bias: Float[Array, " m"] | None,
    p: BlockPattern,
    mean: Float[Array, " m"],
    var: Float[Array, " m"],
    scale: Float[Array, " m"] | None,
    offset: Float[Array, " m"] | None,
    epsilon: float,
) -> tuple[Array, Array]:
    """Values and bias of a layer that does what `scale (y - mean) / sqrt(var + epsilon) + offset`
    does after it, computed in what sums are kept in and rounded once."""
    kept = accumulator(values)
    mean, var = mean.astype(kept), var.astype(kept)
    factor = 1 / jnp.sqrt(var + epsilon)
    if scale is not None:
        factor = factor * scale.astype(kept)
    shift = -mean if bias is None else bias.astype(kept) - mean
    shift = shift * factor
    if offset is not None:
        shift = shift + offset.astype(kept)
    (_, c), (_, bc) = p.grid, p.block
    columns = _layers.padded(factor, c * bc).reshape(c, bc)
    each = columns.at[p.col].get(mode="fill", fill_value=0)
    each = jnp.expand_dims(each, range(1, values.ndim - 1))
    dtype = values.dtype
    return (values.astype(kept) * each).astype(dtype), shift.astype(dtype)
