"""Linear layers of a Transformer: dense, sampled or block-sparse, called alike."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import core
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _transformer
from bsjax.linen._linear import BlockLinear
from bsjax.linen._pattern import FieldPattern
from bsjax.linen._sampled import SampledLinear


def frozen(layer: str, options: Mapping[str, Any] | None) -> Any:
    """Options that can be hashed, and their patterns too, as fields of modules must be."""
    if options is None:
        return None
    options = dict(options)
    for name in ("pattern", "down_pattern"):
        if options.get(name) is not None:
            options[name] = FieldPattern.of(layer, options[name], options.get("block"))
    if options.get("projection_pattern") is not None:
        block = options.get("projection_block")
        patterns = _transformer.projections(layer, options["projection_pattern"], block)
        options["projection_pattern"] = {
            name: FieldPattern.of(layer, p, None) for name, p in patterns.items()
        }
    return core.freeze(options)


def product(
    features: int,
    *,
    pattern: Any = None,
    sampling: Mapping[str, Any] | None = None,
    kernel_init: Any = None,
    gain: float = 1.0,
    precision: Any = None,
    implementation: Any = "auto",
    **common: Any,
) -> Any:
    """A linear layer: block-sparse with a pattern, sampled with options, or dense."""
    init = _transformer.kernel_init(kernel_init, gain, pattern is not None)
    if pattern is not None:
        return BlockLinear(
            features,
            pattern=pattern,
            kernel_init=init,
            precision=precision,
            implementation=implementation,
            **common,
        )
    if sampling is not None:
        return SampledLinear(features, kernel_init=init, **sampling, **common)
    return nn.Dense(features, kernel_init=init, precision=precision, **common)


def call(layer: Any, x: Any, deterministic: bool | None) -> Array:
    """Of sampled layers too: they ask whether to sample."""
    if isinstance(layer, SampledLinear) and layer.deterministic is None:
        return layer(x, deterministic=deterministic)
    return layer(x)


class DenseMLP(nn.Module):
    """The layers of a `BlockMLP`, dense or sampled."""

    hidden_features: int
    activation: Any = "gelu"
    gated: bool = False
    use_bias: bool = True
    down_gain: float = 1.0
    sampling: Any = None
    kernel_init: Any = None
    bias_init: Any = jax.nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = None
    precision: Any = None

    @nn.compact
    def __call__(self, x: Any, deterministic: bool | None = None) -> Float[Array, "*n m"]:
        names = ("sampling", "kernel_init", "bias_init", "dtype", "param_dtype", "precision")
        common = {name: getattr(self, name) for name in names}

        def layer(name: str, features: int, use_bias: bool, gain: float = 1.0) -> Any:
            one = product(features, use_bias=use_bias, gain=gain, name=name, **common)
            return lambda x: call(one, x, deterministic)

        up = layer("up", self.hidden_features, self.use_bias and not self.gated)
        gate = layer("gate", self.hidden_features, False) if self.gated else None
        down = layer("down", x.shape[-1], self.use_bias, self.down_gain)
        return _transformer.mlp(x, up, gate, down, self.activation)
