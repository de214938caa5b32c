"""`BlockLinear` for Flax Linen."""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _layers
from bsjax.linen._block import BlockLayer


class BlockLinear(BlockLayer):
    """`y[..., out] = x[..., in] @ S + bias`, where S stores only the blocks of `pattern`.

    The fields of `bsjax.nnx.BlockLinear`, without `in_features` and `rngs`: the features in are
    those of the input, as many as end inside the last block-row. Two collections: `params` with
    `values[e, br, bc]` and `bias[out]`, and `patterns` with plain int32 arrays, the coordinates
    `row[e]` and `col[e]` and the sizes `grid` and `block`. The coordinates are what the layer uses;
    the field `pattern` says what `init` puts there if it finds none.

    Over layers, scan both collections: `variable_axes={"params": 0, "patterns": 0}`.
    """

    LAYER = "BlockLinear"

    @nn.compact
    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "*n m"]:
        """`activation(x @ S + bias) + residual`: the last two where they are given, and inside the
        kernel where one runs."""
        features, p, values, bias = self.weights(x)
        return _layers.linear(
            x,
            values,
            bias,
            p,
            layer=self.LAYER,
            features=features,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            activation=activation,
            residual=residual,
        )
