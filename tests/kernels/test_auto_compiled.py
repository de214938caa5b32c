"""What `auto` becomes in a program for a Hopper GPU, on a machine that seems to have one."""

import jax
import jax.numpy as jnp
import pytest

import bsjax
from bsjax.ops import _mosaic
from tests.kernels import h200
from tests.kernels.test_compiled import compile_everything, toolchain  # noqa: F401

pytestmark = pytest.mark.h200
bf16, f32 = jnp.bfloat16, jnp.float32
N, K = 2048, 8192


@pytest.fixture(autouse=True)
def seems_to_have_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_mosaic, "_no_hopper", lambda device: None)
    monkeypatch.setattr(_mosaic, "several_gpus", lambda: False)


def kernels(step, *args):
    place = h200.mesh()
    program, _ = h200.compiled(step, *(h200.argument(place, *one) for one in args))
    return program.as_text().count('custom_call_target="mosaic_gpu')


def test_block_sparse_products():
    """Forward, dx and dvalues; none where dense is faster, or where there is no kernel."""

    def count(density, dtype):
        e = round(density * (K // 64) ** 2)

        def step(x, values, dy, row, col):
            p = bsjax.BlockPattern(row, col, (K // 64,) * 2, (64, 64))
            y, pull = jax.vjp(lambda x, v: bsjax.matmul(x, v, p), x, values)
            return y, *pull(dy)

        tokens, index = ((N, K), dtype), ((e,), jnp.int32)
        return kernels(step, tokens, ((e, 64, 64), dtype), tokens, index, index)

    assert count(0.1, bf16) >= 3  # and what joins tiles that were cut
    assert count(0.7, bf16) == 0
    assert count(0.1, f32) == 0


@pytest.mark.parametrize(("block", "policy", "wanted"), [(64, "forward", 3), (32, "forward", 0)])
def test_sampled_products(block, policy, wanted):
    def step(x, w, dy, key):
        options = {"key": jax.random.wrap_key_data(key), "fraction": 0.25}

        def layer(x, w):
            return bsjax.sampled_matmul(x, w, block=block, policy=policy, **options)

        y, pull = jax.vjp(layer, x, w)
        return y, *pull(dy)

    shapes = ((N, K), bf16), ((K, K), bf16), ((N, K), bf16), ((2,), jnp.uint32)
    assert kernels(step, *shapes) == wanted
