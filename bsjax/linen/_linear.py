"""`BlockLinear` for Flax Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _layers, inits
from bsjax.linen._pattern import FieldPattern, stored
from bsjax.ops import Implementation


class BlockLinear(nn.Module):
    """`y[..., out] = x[..., in] @ S + bias`, where S stores only the blocks of `pattern`.

    The fields of `bsjax.nnx.BlockLinear`, without `in_features` and `rngs`: the features in are
    those of the input, as many as end inside the last block-row. Two collections: `params` with
    `values[e, br, bc]` and `bias[out]`, and `patterns` with plain int32 arrays, the coordinates
    `row[e]` and `col[e]` and the sizes `grid` and `block`. The coordinates are what the layer uses;
    the field `pattern` says what `init` puts there if it finds none.

    Over layers, scan both collections: `variable_axes={"params": 0, "patterns": 0}`.
    """

    out_features: int
    _: dataclasses.KW_ONLY
    pattern: Any
    block: int | tuple[int, int] | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: inits.Initializer = inits.stored_fan_in()
    bias_init: inits.Initializer = jax.nn.initializers.zeros
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        p = FieldPattern.of("BlockLinear", self.pattern, self.block)
        object.__setattr__(self, "pattern", p)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "*n m"]:
        """`activation(x @ S + bias) + residual`: the last two where they are given, and inside the
        kernel where one runs."""
        features = (jnp.shape(x)[-1] if jnp.ndim(x) else 0, self.out_features)
        _layers.check_features("BlockLinear", self.pattern, features)
        p = stored(self, self.pattern)
        known = self.has_variable("params", "values")

        def init(key: Array) -> Any:
            if known:  # Flax asks for the shape only, at every call
                return jnp.zeros((p.capacity, *p.block), self.param_dtype)
            return inits.initialize(self.kernel_init, key, p, self.param_dtype, features)

        values = self.param("values", init)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.out_features,), self.param_dtype)
        return _layers.linear(
            x,
            values,
            bias,
            p,
            layer="BlockLinear",
            features=features,
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            activation=activation,
            residual=residual,
        )
