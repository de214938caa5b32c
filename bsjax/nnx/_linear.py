"""`BlockLinear` for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from bsjax import _layers, inits
from bsjax.ops import Implementation


class Pattern(nnx.Variable):
    """Holds a `BlockPattern`. No `nnx.Param`: optimizers and gradients leave it alone."""


class BlockLinear(nnx.Module):
    """`y[..., out] = x[..., in] @ S + bias`, where S stores only the blocks of `pattern`.

    `pattern` is a `BlockPattern`, or a bool mask (block-rows in, block-columns out) with `block=`.
    The last block of a side is padded where it does not divide the features.

    Params `values[e, br, bc]` and `bias[out]`; the variable `pattern` holds the `BlockPattern`.
    `kernel_init` is one of `bsjax.inits` or any standard `(key, shape, dtype)` initialiser, which
    is given the stored fan-in of each block-column. `dtype` is what the product is computed in
    (default: the common dtype of input and parameters), `param_dtype` what parameters are kept in.
    After Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pattern: Any,
        block: int | tuple[int, int] | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: inits.Initializer = inits.stored_fan_in(),  # noqa: B008 - a pure function
        bias_init: inits.Initializer = jax.nn.initializers.zeros,
        implementation: Implementation = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        p = _layers.as_pattern("BlockLinear", pattern, block)
        _layers.check_features("BlockLinear", p, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.implementation = implementation
        self.values = nnx.Param(inits.initialize(kernel_init, rngs.params(), p, param_dtype))
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.pattern = Pattern(p)

    def __call__(self, x: Float[Array, "*n k"]) -> Float[Array, "*n m"]:
        bias = None if self.bias is None else self.bias[...]
        x, values, bias = promote_dtype((x, self.values[...], bias), dtype=self.dtype)
        return _layers.linear(
            x,
            values,
            bias,
            self.pattern.get_value(),
            layer="BlockLinear",
            in_features=self.in_features,
            out_features=self.out_features,
            precision=self.precision,
            implementation=self.implementation,
        )
