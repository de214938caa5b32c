"""`scan` is `jax.lax.scan`, but for when the gradient of a weight is computed, and how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.nnx
from bsjax.ops import _core
from tests.helpers import accumulator, assert_close, normal, random_mask
from tests.kernels.test_interpreted import few_workers, interpreted  # noqa: F401 - a fixture
from tests.ops.recurrent import PATTERN, STEPS, TOKENS, K, agree, gradients, sequence, weights


@pytest.fixture
def sums(monkeypatch):
    """The shapes of x in every sddmm that is traced."""
    seen, run = [], _core._run_sddmm
    spy = lambda spec, x, y, p: seen.append(x.shape) or run(spec, x, y, p)  # noqa: E731
    monkeypatch.setattr(_core, "_run_sddmm", spy)
    return seen


def cell(w, p, implementation, carry, x):
    """Every form of product, values used by several, other uses of values, and whole numbers."""
    (state, memory), count = carry
    index, x = x
    matmul = functools.partial(bsjax.matmul, implementation=implementation)
    forget = matmul(state, w["state"], p, bias=w["bias"], activation="sigmoid", residual=0.1 * x)
    update = matmul(x, w["input"], p) + matmul(forget, w["state"], p, transpose=True)
    gated = matmul(update, w["up"], p, gate=w["gate"])
    memory = forget * memory + bsjax.glu(
        jnp.tanh(gated), w["input"], w["up"], p, implementation=implementation
    )
    state = jnp.tanh(memory) + 0.1 * jnp.mean(w["state"])
    return ((state, memory), count + index), {"state": state, "count": count}


@pytest.mark.parametrize(
    ("implementation", "options"),
    [("xla", {}), ("auto", {"reverse": True, "unroll": 2}), ("dense", {"remat": True})],
    ids=["plain", "reverse and unrolled", "remat"],
)
def test_is_lax_scan(implementation, options, sums):
    """To float64, with one sddmm for each product, over the tokens of all steps."""
    with jax.enable_x64(True):
        w, (state, xs, dy) = weights(jnp.float64), sequence(jnp.float64)
        init, index = ((state, state), jnp.int32(0)), jnp.arange(STEPS, dtype=jnp.int32)

        def run(scan, options):
            def model(w, p, state, xs):
                step = functools.partial(cell, w, p, implementation)
                (_, count), ys = scan(step, (state, init[1]), (index, xs), **options)
                return ys["state"] + count.astype(xs.dtype)

            f = jax.jit(lambda *args: (model(*args), jax.vjp(model, *args)[1](dy)))
            return f(w, PATTERN, init[0], xs)

        rest = {name: option for name, option in options.items() if name != "remat"}
        want = run(jax.lax.scan, rest)
        assert {shape[:-1] for shape in sums} == {(TOKENS,)}
        sums.clear()
        got = run(bsjax.scan, options)
        assert [shape[:-1] for shape in sums] == [(STEPS, TOKENS)] * 5
        assert got[0].dtype == jnp.float64
        # the patterns have no gradient
        agree((got[0], got[1][0], *got[1][2:]), (want[0], want[1][0], *want[1][2:]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kept", [None, jnp.float32], ids=["as computed", "cast in the body"])
def test_is_rounded_once(dtype, kept):
    """The gradient is the sum over steps of what this model does, probed by hand."""
    w, (state, xs, dy) = weights(dtype), sequence(dtype)
    values = w["state"] if kept is None else w["state"].astype(kept)

    def step(values, state, x, probe):
        sums = bsjax.matmul(state, values.astype(dtype), PATTERN, implementation="xla")
        return jnp.tanh(sums + x + probe)

    def ours(values):
        def body(state, x):
            new = step(values, state, x, jnp.zeros_like(state))
            return new, new

        return bsjax.scan(body, state, xs)[1]

    def probed(probes):
        def body(state, x_probe):
            new = step(values, state, *x_probe)
            return new, (new, state)

        ys, states = jax.lax.scan(body, state, (xs, probes))[1]
        return ys, states

    (got,) = gradients(ours, values, cotangent=dy)
    _, pull, states = jax.jit(lambda probes: jax.vjp(probed, probes, has_aux=True))(xs * 0)
    wide = (a.astype(accumulator(dtype)) for a in (states, *pull(dy)))
    want = bsjax.sddmm(*wide, PATTERN, implementation="reference")
    assert got.dtype == values.dtype
    assert_close(got.astype(dtype), want, STEPS * TOKENS)


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
def test_weights_in_a_module(dtype, error, sums):
    """A Flax cell that `f` closes over, or that it merges; features that blocks do not divide."""

    class Cell(nnx.Module):
        def __init__(self, rngs):
            options = {"pattern": random_mask(3, 3, 0.7), "block": 4, "rngs": rngs, "dtype": dtype}
            self.state = bsjax.nnx.BlockLinear(11, 11, **options)
            self.input = bsjax.nnx.BlockLinear(10, 11, use_bias=False, **options)

        def __call__(self, state, x):
            sums = self.state(state, activation="relu") + self.input(x)
            state = jnp.tanh(sums.astype(jnp.float32))
            return state, state

    _, xs, _ = sequence(width=10)
    state, _, dy = sequence(width=11)

    def gradient(scan, merge):
        def loss(cell):
            graph, leaves = nnx.split(cell)
            step = (lambda *a: nnx.merge(graph, leaves)(*a)) if merge else cell
            return jnp.vdot(scan(step, state, xs)[1], dy)

        return nnx.jit(nnx.grad(loss))(Cell(nnx.Rngs(0)))

    want = gradient(jax.lax.scan, True)
    for merge in (True, False):
        sums.clear()
        agree(gradient(bsjax.scan, merge), want, error)
        assert sums == [(STEPS, TOKENS, 12)] * 2


def test_what_is_not_one_product_for_all_steps_is_right(sums):
    """Values of each step, or of the state, and products inside other transformations."""
    w, (state, xs, dy) = weights(), sequence()

    def model(scan, w, state, xs):
        scale = jnp.linspace(0.5, 1.0, STEPS)
        product = functools.partial(bsjax.matmul, p=PATTERN, implementation="xla")

        def inner(state, _):
            return jnp.tanh(product(state, w["state"])), None

        def step(state, x):
            x, scale = x
            state = product(state, w["state"] * scale) + product(x, w["up"] * state[0, 0])
            state = state + jax.jit(lambda s: product(s, w["input"]))(state)
            state = state + jax.vmap(lambda s: product(s, w["input"]))(state)
            state = state + jax.checkpoint(lambda s: product(s, w["input"]))(state)
            state = state + bsjax.matmul(x, w["up"], PATTERN, implementation="reference")
            state = jnp.tanh(jax.lax.scan(inner, state, None, length=2)[0])
            return state, state + product(state, w["state"])  # the only one

        return scan(step, state, (xs, scale))[1]

    want, got = (
        gradients(functools.partial(model, scan), w, state, xs, cotangent=dy)
        for scan in (jax.lax.scan, bsjax.scan)
    )
    agree(got, want, rtol=2e-5)
    assert sums.count((STEPS, TOKENS, K)) == 1


def test_lengths_and_types_of_the_state():
    """No xs, no steps, a state that is a Python number, and a state that is not differentiated."""
    w = weights()

    def model(scan, w, length):
        def step(state, _):
            total, key = state
            x = jax.random.normal(key, (TOKENS, K)) + jnp.asarray(total, jnp.float32)
            total = jnp.tanh(bsjax.matmul(x, w["state"], PATTERN)).sum()
            total = total.astype(jnp.bfloat16)
            return (total, jax.random.split(key)[0]), total

        return scan(step, (0.0, jax.random.key(0)), None, length)[1]

    for length in (0, STEPS):
        dy = normal(np.random.default_rng(2), (length,), jnp.bfloat16)
        want, got = (
            gradients(lambda w, f=scan, n=length: model(f, w, n), w, cotangent=dy)
            for scan in (jax.lax.scan, bsjax.scan)
        )
        agree(got, want, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.interpreted
def test_the_kernels():
    """The epilogue is fused, and its sums are probed inside."""
    p = bsjax.BlockPattern.from_mask(np.eye(2, dtype=bool), 32)
    w, (state, xs, dy) = weights(jnp.bfloat16, p), sequence(jnp.bfloat16, width=64)

    def model(scan, implementation, w, state, xs):
        def step(state, x):
            options = {"bias": w["bias"], "activation": "tanh", "implementation": implementation}
            state = bsjax.matmul(state + x, w["state"], p, **options)
            return state, state

        return scan(step, state, xs[:2])[1]

    with interpreted():
        run = functools.partial(model, bsjax.scan, "mosaic")
        got = jax.block_until_ready(gradients(run, w, state, xs, cotangent=dy[:2]))
    want = gradients(
        functools.partial(model, jax.lax.scan, "dense"), w, state, xs, cotangent=dy[:2]
    )
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        spread = float(jnp.abs(v.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            g.astype(jnp.float32), v.astype(jnp.float32), rtol=0, atol=2**-6 * spread + 1e-6
        )
