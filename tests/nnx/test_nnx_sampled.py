"""`bsjax.nnx.SampledLinear` and `sample_linears`: what is theirs, beside `bsjax.sampled_matmul`."""

import jax
import numpy as np
from flax import nnx

from bsjax.nnx import SampledLinear
from tests.helpers import assert_close, normal

IN, OUT = 16, 6
KEY = jax.random.key(7)


def layer(seed=0, **options):
    options = {"fraction": 0.5, "bias_init": nnx.initializers.normal(1.0)} | options
    return SampledLinear(IN, OUT, **options, rngs=nnx.Rngs(seed))


def inputs(shape=(5, IN), seed=0):
    return normal(np.random.default_rng(seed), shape)


def dense(layer, x):
    """The exact product, by NumPy in float64."""
    kernel, bias = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.bias))
    return np.asarray(x, np.float64) @ kernel + bias


def taken(layer, x):
    """The features that one call samples: where dx is not zero."""
    dx = jax.grad(lambda x: layer(x).sum())(x)
    return tuple(np.flatnonzero(np.any(np.asarray(dx) != 0, axis=tuple(range(x.ndim - 1)))))


def test_starts_as_a_dense_layer():
    ours, theirs = layer(), nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    assert nnx.state(ours, nnx.Param).keys() == {"kernel", "bias"}
    assert nnx.state(layer(use_bias=False), nnx.Param).keys() == {"kernel"}


def test_exact_when_deterministic():
    ours, x = layer(), inputs()
    want = dense(ours, x).astype(np.float32)
    assert_close(ours(x, deterministic=True), want, IN)
    ours.eval()
    assert_close(ours(x), want, IN)
    assert_close(layer(fraction=1)(x), want, IN)
    assert not np.allclose(ours(x, deterministic=False), want)  # the argument goes first
    ours.train()
    assert not np.allclose(ours(x), want)
    assert_close(nnx.view(ours, deterministic=True)(x), want, IN)
    assert not ours.deterministic
