"""Convolutions on a GPU. `-m gpu --require-gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import assert_close
from tests.kernels.test_conv_kernels import EPILOGUES, MASK, check_epilogue, terms
from tests.ops import conv
from tests.ops.conv import case, cotangent, ours

pytestmark = pytest.mark.gpu
bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32


def theirs(one):
    """On the CPU: what cuDNN takes for float32 and windows of 3 x 3 may be Winograd's algorithm,
    whose errors the tolerance does not know."""
    return conv.theirs(one._replace(x=jax.device_put(one.x, jax.devices("cpu")[0])))


def conforms(space, window, dtype=bf16, block=64, **options):
    """y, dx and dvalues agree with `lax` in float32, and again bit by bit."""
    one = case(space, window, dtype=dtype, block=block, **{"mask": MASK, **options})
    got = ours(one, "mosaic")
    for g, w in zip(got, theirs(one), strict=True):
        assert g.dtype == dtype
        assert_close(g, w, terms(one))
    assert not np.any(np.asarray(got[2][one.p.nnz :]))  # spare slots receive zeros
    for g, again in zip(got, ours(one, "mosaic"), strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(again))


@pytest.mark.parametrize("block", [16, 32, 64, 128, (64, 256), (256, 64), (32, 128)])
@pytest.mark.parametrize("strides", [1, 2])
def test_blocks(block, strides):
    conforms((14, 9), (3, 3), block=block, strides=strides, lead=(70,))


@pytest.mark.parametrize(
    ("space", "window", "options"),
    [
        ((2, 3), (3, 3), {}),
        ((9, 7), (3, 2), {"strides": (2, 1), "padding": ((2, 0), (0, 1)), "dilation": (1, 2)}),
        ((8, 6), (3, 3), {"strides": 2, "transpose": True}),
        ((30,), (3,), {"padding": "VALID", "dilation": 2, "lead": (2, 40)}),
        ((4, 6, 5), (2, 3, 2), {"strides": (1, 2, 1)}),
        ((7, 7), (5, 5), {"padding": 3, "lead": (300,), "dtype": f16}),
    ],
)
def test_geometry(space, window, options):
    conforms(space, window, **options)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue):
    check_epilogue(*epilogue)


@pytest.mark.parametrize("block", [64, 128])
def test_a_layer_many_times_the_same_bits(block):
    """256 images of 28 x 28 pixels; a race seldom shows in two runs."""
    mask = np.random.default_rng(0).random((256 // block, 256 // block)) < 0.5
    mask[0, 0] = True
    one = case((28, 28), (3, 3), dtype=bf16, block=block, mask=mask, lead=(256,))
    values = one.values.at[one.p.nnz :].set(0)

    @jax.jit
    def run(x, values):
        y, pull = jax.vjp(lambda x, v: bsjax.conv(x, v, one.p, implementation="mosaic"), x, values)
        return y, *pull(cotangent(y))

    first = run(one.x, values)
    for g, w in zip(first, theirs(one), strict=True):
        g, w = (np.asarray(a, np.float32) for a in (g, w))
        assert np.abs(g - w).max() <= 2**-8 * np.abs(w).max()
    same = jax.jit(lambda a, b: jax.tree.map(jnp.array_equal, a, b))
    for _ in range(30):
        assert all(map(bool, same(first, run(one.x, values))))
