"""`BlockLinear` for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _layers, inits
from bsjax.ops import Implementation
from bsjax.pattern import BlockPattern


class Pattern(nnx.Variable):
    """Holds a `BlockPattern`. No `nnx.Param`: optimizers and gradients leave it alone."""

    @classmethod
    def of(cls, p: BlockPattern) -> "Pattern":
        """A copy: layers that are made of one pattern could not be donated to one program."""
        return cls(jax.tree.map(jnp.array, p))


# the collection of the same name in Linen
nnx.register_variable_name("patterns", Pattern, overwrite=True)


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
        p, features = _layers.as_pattern("BlockLinear", pattern, block), (in_features, out_features)
        _layers.check_features("BlockLinear", p, features)
        values = inits.initialize(kernel_init, rngs.params(), p, param_dtype, features)
        self.values = nnx.Param(values)
        self.bias: nnx.Param[Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        else:
            self.bias = nnx.data(None)
        self.pattern = Pattern.of(p)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.implementation = implementation

    def __call__(
        self, x: Any, *, activation: Any = None, residual: Any = None
    ) -> Float[Array, "*n m"]:
        """`activation(x @ S + bias) + residual`: the last two where they are given, and inside the
        kernel where one runs."""
        return _layers.linear(
            x,
            self.values[...],
            None if self.bias is None else self.bias[...],
            self.pattern.get_value(),
            layer="BlockLinear",
            features=(self.in_features, self.out_features),
            dtype=self.dtype,
            precision=self.precision,
            implementation=self.implementation,
            activation=activation,
            residual=residual,
        )
