"""A tuned configuration is what the door launches, where the table has one for the GPU at hand."""

import types

import jax
import jax.numpy as jnp

from bsjax.ops import _mosaic
from pallas_kernels import config
from tests.helpers import Case, random_mask

CASE = Case(mask=random_mask(4, 4, 0.5), block=64, n=4096)


def test_the_key_is_that_of_the_tuner(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", core_count=132)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    x = jnp.ones((4096, 256), jnp.bfloat16)
    key = _mosaic._key("matmul", x, (64, 64), CASE.pattern.density)
    assert key == config.key("NVIDIA H200", "matmul", "bfloat16", (64, 64), 4096, 0.5)
    chosen = config.Config(tile=128, stages=2)
    monkeypatch.setattr(config, "table", lambda: {key: chosen})
    found = config.for_matmul(4096, (64, 64), 2, 132, tuned=key)
    assert (found.tile, found.stages) == (128, 2)


def test_without_a_gpu_there_is_none():
    x = jnp.ones((8, 256), jnp.bfloat16)
    assert _mosaic._key("matmul", x, (64, 64), 0.5) is None
