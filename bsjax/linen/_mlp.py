"""`BlockMLP` for Flax Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _layers, inits
from bsjax.linen._linear import BlockLinear
from bsjax.linen._pattern import FieldPattern
from bsjax.ops import Implementation
from bsjax.pattern import BlockPattern


class BlockMLP(nn.Module):
    """`y = activation(x @ U + b) @ D + c`, or with `gated=True`
    `(activation(x @ G) * (x @ U)) @ D + c`.

    The fields of `bsjax.nnx.BlockMLP`, without `in_features` and `rngs`; `out_features` are those
    of the input unless given. Submodules `up`, `down` and `gate` are `BlockLinear`s.
    """

    hidden_features: int
    out_features: int | None = None
    _: dataclasses.KW_ONLY
    pattern: Any
    down_pattern: Any = None
    block: int | tuple[int, int] | None = None
    activation: Any = "gelu"
    gated: bool = False
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: inits.Initializer = inits.stored_fan_in()
    down_kernel_init: inits.Initializer | None = None
    bias_init: inits.Initializer = jax.nn.initializers.zeros
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        up = FieldPattern.of("BlockMLP", self.pattern, self.block)
        down = _layers.down_pattern("BlockMLP", up, self.down_pattern, self.block)
        object.__setattr__(self, "pattern", up)
        object.__setattr__(self, "down_pattern", FieldPattern.of("BlockMLP", down, None))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Any, *, residual: Any = None) -> Float[Array, "*n m"]:
        def layer(name: str, features: int, p: Any, use_bias: bool) -> BlockLinear:
            return BlockLinear(
                features,
                pattern=p,
                use_bias=use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                precision=self.precision,
                kernel_init=(self.down_kernel_init if name == "down" else None) or self.kernel_init,
                bias_init=self.bias_init,
                implementation=self.implementation,
                name=name,
            )

        in_features = jnp.shape(x)[-1] if jnp.ndim(x) else 0
        return _layers.mlp(
            x,
            layer("up", self.hidden_features, self.pattern, self.use_bias and not self.gated),
            layer("gate", self.hidden_features, self.pattern, False) if self.gated else None,
            layer("down", self.out_features or in_features, self.down_pattern, self.use_bias),
            weights=_weights,
            in_features=in_features,
            activation=self.activation,
            residual=residual,
        )


def _weights(layer: BlockLinear, features: int, dtype: Any) -> _layers.Weights:
    """Those of a layer that takes so many features. It makes and checks them when it is called, if
    only without tokens."""
    layer(jnp.zeros((0, features), dtype))
    variables, p = nn.meta.unbox(layer.variables), layer.pattern
    params, patterns = variables["params"], variables["patterns"]
    return _layers.Weights(
        params["values"],
        BlockPattern(patterns["row"], patterns["col"], p.grid, p.block),
        params.get("bias"),
    )
