"""`SampledLinear` for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax import _layers
from bsjax.ops import Implementation, Policy, Sampler


class SampledLinear(nnx.Module):
    """`y[..., out] = x[..., in] @ kernel[in, out] + bias[out]`, from a sample of the product.

    `fraction`, `sampler`, `block`, `policy` and `implementation` are those of
    `bsjax.sampled_matmul`; the other arguments, and the params `kernel` and `bias`, are those of
    `nnx.Linear`. There is no `precision`: products of float32 are in full float32.

    Random numbers as in `nnx.Dropout`: the layer keeps a fork of the stream `rng_collection` of
    `rngs` (or of `default`) and draws a key from it at every call. `deterministic=True`, which
    `model.eval()` sets and `model.train()` takes back, is the exact product, and so is fraction 1;
    neither needs a stream. If `rngs` has no such stream, calls that sample must give one.

    Adelman, Levy, Hakimi and Silberstein 2018, "Faster Neural Network Training with Approximate
    Tensor Operations".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fraction: float | int,
        sampler: Sampler = "systematic",
        block: int = 1,
        policy: Policy = "forward",
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = jax.nn.initializers.lecun_normal(),  # noqa: B008 - a pure function
        bias_init: Any = jax.nn.initializers.zeros,
        implementation: Implementation = "auto",
        deterministic: bool | None = False,
        rng_collection: str = "sampling",
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, use_bias
        self.dtype, self.param_dtype = dtype, param_dtype
        self.fraction, self.sampler, self.block, self.policy = fraction, sampler, block, policy
        self.implementation = implementation
        _layers.check_sampling("SampledLinear", shape, **self._options())
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias: nnx.Param[Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        else:
            self.bias = nnx.data(None)
        self.deterministic, self.rng_collection = deterministic, rng_collection
        found = stream("SampledLinear", rngs, rng_collection)
        self.rngs = nnx.data(None) if found is None else found.fork()

    def __call__(
        self, x: Any, *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "*n m"]:
        """The product, sampled unless `deterministic`, which goes before the attribute; a key,
        `nnx.RngStream` or `nnx.Rngs` given here goes before the layer's own stream."""
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                "SampledLinear: `deterministic` is None here and in the layer: call the layer with "
                "deterministic=False to sample, or deterministic=True for the exact product."
            )
        return _layers.sampled_linear(
            x,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            None if deterministic or self.fraction == 1 else self._key(rngs),
            dtype=self.dtype,
            **self._options(),
        )

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls, for the attribute `deterministic`."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _options(self) -> dict[str, Any]:
        names = ("fraction", "sampler", "block", "policy", "implementation")
        return {name: getattr(self, name) for name in names}

    def _key(self, rngs: Any) -> Any:
        """Of what a call gives, or else of the layer's own stream."""
        if isinstance(rngs, jax.Array):
            return rngs
        found = stream("SampledLinear", self.rngs if rngs is None else rngs, self.rng_collection)
        if found is None:
            name = self.rng_collection
            raise ValueError(
                f'SampledLinear: no stream "{name}" to sample with: make the layer with '
                f"rngs=nnx.Rngs(0, {name}=1), call it with rngs=, or with deterministic=True."
            )
        if shape := found.key.shape:
            raise ValueError(
                f"SampledLinear: the stream has keys of shape {shape}, those of a stack of layers: "
                "scan or map over nnx.RngState as over nnx.Param, with in_axes=0."
            )
        return found()


def stream(layer: str, rngs: Any, name: str) -> nnx.RngStream | None:
    """The stream of that name, or the default one; None if there is neither."""
    if rngs is None or isinstance(rngs, nnx.RngStream):
        return rngs
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"{layer}: `rngs` must be nnx.Rngs or nnx.RngStream, got {rngs!r}: for example "
            f"nnx.Rngs(0, {name}=1)."
        )
    return rngs[name] if name in rngs or "default" in rngs else None
