"""Kernels on a GPU: what the interpreter and the compiler cannot see. `-m gpu --require-gpu`."""

import contextlib
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import patterns
from pallas_kernels import config
from tests.helpers import Case, assert_close, hub_mask, islands_mask, kept, products, random_mask
from tests.kernels import test_epilogue
from tests.kernels.test_interpreted import CASES, MORE_SIDES

pytestmark = pytest.mark.gpu
bf16, f16 = jnp.bfloat16, jnp.float16

mosaic = functools.partial(products, implementation="mosaic")


def conforms(case, dtype=bf16, *, transpose=False):
    """y, dx and dvalues agree with the reference in float32, and again bit by bit."""
    inputs = case.inputs(dtype, transpose=transpose)
    got = mosaic(inputs, transpose=transpose)
    want = products(kept(inputs), transpose=transpose, implementation="reference")
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g, w, case.terms)
    assert not np.any(np.asarray(got[2][inputs.p.nnz :]))  # spare slots receive zeros
    for g, again in zip(got, mosaic(inputs, transpose=transpose), strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(again))


def big(block, density, n=2048, side=4096, seed=0):
    """Random blocks of a weight of that side."""
    br, bc = (block, block) if isinstance(block, int) else block
    mask = patterns.random((side // br, side // bc), density, seed=seed)
    return Case(mask=mask, block=(br, bc), n=n)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matmul_and_its_derivatives(case):
    conforms(case)


@pytest.mark.parametrize("name", ["hub, spare", "wide", "tall", "side 128"])
def test_transposed(name):
    conforms(CASES[name], transpose=True)


@pytest.mark.parametrize("name", ["hub, spare", "side 128"])
def test_float16(name):
    conforms(CASES[name], f16)


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_stored(n):
    conforms(Case(mask=np.zeros((3, 2), bool), block=32, n=n))


@pytest.mark.parametrize("block", [64, 128, 32, 16, (64, 256)], ids=str)
def test_large(block):
    conforms(big(block, 0.05))


@pytest.mark.parametrize("block", [64, 32], ids=str)
def test_hubs(block):
    """A block-row and a block-column that hold everything: tiles are cut between workers."""
    side = 4096 // block
    conforms(Case(mask=hub_mask(side, side), block=block, n=2048))


def test_empty_rows_and_columns():
    conforms(Case(mask=islands_mask(64, 64), block=64, n=1000))


@pytest.mark.parametrize(("columns", "cluster"), [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("side", [64, pytest.param(16, marks=pytest.mark.slow)])
def test_what_is_read_is_shared(side, columns, cluster, monkeypatch):
    """By output blocks side by side, and by programs with other tokens."""
    heuristic = config.for_matmul

    def shared(n, block, out_bytes, workers, **options):
        found = heuristic(n, block, out_bytes, workers, **options)
        chosen = {"columns": columns, "cluster": cluster, "workers": workers // cluster}
        return config.staged(dataclasses.replace(found, tile=128, **chosen), block[1], out_bytes)

    monkeypatch.setattr(config, "for_matmul", shared)
    jax.clear_caches()
    conforms(big(side, 0.25, n=1000, side=2048))


@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_few_tokens(n):
    conforms(big(32, 0.05, n=n))


@pytest.mark.parametrize(
    "which",
    [
        {"bias": True, "residual": True, "activation": "gelu"},
        {"bias": True, "activation": "silu", "transpose": True},
        {"residual": True, "dtype": f16},
        {"gate": True},
        {"bias": True, "activation": jax.nn.softplus},
    ],
    ids=["everything", "transposed", "float16", "gate", "a function"],
)
def test_epilogues_and_their_gradients(which, monkeypatch):
    monkeypatch.setattr(test_epilogue, "interpreted", contextlib.nullcontext)
    case = big(64, 0.1, n=1000, side=1024)
    got, want = (test_epilogue.run(case, name, **which) for name in ("mosaic", "reference"))
    test_epilogue.close(case, got, want)


@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_layer(gated):
    """Whose gradients of activation and bias are an epilogue of the product with D^T."""
    nnx = pytest.importorskip("flax.nnx")
    modules = importlib.import_module("bsjax.nnx")
    mask, x = random_mask(16, 32, 0.2), jnp.ones((700, 1024), bf16)
    x = x * jax.random.normal(jax.random.key(0), x.shape, bf16)

    def run(implementation):
        model = modules.BlockMLP(
            1024,
            2048,
            pattern=mask,
            block=64,
            gated=gated,
            activation="silu",
            dtype=bf16,
            bias_init=jax.nn.initializers.normal(),
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )

        def loss(model):
            y = model(x, residual=x)
            return jnp.sum(y.astype(jnp.float32) * jnp.sin(jnp.arange(1024.0))[None]), y

        grads, y = nnx.jit(nnx.grad(loss, has_aux=True))(model)
        return jax.tree.leaves((grads, y))

    for g, w in zip(run("mosaic"), run("dense"), strict=True):
        g, w = (np.asarray(a).astype(np.float32) for a in (g, w))
        # each step of the chain rounds once, in one order or another
        assert np.abs(g - w).max() <= 4 * float(jnp.finfo(bf16).eps) * np.abs(w).max()


def test_many_times_the_same_bits():
    """A race seldom shows in two runs."""
    inputs = big(64, 0.1, n=1024, side=2048).inputs(bf16)
    first = mosaic(inputs)
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.array_equal(x, y), a, b))
    for _ in range(50):
        assert all(map(bool, same(first, mosaic(inputs))))


def test_patterns_are_data():
    """Another pattern of the same capacity compiles nothing."""
    case = big(64, 0.1, n=512, side=1024)
    inputs, traces = case.inputs(bf16), []

    @jax.jit
    def run(x, values, p):
        traces.append(1)
        return bsjax.matmul(x, values, p, implementation="mosaic")

    for seed in range(3):
        p = bsjax.BlockPattern.from_mask(patterns.random((16, 16), 0.1, seed=seed), 64)
        y = run(inputs.x, inputs.values, p)
        want = bsjax.matmul(
            inputs.x.astype(jnp.float32),
            inputs.values.astype(jnp.float32),
            p,
            implementation="reference",
        )
        assert_close(y, want, 16 * 64)
    assert len(traces) == 1


@pytest.mark.parametrize(("density", "kernels"), [(0.1, 3), (0.7, 0)])
def test_auto_takes_the_kernels_where_they_are_faster(density, kernels):
    """Forward and backward, by what was measured."""
    inputs = big(64, density, n=4096, side=8192).inputs(bf16)
    step = jax.jit(functools.partial(products, implementation="auto"))
    assert step.lower(inputs).compile().as_text().count('custom_call_target="mosaic') == kernels


def test_vmap_over_everything():
    case = Case(mask=random_mask(8, 8, 0.5), block=64, n=256)
    inputs = case.inputs(bf16)
    p = bsjax.BlockPattern.from_mask(random_mask(8, 8, 0.5, seed=1), 64)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), inputs.p, p)
    xs, vs = (jnp.stack([a, 2 * a]) for a in (inputs.x, inputs.values))

    def gradients(implementation, dtype):
        def one(x, v, p):
            y = bsjax.matmul(x, v, p, implementation=implementation)
            return jnp.sum(y.astype(jnp.float32) * inputs.dy.astype(jnp.float32))

        return jax.jit(jax.vmap(jax.grad(one, (0, 1))))(xs.astype(dtype), vs.astype(dtype), both)

    got, want = gradients("mosaic", bf16), gradients("reference", jnp.float32)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, case.terms)


