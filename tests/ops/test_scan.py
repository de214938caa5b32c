"""`scan` is `jax.lax.scan`, but for when the gradient of a weight is computed, and how often."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import bsjax
import bsjax.nnx
from bsjax.ops import _core, _scan
from tests.helpers import accumulator, assert_close, assert_raises, normal, random_mask
from tests.kernels.test_interpreted import few_workers, interpreted  # noqa: F401 - a fixture

STEPS, TOKENS = 5, 3
PATTERN = bsjax.BlockPattern.from_mask(random_mask(3, 3, 0.5), (4, 4), capacity=6)
E, K = PATTERN.capacity, PATTERN.shape[0]


def weights(dtype=jnp.float32, p=PATTERN):
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("state", "input", "up"), (p.capacity, *p.block))
    shapes |= {"bias": (p.shape[1],), "gate": (p.capacity,)}
    drawn = {name: normal(rng, shape, dtype) for name, shape in shapes.items()}
    return {name: a * jnp.asarray(a.shape[-1] ** -0.5, dtype) for name, a in drawn.items()}


def sequence(dtype=jnp.float32, width=K, tokens=TOKENS):
    """The first state, inputs, and a cotangent of the outputs."""
    rng = np.random.default_rng(1)
    long = (STEPS, tokens, width)
    return tuple(normal(rng, shape, dtype) for shape in (long[1:], long, long))


def gradients(model, *args, cotangent):
    """The gradient of all arguments."""
    return jax.jit(lambda *args: jax.vjp(model, *args)[1](cotangent))(*args)


@pytest.fixture
def sums(monkeypatch):
    """The shapes of x in every sddmm that is traced."""
    seen, run = [], _core._run_sddmm
    spy = lambda spec, x, y, p: seen.append(x.shape) or run(spec, x, y, p)  # noqa: E731
    monkeypatch.setattr(_core, "_run_sddmm", spy)
    return seen


def agree(got, want, rtol=1e-9):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol)


def recurrent(scan, w, state, xs, p=PATTERN, **options):
    """The smallest model of all."""

    def step(state, x):
        state = jnp.tanh(bsjax.matmul(state, w["state"], p) + x)
        return state, state

    return scan(step, state, xs, **options)[1]


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


def test_scan_in_scan():
    w, (state, xs, dy) = weights(), sequence()

    def model(scan, w, state, xs):
        def step(state, x):
            inner = recurrent(scan, w, state, jnp.stack([x, -x]))
            state = jnp.tanh(inner[-1] + bsjax.matmul(state, w["input"], PATTERN))
            return state, state

        return scan(step, state, xs)[1]

    want, got = (
        gradients(functools.partial(model, scan), w, state, xs, cotangent=dy)
        for scan in (jax.lax.scan, bsjax.scan)
    )
    agree(got, want, rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_second_derivatives(remat):
    """Also those of `jax.lax.scan`, which JAX differentiates twice only if residuals are copies."""
    with jax.enable_x64(True):
        w, (state, xs, dy) = weights(jnp.float64), sequence(jnp.float64)
        w = {"state": w["state"]}

        def twice(scan):
            def once(w, state, xs):
                grads = gradients(functools.partial(recurrent, scan), w, state, xs, cotangent=dy)
                return jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(jnp.sin(g)), grads))

            return jax.jit(jax.grad(once, (0, 1, 2)))(w, state, xs)

        def unrolled(step, state, xs):
            ys = []
            for x in xs:
                state, y = step(state, x)
                ys.append(y)
            return state, jnp.stack(ys)

        want = twice(unrolled)
        agree(twice(functools.partial(bsjax.scan, remat=remat)), want)
        agree(twice(jax.lax.scan), want)


def test_vmap():
    w, (state, xs, dy) = weights(), sequence()
    two = jax.tree.map(lambda a: jnp.stack([a, -0.5 * a]), (w, xs))

    def batch(scan):
        def one(w, xs):
            model = functools.partial(recurrent, scan)
            return jax.vjp(model, w, state, xs)[1](dy)

        return jax.jit(jax.vmap(one))(*two)

    agree(batch(bsjax.scan), batch(jax.lax.scan), rtol=1e-5)


@pytest.mark.parametrize("kind", ["shard_map", "explicit"])
def test_over_a_mesh(kind):
    """Tokens sharded, weights replicated: the gradient of a weight is summed over devices."""
    w, (state, xs, dy) = weights(), sequence(tokens=8)
    axis = "Auto" if kind == "shard_map" else "Explicit"
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType[axis],))
    specs = (P(), P("data"), P(None, "data"), P(None, "data"))

    def pulled(scan, w, state, xs, dy):
        model = functools.partial(recurrent, scan)
        return jax.vjp(model, w, state, xs)[1](dy)

    want = jax.jit(functools.partial(pulled, jax.lax.scan))(w, state, xs, dy)
    ours = functools.partial(pulled, bsjax.scan)
    args = (w, state, xs, dy)
    if kind == "shard_map":
        ours = jax.shard_map(ours, mesh=mesh, in_specs=specs, out_specs=specs[:3])
    else:
        placed = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
        args = tuple(map(jax.device_put, args, placed))
    with jax.set_mesh(mesh):
        agree(jax.jit(ours)(*args), want, rtol=1e-5)


def test_memory():
    """Without a gradient, that of `jax.lax.scan`; with `remat`, less than without, equal bits."""
    w, (state, xs, dy) = weights(), sequence(tokens=64)

    def temporary(f, *args):
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    def deep(scan, w, state, xs, **options):
        def step(state, x):
            for _ in range(4):
                state = jnp.sin(jnp.exp(jnp.tanh(state)))
            state = jnp.tanh(bsjax.matmul(state, w["state"], PATTERN) + x)
            return state, state

        return scan(step, state, xs, **options)[1]

    forward = [
        temporary(functools.partial(deep, s), w, state, xs) for s in (jax.lax.scan, bsjax.scan)
    ]
    assert forward[0] == forward[1]
    pulls = [
        lambda w, state, xs, remat=remat: jax.vjp(
            functools.partial(deep, bsjax.scan, remat=remat), w, state, xs
        )[1](dy)
        for remat in (False, True)
    ]
    saved = STEPS * 64 * K * 4  # bytes of one number for each feature of each step
    assert temporary(pulls[1], w, state, xs) < temporary(pulls[0], w, state, xs) - 3 * saved
    agree(*(jax.jit(pull)(w, state, xs) for pull in pulls), rtol=1e-6)


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


def test_leaves_nothing_behind():
    """Neither tracers, nor a recorder after an error; another thread is not recorded."""
    w, (state, xs, dy) = weights(), sequence()
    model = functools.partial(recurrent, bsjax.scan)
    with jax.checking_leaks():
        _, pull = jax.vjp(model, w, state, xs)
        eager = pull(dy)
        again = gradients(functools.partial(model, remat=True), w, state, xs, cotangent=dy)
        agree(again, eager, rtol=1e-6)

    def fails(state, x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bsjax.scan(fails, state, xs)
    assert _scan._RECORDER.get() is None

    def threaded(scan, *args):
        def besides(step, state, xs):
            def both(state, x):
                other = threading.Thread(target=bsjax.matmul, args=(xs0, w["state"], PATTERN))
                other.start(), other.join()
                return step(state, x)

            return scan(both, state, xs)

        return recurrent(besides, *args)

    xs0 = xs[0]
    agree(
        gradients(functools.partial(threaded, bsjax.scan), w, state, xs, cotangent=dy),
        eager,
        rtol=1e-6,
    )


def test_errors():
    w, (state, xs, _) = weights(), sequence()
    assert_raises(
        lambda: recurrent(bsjax.scan, w, state, xs, remat=1),
        TypeError,
        "scan: `remat` must be True or False, got 1.",
    )
    calls = []

    def impure(w):
        def step(state, x):
            calls.append(1)
            for _ in calls:
                state = bsjax.matmul(state, w["state"], PATTERN)
            return state, None

        return bsjax.scan(step, state, xs)[0]

    assert_raises(
        lambda: jax.jit(impure)(w),
        ValueError,
        "scan: `f` called 1 products when it was traced first and 2 or others the second time: it "
        "must be pure, the same function at every call.",
    )


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
