"""`BlockConv` for Flax Linen."""

import dataclasses
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _conv_layer
from bsjax.linen._block import BlockLayer


class BlockConv(BlockLayer):
    """`y[..., *space, out] = conv(x[..., *space, in], S) + bias`, dense in the taps, where S stores
    only the blocks of channels that `pattern` has.

    The fields of `bsjax.nnx.BlockConv`, without `in_features` and `rngs`: the features in are
    those of the input, as many as end inside the last block-row. Two collections, as in
    `bsjax.linen.BlockLinear`: `params` with `values[e, *kernel_size, br, bc]` and `bias[out]`, and
    `patterns` with the coordinates `row[e]` and `col[e]` and the sizes `grid` and `block`.
    """

    LAYER = "BlockConv"

    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...] | None = 1
    _: dataclasses.KW_ONLY
    padding: Any = "SAME"
    kernel_dilation: int | tuple[int, ...] | None = 1

    @nn.compact
    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "..."]:
        """`activation(conv(x) + bias) + residual`: the last two where they are given."""
        window = _conv_layer.as_window(self.LAYER, self.kernel_size)
        features, p, values, bias = self.weights(x, window)
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
