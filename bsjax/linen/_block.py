"""What `BlockLinear` and `BlockConv` for Flax Linen are made of: fields and parameters."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from bsjax import _layers, inits
from bsjax.linen._pattern import FieldPattern, stored
from bsjax.ops import Implementation
from bsjax.pattern import BlockPattern


class BlockLayer(nn.Module):
    """Values over the blocks of `pattern`, and a bias."""

    LAYER: ClassVar[str]  # for messages

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
        p = FieldPattern.of(self.LAYER, self.pattern, self.block)
        object.__setattr__(self, "pattern", p)
        super().__post_init__()

    def weights(
        self, x: Any, window: tuple[int, ...] = ()
    ) -> tuple[tuple[int, int], BlockPattern, Any, Any]:
        """Features in, as many as `x` has, and out; the pattern, values and bias: arrays of JAX, or
        of NumPy where they were read from a file."""
        features = (jnp.shape(x)[-1] if jnp.ndim(x) else 0, self.out_features)
        _layers.check_features(self.LAYER, self.pattern, features)
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
        return features, p, values, bias
