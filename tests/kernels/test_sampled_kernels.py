"""Kernels of sampled products in the interpreter: races are errors, memory nobody wrote is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _mosaic
from pallas_kernels import gathered, lists
from tests.helpers import assert_close, normal, slow, tolerance
from tests.kernels.test_interpreted import interpreted

pytestmark = pytest.mark.interpreted
bf16, f16 = jnp.bfloat16, jnp.float16
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def few_workers(monkeypatch):
    monkeypatch.setattr(_mosaic, "multiprocessors", lambda: 4)


def inputs(n, k, m, dtype=bf16, lead=()):
    """x, w and a random cotangent; blocks of features are of unequal size."""
    rng = np.random.default_rng(0)
    uneven = np.repeat(rng.lognormal(size=k // 64), 64)
    x = (rng.normal(size=(*lead, n, k)) * uneven).astype(np.float32)
    w = normal(rng, (k, m), dtype)
    return jnp.asarray(x).astype(dtype), w, normal(rng, (*lead, n, m), dtype)


@functools.partial(jax.jit, static_argnames=("fraction", "sampler", "block", "implementation"))
def run(x, w, dy, key=KEY, **options):
    """y, dx and dw."""
    y, pull = jax.vjp(lambda x, w: bsjax.sampled_matmul(x, w, key=key, **options), x, w)
    return y, *pull(dy)


def conforms(x, w, dy, terms, run_kernels=interpreted, out=False, **options):
    """Agrees with the reference in float32, of the same sample, and is zero off the sample. Kernels
    find NaN in the features `out`, for the reference they are zero."""
    given = jnp.where(out, jnp.nan, x), jnp.where(jnp.transpose(out), jnp.nan, w)
    with run_kernels():
        got = jax.block_until_ready(run(*given, dy, implementation="mosaic", **options))
    wide = (jnp.where(out, 0, x), jnp.where(jnp.transpose(out), 0, w), dy)
    wide = (a.astype(jnp.float32) for a in wide)
    want = run(*wide, implementation="reference", **options)
    # features count very differently: those of dx are columns, those of dw rows
    for g, e, feature in zip(got, want, (None, -1, 0), strict=True):
        assert g.dtype == x.dtype
        close(g, np.asarray(e), feature, terms)
        np.testing.assert_array_equal(np.asarray(g == 0)[np.asarray(e == 0)], True)


def close(got, want, feature, terms):
    """The tolerance of sums of products of unit size, for each feature by its own size."""
    others = tuple(i for i in range(want.ndim) if feature is None or i != feature % want.ndim)
    size = np.sqrt(np.mean(np.square(want), axis=others, keepdims=True) / terms)
    size = np.where(size == 0, 1, size)
    np.testing.assert_allclose(
        np.asarray(got, np.float32) / size, want / size, **tolerance(got.dtype, terms)
    )


CASES = {
    "several odd tiles, blocks of 128": (
        (301, 512, 318),
        {"fraction": 0.75, "block": 128, "sampler": "priority"},
    ),
    "odd tokens and features": ((200, 512, 190), {"fraction": 0.4, "block": 64}),
    "blocks of 128": ((130, 512, 256), {"fraction": 0.5, "block": 128}),
    "the same counts": ((70, 256, 64), {"fraction": 0.5, "block": 64, "sampler": "uniform"}),
    "some drawn twice": (
        (64, 512, 64),
        {"fraction": 0.8, "block": 64, "sampler": "with_replacement"},
    ),
    "one of two": ((3, 128, 8), {"fraction": 0.1, "block": 64, "sampler": "top_k"}),
    "several tiles": ((600, 256, 384), {"fraction": 0.75, "block": 64, "sampler": "priority"}),
}
FIRST, *REST = CASES


@pytest.mark.parametrize("name", [FIRST, *map(slow, REST)])
def test_y_and_both_gradients(name, monkeypatch):
    if name == FIRST:  # several for each worker too, in all three products
        monkeypatch.setattr(_mosaic, "multiprocessors", lambda: 2)
    (n, k, m), options = CASES[name]
    conforms(*inputs(n, k, m), terms=max(n, k, m), **options)


@pytest.mark.parametrize("sampler", ["with_replacement", slow("systematic")])
def test_float16_and_leading_axes(sampler):
    """Also of groups that are drawn twice."""
    x, w, dy = inputs(5, 512, 72, f16, lead=(2, 3))
    conforms(x, w, dy, terms=512, fraction=0.8, block=64, sampler=sampler)


@pytest.mark.parametrize(("n", "m", "scores"), [(3, 8, [0, 1]), slow(64, 64, [2, 0, 1, 0])])
def test_what_is_not_taken_is_not_read(n, m, scores):
    """NaN in the rows of w and the columns of x that a sample leaves out, at least every second."""
    x, w, dy = inputs(n, 64 * len(scores), m)
    scores = jnp.repeat(jnp.array(scores, jnp.float32), 64)
    options = {"fraction": 0.5, "block": 64, "sampler": "top_k", "scores": scores}
    conforms(x, w, dy, terms=max(n, *w.shape), out=scores[None] == 0, **options)


def test_second_derivatives():
    """The three products are each other's derivatives: by x, w and dy, of dx and dw."""
    x, w, dy = inputs(16, 128, 64)
    rng = np.random.default_rng(1)
    cotangents = normal(rng, x.shape, bf16), normal(rng, w.shape, bf16)

    def second(arguments, cotangents, name):
        def first(x, w, dy):
            options = {"key": KEY, "fraction": 0.5, "block": 64, "implementation": name}
            return jax.vjp(lambda x, w: bsjax.sampled_matmul(x, w, **options), x, w)[1](dy)

        return jax.jit(lambda *args: jax.vjp(first, *args)[1](cotangents))(*arguments)

    with interpreted():
        got = jax.block_until_ready(second((x, w, dy), cotangents, "mosaic"))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), ((x, w, dy), cotangents))
    *firsts, ddy = zip(got, second(*wide, "xla"), strict=True)
    for g, e in firsts:
        assert_close(g, e, 128)
    g, e = (np.asarray(a, np.float32) for a in ddy)  # the sum of two, each rounded once
    assert np.abs(g - e).max() <= 2 * 2**-8 * np.abs(e).max()


