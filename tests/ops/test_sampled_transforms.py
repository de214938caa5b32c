"""Sampled products under every transformation, over a mesh, in memory, and their messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from tests.helpers import assert_close, assert_raises, slow, unchecked
from tests.ops.test_sampled import KEY, K, M, inputs, run


@pytest.mark.parametrize("policy", ["forward", "backward", slow("weight")])
def test_vmap_draws_for_each(policy):
    """Keys and tokens mapped: every element as if it were alone."""
    x, w, dy = inputs((3, 20))
    keys = jax.random.split(KEY, 3)
    one = functools.partial(run, policy=policy, block=2, sampler="priority")
    together = jax.vmap(one, (0, None, 0, 0))(x, w, dy, keys)
    for i in range(3):
        alone = one(x[i], w, dy[i], keys[i])
        for ours, theirs in zip(together, alone, strict=True):
            assert_close(ours[i], np.asarray(theirs), K * 64)


@pytest.mark.parametrize(
    ("policy", "remat"),
    [
        ("forward", True),
        ("backward", False),
        ("weight", True),
        slow("forward", False),
        slow("backward", True),
        slow("weight", False),
    ],
)
def test_scan_and_remat_repeat_the_sample(policy, remat):
    """A loop over keys, differentiated: with and without computing the forward pass again."""
    x, w, dy = inputs((5,), m=K)
    keys = jax.random.split(KEY, 3)

    @jax.jit
    def step(w, h, key):
        options = {"fraction": 0.5, "policy": policy, "sampler": "priority"}
        return bsjax.sampled_matmul(h, w, key=key, **options)

    def loop(step, x, w):
        return jnp.vdot(jax.lax.scan(lambda h, key: (step(w, h, key), None), x, keys)[0], dy)

    def unrolled(x, w):
        for i in range(3):
            x = step(w, x, keys[i])
        return jnp.vdot(x, dy)

    want = jax.grad(unrolled, (0, 1))(x, w / 8)  # compiles one step, and not three
    one = jax.checkpoint(step) if remat else step
    got = jax.jit(jax.grad(functools.partial(loop, one), (0, 1)))(x, w / 8)
    for ours, theirs in zip(got, want, strict=True):
        few = 16 * float(jnp.finfo(jnp.float32).eps)  # of some steps in another order
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=few * float(abs(theirs).max()))


def test_keys_change_the_sample_without_compiling_again():
    x, w, dy = inputs()
    first = run(x, w, dy, KEY)
    before = run._cache_size()
    np.testing.assert_array_equal(first[0], run(x, w, dy, KEY)[0])
    assert np.any(first[0] != run(x, w, dy, jax.random.key(4))[0])
    assert run._cache_size() == before
    raw = run(x, w, dy, jax.random.key_data(KEY))
    np.testing.assert_array_equal(first[0], raw[0])


def test_nan_under_jit():
    """It cannot be an error there: all that is sampled becomes NaN, and nothing else."""
    x, w, dy = inputs()
    y, dx, dw = run(x.at[0, 0, 0].set(jnp.nan), w, dy, KEY)
    assert jnp.isnan(y).all()
    y, dx, dw = run(x.at[0, 0, 0].set(jnp.nan), w, dy, KEY, policy="weight")
    assert jnp.isnan(y).sum() == M
    assert jnp.isfinite(dx).all()
    assert jnp.isnan(dw).all()
    y, dx, dw = run(x, w, dy.at[0, 0, 0].set(jnp.nan), KEY, policy="backward")
    assert jnp.isfinite(y).all()
    assert jnp.isnan(dx).all()
    assert jnp.isnan(dw).all()


def test_weight_keeps_the_sampled_tokens_only():
    """What lies between the passes of a layer whose input nobody else keeps."""
    n, k = 4096, 256
    x, w = jnp.ones((n, k)), jnp.ones((k, 8))

    def memory(fraction):
        """Of a program that returns y and what the gradient of w needs."""

        def forward(u, w):
            layer = lambda w: bsjax.sampled_matmul(  # noqa: E731
                jnp.sin(u), w, key=KEY, fraction=fraction, block=8, policy="weight"
            )
            return jax.vjp(layer, w)

        analysis = jax.jit(forward).lower(x, w).compile().memory_analysis()
        return analysis.output_size_in_bytes

    whole = 4 * n * k
    assert memory(1) > whole
    assert memory(0.25) < 0.25 * whole + 4 * (n * 8 + 2 * k * 8 + n)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, slow(AxisType.Explicit)])
def test_tokens_over_a_mesh_are_not_gathered(axis_type):
    """Policy "forward": the sample is of features, and only scores and dw are summed."""
    x, w, dy = inputs((16, 8))
    options = {"sampler": "priority", "block": 4}
    want = run(x, w, dy, KEY, **options)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((x, dy), NamedSharding(mesh, P("data")))
        w, key = jax.device_put((w, KEY), NamedSharding(mesh, P()))
        program = run.lower(x, w, dy, key, **options).compile()
        got = program(x, w, dy, key)
    assert "all-gather" not in program.as_text()
    assert "all-reduce" in program.as_text()
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, np.asarray(theirs), 128 * 16)


@pytest.mark.parametrize("policy", ["weight", slow("backward")])
@pytest.mark.parametrize("spec", [slow(P("data")), P("data", "model")])
def test_samples_of_tokens_over_explicit_axes(spec, policy):
    """The sample of one device: of x and dy only the tokens that are taken are exchanged."""
    x, w, dy = inputs((16, 8))
    options = {"sampler": "priority", "block": 4, "policy": policy}
    want = run(x, w, dy, KEY, **options)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((x, dy), NamedSharding(mesh, spec))
        w, key = jax.device_put((w, KEY), NamedSharding(mesh, P()))
        program = run.lower(x, w, dy, key, **options).compile()
        got = program(x, w, dy, key)
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    assert not any(f",{K}]" in line or f",{M}]" in line for line in gathered)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, np.asarray(theirs), 128 * 16)


@pytest.mark.parametrize("policy", ["forward", "weight", slow("backward")])
def test_shard_map(policy):
    """With its checks on: each device samples its own tokens, and dw is summed."""
    x, w, dy = inputs((16, 3))
    options = {"sampler": "priority", "policy": policy}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P(), P("data"), P())
    local = lambda *a: run(*a, **options)  # noqa: E731
    run_all = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(*specs[::2], P()))
    got = jax.jit(run_all)(x, w, dy, KEY)
    halves = [run(x[i : i + 8], w, dy[i : i + 8], KEY, **options) for i in (0, 8)]
    want = [*(jnp.concatenate(pair) for pair in list(zip(*halves, strict=True))[:2])]
    for ours, theirs in zip(got, [*want, halves[0][2] + halves[1][2]], strict=True):
        assert_close(ours, np.asarray(theirs), 128 * 16)


X, W = jnp.ones((5, 24)), jnp.ones((24, 16))
call = functools.partial(bsjax.sampled_matmul, X, W, key=KEY, fraction=0.5)
HALF = {"key": KEY, "fraction": 0.5}
TAKE_AUTO = 'Use implementation="auto", which takes the fastest that can.'

WRONG = {
    "seed": (
        lambda: call(key=0),
        TypeError,
        "sampled_matmul: `key` must be one PRNG key, got 0: make one with jax.random.key(seed) and "
        "split it for every call.",
    ),
    "shapes": (
        lambda: bsjax.sampled_matmul(X, W.T, **HALF),
        ValueError,
        "sampled_matmul: `x` of shape (5, 24) cannot multiply `w` of shape (16, 24): expected "
        "(..., 16).",
    ),
    "a number": (
        lambda: bsjax.sampled_matmul(X[0, 0], W, **HALF),
        ValueError,
        "sampled_matmul: `x` of shape () cannot multiply `w` of shape (24, 16): expected "
        "(..., 24).",
    ),
    "axes of w": (
        lambda: bsjax.sampled_matmul(X, W[None], **HALF),
        ValueError,
        "sampled_matmul: `w` must have 2 axes, got shape (1, 24, 16).",
    ),
    "whole numbers": (
        lambda: bsjax.sampled_matmul(X, W.astype(int), **HALF),
        TypeError,
        "sampled_matmul: `w` must be floating point (float32, bfloat16, float16 or float64), got "
        "int32: cast it first, for example `w.astype(jnp.float32)`.",
    ),
    "nothing": (
        lambda: call(fraction=0),
        ValueError,
        "sampled_matmul: `fraction` must be over 0 and at most 1, got 0.",
    ),
    "percent": (
        lambda: call(fraction=50),
        ValueError,
        "sampled_matmul: `fraction` must be over 0 and at most 1, got 50.",
    ),
    "no fraction": (
        lambda: call(fraction=None),
        TypeError,
        "sampled_matmul: `fraction` must be a number that is known when Python runs, since shapes "
        "depend on it, got None: under jit make it a static argument.",
    ),
    "sampler": (
        lambda: call(sampler="random"),
        ValueError,
        'sampled_matmul: `sampler` must be one of "uniform", "with_replacement", "bernoulli", '
        '"systematic", "priority", "top_k", "wta", got \'random\'.',
    ),
    "policy": (
        lambda: call(policy="both"),
        ValueError,
        'sampled_matmul: `policy` must be one of "forward", "backward", "weight", got \'both\'.',
    ),
    "implementation": (
        lambda: call(implementation="gpu"),
        ValueError,
        'sampled_matmul: `implementation` must be one of "auto", "xla", "mosaic", "dense", '
        "\"reference\", got 'gpu'.",
    ),
    "no kernel": (
        lambda: call(implementation="mosaic"),
        ValueError,
        'sampled_matmul: implementation="mosaic" cannot run here: there are kernels for bfloat16 '
        "and float16, both operands alike, not for float32. " + TAKE_AUTO,
    ),
    "no kernel for both": (
        lambda: call.func(X.astype(jnp.bfloat16), W, implementation="mosaic", **HALF),
        ValueError,
        'sampled_matmul: implementation="mosaic" cannot run here: there are kernels for bfloat16 '
        "and float16, both operands alike, not for bfloat16 and float32. " + TAKE_AUTO,
    ),
    "random size": (
        lambda: call(implementation="xla", sampler="bernoulli"),
        ValueError,
        'sampled_matmul: implementation="xla" cannot run here: the size of a sample of "bernoulli" '
        "is random, and shapes are not. " + TAKE_AUTO,
    ),
    "block": (
        lambda: call(block=5),
        ValueError,
        'sampled_matmul: `block` must divide the features that policy="forward" samples, 24 for '
        "weights of shape (24, 16), got 5: take a divisor of them, or pad with zeros.",
    ),
    "block of the output": (
        lambda: call(block=3, policy="backward"),
        ValueError,
        'sampled_matmul: `block` must divide the features that policy="backward" samples, 16 for '
        "weights of shape (24, 16), got 3: take a divisor of them, or pad with zeros.",
    ),
    "no block": (
        lambda: call(block=0),
        ValueError,
        "sampled_matmul: `block` must be at least 1, got 0.",
    ),
    "NaN": (
        lambda: bsjax.sampled_matmul(X.at[0, 3].set(jnp.nan), W, **HALF),
        ValueError,
        "sampled_matmul: 1 of 24 scores are NaN or infinite, expected finite norms: look for NaN, "
        "or numbers over 1e19, in `x`, `w` and `scores`.",
    ),
    "NaN in scores": (
        lambda: call(scores=jnp.full(5, jnp.nan), policy="weight", block=2),
        ValueError,
        "sampled_matmul: 3 of 3 scores are NaN or infinite, expected finite norms: look for NaN, "
        "or numbers over 1e19, in `x`, `w` and `scores`.",
    ),
    "scores of tokens": (
        lambda: call(scores=jnp.ones(5)),
        ValueError,
        "sampled_matmul: `scores` of shape (5,) must have shape (24,), one number for each feature "
        "of `x`.",
    ),
    "scores of features": (
        lambda: call(scores=jnp.ones(24), policy="weight"),
        ValueError,
        "sampled_matmul: `scores` of shape (24,) must have shape (5,), one number for each token "
        "of `x`.",
    ),
    "scores of dy": (
        lambda: call(scores=jnp.ones(16), policy="backward"),
        ValueError,
        'sampled_matmul: `scores` are for policy="forward" and policy="weight", got '
        'policy="backward", whose samples are drawn by the norms of dy: leave them out.',
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)


def test_a_fraction_is_static():
    known = "`fraction` must be a number that is known when Python runs"
    with unchecked(), pytest.raises(TypeError, match=known):
        jax.jit(lambda f: call.func(X, W, key=KEY, fraction=f))(0.5)
