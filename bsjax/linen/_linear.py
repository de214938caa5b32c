"""`BlockLinear` for Flax Linen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from bsjax import _layers, inits
from bsjax.ops import Implementation
from bsjax.pattern import BlockPattern


class BlockLinear(nn.Module):
    """`y[..., out] = x[..., in] @ S + bias`, where S stores only the blocks of `pattern`.

    The fields of `bsjax.nnx.BlockLinear`, without `in_features` and `rngs`. Collections: `params`
    with `values[e, br, bc]` and `bias[out]`, `patterns` with int32 `row[e]` and `col[e]` (plain
    arrays, so that serialization, `tabulate` and `nn.scan` over layers work: scan both
    collections, `variable_axes={"params": 0, "patterns": 0}`).
    """

    out_features: int
    pattern: Any = None
    block: int | tuple[int, int] | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: inits.Initializer = inits.stored_fan_in()
    bias_init: inits.Initializer = jax.nn.initializers.zeros
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        # a module is hashed and compared by its fields, which a mask cannot be
        if self.pattern is not None:
            p = _layers.as_pattern("BlockLinear", self.pattern, self.block)
            object.__setattr__(self, "pattern", p)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*n k"]) -> Float[Array, "*n m"]:
        p = self.pattern
        if p is None:
            raise ValueError(
                "BlockLinear: give `pattern=`, a BlockPattern or a bool mask with `block=`."
            )
        sizes = {"in_features": x.shape[-1], "out_features": self.out_features}
        _layers.check_features("BlockLinear", p, **sizes)

        def init(key: Array) -> Array:
            return inits.initialize(self.kernel_init, key, p, self.param_dtype)

        values = self.param("values", init)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.out_features,), self.param_dtype)
        row = self.variable("patterns", "row", lambda: p.row).value
        col = self.variable("patterns", "col", lambda: p.col).value
        x, values, bias = promote_dtype(x, values, bias, dtype=self.dtype)
        return _layers.linear(
            x,
            values,
            bias,
            BlockPattern(row, col, p.grid, p.block),
            layer="BlockLinear",
            in_features=None,
            out_features=self.out_features,
            precision=self.precision,
            implementation=self.implementation,
        )
