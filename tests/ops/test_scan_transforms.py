"""`scan` under transformations and on meshes; what it keeps, and what it leaves behind."""

import functools
import gc
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import bsjax
from bsjax.ops import _scan
from tests.helpers import assert_raises
from tests.ops.recurrent import (
    PATTERN,
    STEPS,
    K,
    agree,
    gradients,
    recurrent,
    sequence,
    weights,
)


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
    """Without a gradient, that of `jax.lax.scan`; with `remat`, less than without, and equal
    gradients but for roundings: loops that the compiler fuses anew."""
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
    # sums over steps and tokens of terms that were rounded some 13 times in each step before
    roundings = (STEPS * 64) * (STEPS * 13)
    error = float(jnp.finfo(jnp.float32).eps) * roundings**0.5
    agree(*(jax.jit(pull)(w, state, xs) for pull in pulls), rtol=error)


def test_leaves_nothing_behind():
    """Neither tracers, nor a recorder after an error; another thread is not recorded."""
    w, (state, xs, dy) = weights(), sequence()
    model = functools.partial(recurrent, bsjax.scan)
    gc.freeze()  # JAX looks for garbage at every trace, and other tests have left much
    try:
        with jax.checking_leaks():
            _, pull = jax.vjp(model, w, state, xs)
            eager = pull(dy)
            again = gradients(functools.partial(model, remat=True), w, state, xs, cotangent=dy)
    finally:
        gc.unfreeze()
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
