"""`BlockConv` for Flax Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _conv_layer, _layers, inits
from bsjax.linen._pattern import FieldPattern, stored
from bsjax.ops import Implementation


class BlockConv(nn.Module):
    """`y[..., *space, out] = conv(x[..., *space, in], S) + bias`, dense in the taps, where S stores
    only the blocks of channels that `pattern` has.

    The fields of `bsjax.nnx.BlockConv`, without `in_features` and `rngs`: the features in are
    those of the input, as many as end inside the last block-row. Two collections, as in
    `bsjax.linen.BlockLinear`: `params` with `values[e, *kernel_size, br, bc]` and `bias[out]`, and
    `patterns` with the coordinates `row[e]` and `col[e]` and the sizes `grid` and `block`.
    """

    out_features: int
    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...] | None = 1
    _: dataclasses.KW_ONLY
    pattern: Any
    block: int | tuple[int, int] | None = None
    padding: Any = "SAME"
    kernel_dilation: int | tuple[int, ...] | None = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: inits.Initializer = inits.stored_fan_in()
    bias_init: inits.Initializer = jax.nn.initializers.zeros
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        p = FieldPattern.of("BlockConv", self.pattern, self.block)
        object.__setattr__(self, "pattern", p)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "..."]:
        """`activation(conv(x) + bias) + residual`: the last two where they are given."""
        features = (jnp.shape(x)[-1] if jnp.ndim(x) else 0, self.out_features)
        _layers.check_features("BlockConv", self.pattern, features)
        window = _conv_layer.as_window("BlockConv", self.kernel_size)
        p = stored(self, self.pattern)
        known = self.has_variable("params", "values")

        def init(key: Array) -> Any:
            if known:  # Flax asks for the shape only, at every call
                return jnp.zeros((p.capacity, *window, *p.block), self.param_dtype)
            return inits.initialize(self.kernel_init, key, p, self.param_dtype, features, window)

        values = self.param("values", init)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.out_features,), self.param_dtype)
        return _conv_layer.conv(
            x,
            values,
            bias,
            p,
            features=features,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            activation=activation,
            residual=residual,
        )