def test_scan_with_gradient_and_rematerialisation():
    case = big(64, 0.25, n=256, side=512)
    inputs = case.inputs(bf16)
    stack = jnp.stack([inputs.values, -inputs.values, 2 * inputs.values])
    stack = (0.05 * stack).astype(bf16)

    def gradient(implementation):
        @jax.checkpoint
        def layer(x, values):
            y = bsjax.matmul(x, values, inputs.p, implementation=implementation)
            return jnp.tanh(y), None

        def loss(stack, x):
            return jnp.sum(jax.lax.scan(layer, x, stack)[0].astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(stack, inputs.x)

    # the same rounded steps in another order of additions
    for g, w in zip(gradient("mosaic"), gradient("dense"), strict=True):
        off = jnp.linalg.norm((g - w).astype(jnp.float32).ravel())
        assert float(off) < 0.02 * float(jnp.linalg.norm(w.astype(jnp.float32).ravel()))


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("case", MORE_SIDES.values(), ids=MORE_SIDES)
def test_more_sides(case, dtype, transpose):
    conforms(case, dtype, transpose=transpose)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("block", [16, 32, 64, 128, (64, 256), (256, 64)], ids=str)
def test_large_and_dense(block, density, dtype):
    conforms(big(block, density), dtype)
    conforms(big(block, density, n=2000), dtype, transpose=True)


@pytest.mark.slow
def test_graphs():
    mask = patterns.barabasi_albert(64, 4, seed=0)
    conforms(Case(mask=mask, block=64, n=2048))
