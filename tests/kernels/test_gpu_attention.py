"""Attention kernels on a GPU: what the interpreter and the compiler cannot see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import masks
from bsjax.ops import _attention_dropout as dropout
from pallas_kernels.config import MULTIPROCESSORS
from tests.helpers import normal
from tests.kernels.attention import arguments, compiled, conforms
from tests.kernels.attention_cases import ALIBI, CASES, FEATURES, MORE, MORE_FEATURES
from tests.kernels.test_attention_door import gradients
from tests.ops.attention import kept

pytestmark = pytest.mark.gpu
bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32


ALL_CASES = {**CASES, **MORE, **FEATURES, **MORE_FEATURES}


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_attention_and_its_gradients(case, dtype):
    """As NumPy has it, and again bit by bit, for any number of workers."""
    inputs = case.inputs(dtype)
    got = compiled(case, MULTIPROCESSORS)(*arguments(case, inputs))
    conforms(case, inputs, got)
    for workers in (MULTIPROCESSORS, 7):
        again = compiled(case, workers)(*arguments(case, inputs))
        # numbers of slots that are in no list are not written
        for a, b in zip(got[:5], again[:5], strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def long(heads, d, block, tokens=4096):
    rng = np.random.default_rng(0)
    h, g = heads
    shapes = [(2, tokens, h, d), *[(2, tokens, g, d)] * 2, (2, tokens, h, d)]
    mask = masks.causal() & (masks.window(500) | masks.prefix(64))
    p, full = mask.pattern((tokens, tokens), block)
    return [normal(rng, shape, bf16) for shape in shapes], {"p": p, "mask": mask, "full": full}


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("d", [64, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_long_sequences(heads, d, block):
    """Many tiles for each program, and many turns of every ring: against dense products."""
    args, options = long(heads, d, block)
    run = jax.jit(functools.partial(gradients, "mosaic", **options))
    got = run(*args)
    want = gradients("dense", *(a.astype(f32) for a in args), **options)
    eps = float(jnp.finfo(bf16).eps)
    for a, b in zip(got, want, strict=True):
        off = jnp.linalg.norm((a.astype(f32) - b).ravel())
        assert float(off) <= eps * float(jnp.linalg.norm(b.ravel()))
    for _ in range(20):  # a race seldom shows in two runs
        for a, b in zip(got, run(*args), strict=True):
            assert bool(jnp.array_equal(a, b))


def test_causal_means_causal():
    """Another token changes no bit of what comes before it."""
    (q, k, v, _), options = long((4, 4), 64, 64)
    run = jax.jit(lambda q, k, v: bsjax.attention(q, k, v, implementation="mosaic", **options))
    before = run(q, k, v)
    after = run(*(a.at[:, 1000].set(7) for a in (q, k, v)))
    assert bool(jnp.array_equal(before[:, :1000], after[:, :1000]))
    assert not bool(jnp.array_equal(before[:, 1000:], after[:, 1000:]))


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "name", ["dropout", "blocks chosen at run time", "bias", "numbers by slot"]
)
def test_long_sequences_with(name, d):
    """Against dense products in float32, which drop the same; many tiles for each program."""
    args, options = long((8, 2), d, 128)
    if name == "dropout":
        options |= {"dropout_rate": 0.2, "key": jax.random.key(0)}
    elif name == "bias":
        options["bias"] = ALIBI
    elif name == "numbers by slot":
        rng = np.random.default_rng(1)
        options["bias"] = normal(rng, (8, options["p"].capacity, 1, 1))
    else:
        p, chosen = bsjax.top_blocks(*(a.astype(f32) for a in args[:2]), block=128, count=3)
        options = {"p": p, "mask": (chosen, masks.causal())}
    run = jax.jit(functools.partial(gradients, "mosaic", **options))
    got, again = run(*args), run(*args)
    want = gradients("dense", *(a.astype(f32) for a in args), **options)
    eps = float(jnp.finfo(bf16).eps)
    for a, b, c in zip(got, want, again, strict=True):
        off = jnp.linalg.norm((a.astype(f32) - b).ravel())
        assert float(off) <= eps * float(jnp.linalg.norm(b.ravel()))
        assert bool(jnp.array_equal(a, c))


def test_what_is_kept_bit_by_bit():
    """With zeros for queries and unit vectors for values, y tells what is kept."""
    n, s, h = 2, 128, 2
    q = jnp.zeros((n, s, h, s), bf16)
    v = jnp.broadcast_to(jnp.eye(s, dtype=bf16)[:, None], (n, s, h, s))
    p, key = bsjax.BlockPattern.from_mask(np.ones((2, 2), bool), 64), jax.random.key(3)
    options = {"dropout_rate": 0.4, "key": key, "implementation": "mosaic"}
    y = jax.jit(lambda q, v: bsjax.attention(q, q, v, p, **options))(q, v)
    want = kept(dropout.seeds(key, n, h), s, s, 0.4) > 0
    np.testing.assert_array_equal(np.asarray(y.astype(f32)).swapaxes(1, 2) > 0, want)
