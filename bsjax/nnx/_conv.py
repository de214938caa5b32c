"""`BlockConv` for Flax NNX, and batch normalisation that is folded into it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _conv_layer, _layers, inits
from bsjax.nnx._linear import BlockLinear, Pattern
from bsjax.ops import Implementation


class BlockConv(nnx.Module):
    """`y[..., *space, out] = conv(x[..., *space, in], S) + bias`, dense in the taps, where S stores
    only the blocks of channels that `pattern` has.

    `pattern` is a `BlockPattern`, or a bool mask (block-rows in, block-columns out) with `block=`.
    The last block of a side is padded where it does not divide the features, so an RGB image may go
    in. The other arguments are those of `nnx.Conv`: `kernel_size` has a size for each of one to
    three axes of space (a number is one axis), `padding` may also be "CIRCULAR", "REFLECT" or
    "CAUSAL". There is no `input_dilation`, and no `feature_group_count`: groups are a pattern.

    Params `values[e, *kernel_size, br, bc]` and `bias[out]`; the variable `pattern` holds the
    `BlockPattern`. `kernel_init` is one of `bsjax.inits` or any standard `(key, shape, dtype)`
    initialiser, which counts the taps of the stored inputs as fan-in.
    After Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, ...],
        strides: int | tuple[int, ...] | None = 1,
        *,
        pattern: Any,
        block: int | tuple[int, int] | None = None,
        padding: Any = "SAME",
        kernel_dilation: int | tuple[int, ...] | None = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: inits.Initializer = inits.stored_fan_in(),  # noqa: B008 - a pure function
        bias_init: inits.Initializer = jax.nn.initializers.zeros,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        p, features = _layers.as_pattern("BlockConv", pattern, block), (in_features, out_features)
        _layers.check_features("BlockConv", p, features)
        window = _conv_layer.as_window("BlockConv", kernel_size)
        values = inits.initialize(kernel_init, rngs.params(), p, param_dtype, features, window)
        self.values = nnx.Param(values)
        self.bias: nnx.Param[Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        else:
            self.bias = nnx.data(None)
        self.pattern = Pattern.of(p)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.kernel_size, self.strides, self.padding = window, strides, padding
        self.kernel_dilation = kernel_dilation
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.implementation = implementation

    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "..."]:
        """`activation(conv(x) + bias) + residual`: the last two where they are given."""
        return _conv_layer.conv(
            x,
            self.values[...],
            None if self.bias is None else self.bias[...],
            self.pattern.get_value(),
            features=(self.in_features, self.out_features),
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            activation=activation,
            residual=residual,
        )


def fold_batch_norm[L: (BlockConv, BlockLinear)](layer: L, norm: nnx.BatchNorm) -> L:
    """One layer for inference that does what `norm(layer(x))` does with running averages.

    With `factor = scale / sqrt(var + epsilon)` of each channel out, values are multiplied by it,
    and the bias is `(bias - mean) factor + offset`, in float32, rounded once. The new layer always
    has a bias; `layer` and `norm` stay as they are. Batch normalisation before a convolution cannot
    be folded, since the zeros of the padding are not normalised: a `TypeError`, as is anything else
    in the place of the two; nor can it be where there is an activation between them.
    """
    _conv_layer.check_foldable(layer, norm, (BlockConv, BlockLinear), nnx.BatchNorm)
    _conv_layer.check_normalised(layer.out_features, norm.num_features)
    bias, scale, offset = (
        None if one is None else one[...] for one in (layer.bias, norm.scale, norm.bias)
    )
    values, bias = _conv_layer.folded(
        layer.values[...],
        bias,
        layer.pattern.get_value(),
        norm.mean[...],
        norm.var[...],
        scale,
        offset,
        norm.epsilon,
    )
    new = nnx.clone(layer)
    new.values, new.bias, new.use_bias = nnx.Param(values), nnx.Param(bias), True
    return new