def test_vmap_draws_for_each():
    x, w, _ = inputs(40, 256, 64)
    keys = jax.random.split(KEY, 2)

    def f(key, name, x=x, w=w):
        options = {"key": key, "fraction": 0.5, "block": 64, "sampler": "uniform"}
        return bsjax.sampled_matmul(x, w, implementation=name, **options)

    with interpreted():
        got = jax.block_until_ready(jax.vmap(lambda key: f(key, "mosaic"))(keys))
    wide = {"x": x.astype(jnp.float32), "w": w.astype(jnp.float32)}
    for g, key in zip(got, keys, strict=True):
        assert_close(g, f(key, "reference", **wide), 256)
    assert not np.array_equal(*map(np.asarray, got))


@pytest.mark.parametrize("counts", [[0, 2, 1], [0, 0, 3], [1, 1e30, 2]])
def test_quotients_give_each_slice_its_count(counts):
    """Also where a slice counts nothing, which nothing is divided by."""
    factors = np.asarray(lists.quotients(jnp.array(counts, jnp.float32), same=False), np.float64)
    products = np.cumprod(factors[:0:-1])[::-1]
    np.testing.assert_allclose(products, counts, rtol=1e-6)


def test_lists_name_every_slice_once():
    weights = jnp.array([0, 3, 0, 0, 2, 0], jnp.float32)
    slices, counts = lists.of_sample(weights, 3, 2)
    assert sorted(np.asarray(slices)) == list(range(12))
    np.testing.assert_array_equal(np.asarray(slices[2:6]), [8, 9, 2, 3])
    np.testing.assert_array_equal(np.asarray(counts), [0, 0, 2, 2, 3, 3])


@pytest.mark.parametrize("rows", [1, 64, 65, 8192])
@pytest.mark.parametrize("columns", [64, 832, 8192])
@pytest.mark.parametrize("slices", [1, 128, 4096])
def test_every_tiling_fits(rows, columns, slices):
    """Stages to run ahead, and shared memory for all of them."""
    chosen = gathered.tiling(rows, columns, slices)
    assert chosen.stages >= 2
    step = 2 * 64 * (chosen.rows + chosen.width)
    staged = 2 * 64 * chosen.warpgroups * (64 * chosen.slots + 32)
    assert chosen.stages * step + staged + 8 * slices <= 232_448
