"""Sampled products on a GPU. `-m gpu --require-gpu`."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.kernels.test_sampled_kernels import CASES, KEY, conforms, f16, inputs, run

pytestmark = pytest.mark.gpu
here = contextlib.nullcontext


@pytest.mark.parametrize("name", [*CASES])
def test_y_and_both_gradients(name):
    (n, k, m), options = CASES[name]
    conforms(*inputs(n, k, m), terms=max(n, k, m), run_kernels=here, **options)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("sampler", ["systematic", "uniform"])
def test_large(block, fraction, sampler):
    options = {"block": block, "fraction": fraction, "sampler": sampler}
    conforms(*inputs(2048, 4096, 3072), terms=4096, run_kernels=here, **options)


def test_float16_and_odd_sizes():
    x, w, dy = inputs(501, 1024, 1000, f16, lead=(2, 3))
    conforms(x, w, dy, terms=3006, run_kernels=here, fraction=0.3, block=64)


def test_many_times_the_same_bits():
    """A race seldom shows in two runs."""
    arguments = inputs(1024, 2048, 2048)
    options = {"fraction": 0.25, "block": 64, "implementation": "mosaic"}
    first = run(*arguments, **options)
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.array_equal(x, y), a, b))
    for _ in range(50):
        assert all(map(bool, same(first, run(*arguments, **options))))


def test_auto_takes_the_kernel_where_it_is_worth_it():
    x, w, _ = inputs(2048, 2048, 2048)

    def compiled(block):
        options = {"key": KEY, "fraction": 0.25, "block": block}
        run = jax.jit(lambda x, w: bsjax.sampled_matmul(x, w, **options))
        return run.lower(x, w).compile().as_text()

    assert "mosaic_gpu" in compiled(64)
    assert "mosaic_gpu" not in compiled(32)


@pytest.mark.parametrize("policy", ["forward", "backward", "weight"])
@pytest.mark.parametrize("block", [1, 64])
def test_auto(policy, block):
    """Kernels or copies, whichever run: within what 16 bits of scores and of results explain."""
    x, w, dy = inputs(300, 512, 256)
    options = {"fraction": 0.5, "block": block, "policy": policy, "sampler": "uniform"}

    def f(x, w, dy, name):
        def product(x, w):
            return bsjax.sampled_matmul(x, w, key=KEY, implementation=name, **options)

        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy)

    got = jax.jit(f, static_argnums=3)(x, w, dy, "auto")
    want = f(*(a.astype(jnp.float32) for a in (x, w, dy)), "reference")
    for g, e in zip(got, want, strict=True):
        g, e = (np.asarray(a, np.float32) for a in (g, e))
        assert np.abs(g - e).max() <= 2 * 2**-8 * np.abs(e).max()
