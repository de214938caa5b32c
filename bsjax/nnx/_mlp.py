"""`BlockMLP` for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _layers, inits
from bsjax.nnx._linear import BlockLinear
from bsjax.ops import Implementation


class BlockMLP(nnx.Module):
    """`y = activation(x @ U + b) @ D + c`, the feed-forward layer of a Transformer, block-sparse.

    With `gated=True` it is `(activation(x @ G) * (x @ U)) @ D + c`, where G has the pattern of U
    (Shazeer 2020, "GLU Variants Improve Transformer"). `pattern` is that of U, `down_pattern` that
    of D: by default the transpose, so that in_features and out_features are equal. Each is a
    `BlockPattern`, or a bool mask with `block=`.

    Submodules `up`, `down` and `gate` are `BlockLinear`s, which take the remaining arguments, and
    `down` its `down_kernel_init` where it is given; gate and up share their variable `pattern`. The
    activation ("relu", "gelu", "silu", "tanh", "sigmoid" or a function) and a residual run inside
    the kernel where one runs.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        pattern: Any,
        down_pattern: Any = None,
        block: int | tuple[int, int] | None = None,
        activation: Any = "gelu",
        gated: bool = False,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: inits.Initializer = inits.stored_fan_in(),  # noqa: B008 - a pure function
        down_kernel_init: inits.Initializer | None = None,
        bias_init: inits.Initializer = jax.nn.initializers.zeros,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        up = _layers.as_pattern("BlockMLP", pattern, block)
        down = _layers.down_pattern("BlockMLP", up, down_pattern, block)

        def layer(features: Any, p: Any, use_bias: bool, init: Any = kernel_init) -> BlockLinear:
            return BlockLinear(
                *features,
                pattern=p,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=init,
                bias_init=bias_init,
                implementation=implementation,
                rngs=rngs,
            )

        self.up = layer((in_features, hidden_features), up, use_bias and not gated)
        self.gate: BlockLinear | None
        if gated:
            self.gate = layer((in_features, hidden_features), up, False)
            self.gate.pattern = self.up.pattern  # one variable: it cannot be moved for one only
        else:
            self.gate = nnx.data(None)
        features = (hidden_features, out_features or in_features)
        self.down = layer(features, down, use_bias, down_kernel_init or kernel_init)
        self.activation = activation

    def __call__(self, x: Any, *, residual: Any = None) -> Float[Array, "*n m"]:
        return _layers.mlp(
            x,
            self.up,
            self.gate,
            self.down,
            weights=_weights,
            in_features=self.up.in_features,
            activation=self.activation,
            residual=residual,
        )


def _weights(layer: BlockLinear, features: int, dtype: Any) -> _layers.Weights:
    bias = None if layer.bias is None else layer.bias[...]
    return _layers.Weights(layer.values[...], layer.pattern.get_value(), bias)
