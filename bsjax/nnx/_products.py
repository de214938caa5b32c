"""Linear layers of a Transformer: dense, sampled or block-sparse, called alike."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from bsjax import _transformer
from bsjax.nnx._linear import BlockLinear
from bsjax.nnx._sampled import SampledLinear


def product(
    features: tuple[int, int],
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
            *features,
            pattern=pattern,
            kernel_init=init,
            precision=precision,
            implementation=implementation,
            **common,
        )
    if sampling is not None:
        return SampledLinear(*features, kernel_init=init, **sampling, **common)
    return nnx.Linear(*features, kernel_init=init, precision=precision, **common)


def call(layer: Any, x: Any, deterministic: bool | None, rngs: Any) -> Array:
    """Of sampled layers too: they ask whether to sample, and with what."""
    if isinstance(layer, SampledLinear):
        return layer(x, deterministic=deterministic, rngs=rngs)
    return layer(x)


class DenseMLP(nnx.Module):
    """The layers of a `BlockMLP`, dense or sampled."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation: Any = "gelu",
        gated: bool = False,
        use_bias: bool = True,
        down_gain: float = 1.0,
        **common: Any,
    ) -> None:
        def layer(features: tuple[int, int], use_bias: bool, gain: float = 1.0) -> Any:
            return product(features, use_bias=use_bias, gain=gain, **common)

        self.up = layer((in_features, hidden_features), use_bias and not gated)
        self.gate = nnx.data(layer((in_features, hidden_features), False) if gated else None)
        self.down = layer((hidden_features, in_features), use_bias, down_gain)
        self.activation = activation

    def __call__(
        self, x: Any, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "*n m"]:
        def of(layer: Any) -> Any:
            return None if layer is None else lambda x: call(layer, x, deterministic, rngs)

        return _transformer.mlp(x, of(self.up), of(self.gate), of(self.down), self.activation)
