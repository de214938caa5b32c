"""`SampledLinear` for Flax Linen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from jaxtyping import Array, Float

from bsjax import _layers
from bsjax.ops import Implementation, Policy, Sampler


class SampledLinear(nn.Module):
    """`y[..., out] = x[..., in] @ kernel[in, out] + bias[out]`, from a sample of the product.

    The fields of `bsjax.nnx.SampledLinear`, without `in_features` and `rngs`, and the params of
    `nn.Dense`. Random numbers as in `nn.Dropout`: the key is one of the stream `rng_collection`,
    which `apply(..., rngs={"sampling": key})` gives; `deterministic` is either a field or an
    argument of the call. Exact if it is True, or `fraction` is 1: neither needs a stream.
    """

    out_features: int
    _: dataclasses.KW_ONLY
    fraction: float | int
    sampler: Sampler = "systematic"
    block: int = 1
    policy: Policy = "forward"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = jax.nn.initializers.lecun_normal()
    bias_init: Any = jax.nn.initializers.zeros
    implementation: Implementation = "auto"
    deterministic: bool | None = None
    rng_collection: str = "sampling"

    @nn.compact
    def __call__(
        self, x: Any, deterministic: bool | None = None, rng: Any = None
    ) -> Float[Array, "*n m"]:
        """The product, sampled unless `deterministic`, with the key `rng` if it is given."""
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        shape = (jnp.shape(x)[-1] if jnp.ndim(x) else 0, self.out_features)
        names = ("fraction", "sampler", "block", "policy", "implementation")
        options = {name: getattr(self, name) for name in names}
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        if deterministic or self.fraction == 1:
            rng = None
        elif rng is None:
            rng = self._key()
        return _layers.sampled_linear(x, kernel, bias, rng, dtype=self.dtype, **options)

    def _key(self) -> Any:
        name = self.rng_collection
        try:
            return self.make_rng(name)
        except errors.InvalidRngError:
            raise ValueError(
                f'SampledLinear: no stream "{name}" to sample with: give apply '
                f'rngs={{"{name}": key}}, or call the layer with deterministic=True.'
            ) from None
