"""`sampled_conv`: against the masked and scaled kernel, in every form, and the messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from tests.helpers import accumulator, assert_close, assert_raises, normal, slow
from tests.ops.test_sampled import weights_of

pytestmark = pytest.mark.usefixtures("quick_compilations")
KEY = jax.random.key(3)
K, M = 12, 5


def inputs(space=(7, 6), window=(3, 2), lead=(3,), dtype=jnp.float32):
    """x, of channels of uneven size, and w."""
    rng = np.random.default_rng(0)
    uneven = jnp.asarray(rng.lognormal(size=K), dtype)
    x = normal(rng, (*lead, *space, K), dtype) * uneven.reshape(*[1] * (len(lead) + len(space)), K)
    return x, normal(rng, (*window, K, M), dtype)


STATIC = ("name", "strides", "padding", "dilation", "sampler", "block", "fraction")


@functools.partial(jax.jit, static_argnames=STATIC)
def run(x, w, key, *, name="auto", fraction=0.5, **options):
    """y, and dx and dw for a random cotangent."""

    def f(x, w):
        return bsjax.sampled_conv(x, w, key=key, fraction=fraction, implementation=name, **options)

    y, pull = jax.vjp(f, x, w)
    return y, *pull(cotangent(y) + 0 * y)  # varies over a mesh as y does


def cotangent(y):
    """Random, in the dtype of y."""
    return normal(np.random.default_rng(1), y.shape, y.dtype)


def weights(x, w, sampler="systematic", block=1, scores=None):
    """Of every channel, by norms that NumPy computes."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    squares = np.square(x).sum(tuple(range(x.ndim - 1))), np.square(w).sum((*range(w.ndim - 2), -1))
    norms = [np.sqrt(s.reshape(-1, block).sum(1)) for s in squares]
    found = norms[0] * norms[1] if scores is None else np.asarray(scores)
    drawn = weights_of(sampler, KEY, jnp.asarray(found, jnp.float32), K // block // 2)
    return np.repeat(np.asarray(drawn, np.float64), block)


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation"))
def masked(x, w, drawn, dy, *, strides=(1, 1), padding="SAME", dilation=(1, 1)):
    """The same of a kernel that is masked and scaled, by autodiff."""
    axes = "DHW"[-(w.ndim - 2) :]

    def f(x, w):
        y = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[-w.ndim + 1 :]),
            w * drawn.reshape(*[1] * (w.ndim - 2), K, 1),
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            precision="highest",
        )
        return y.reshape(*x.shape[: -w.ndim + 1], *y.shape[1:])

    y, pull = jax.vjp(f, x, w)
    return y, *pull(dy)


def assert_masked(x, w, got, drawn, **options):
    kept = accumulator(x.dtype)
    dy = cotangent(got[0]).astype(kept)
    want = masked(x.astype(kept), w.astype(kept), jnp.asarray(drawn, kept), dy, **options)
    size = drawn.max() * float(abs(x.astype(kept)).max())
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == x.dtype
        assert ours.shape == theirs.shape
        assert_close(ours, np.asarray(theirs), x.size // K * size)


FORMS = {
    "strides, dilation, padding by hand": (
        {},
        {"strides": (2, 1), "dilation": (1, 2), "padding": ((0, 2), (3, 1))},
    ),
    "1-D, one image": ({"space": (9,), "window": (2,), "lead": ()}, {"padding": "SAME_LOWER"}),
    "3-D, valid": (
        {"space": (3, 4, 2), "window": (2, 1, 1), "lead": (2, 2)},
        {"strides": (2, 2, 1), "padding": "VALID"},
    ),
}
MORE_FORMS = {
    "strides and dilation": ({}, {"strides": (2, 1), "dilation": (1, 2)}),
    "1-D, valid": ({"space": (9,), "window": (3,)}, {"padding": "VALID"}),
    "3-D, one tap": ({"space": (3, 4, 2), "window": (1, 1, 1)}, {"strides": (2, 2, 1)}),
    "by hand": ({"lead": (2, 2)}, {"padding": ((0, 2), (3, 1))}),
    "one image": ({"lead": ()}, {"padding": "SAME_LOWER"}),
}


@pytest.mark.parametrize("form", [*FORMS, *map(slow, MORE_FORMS)])
def test_is_the_masked_kernel(form):
    shapes, options = (FORMS | MORE_FORMS)[form]
    x, w = inputs(**shapes)
    axes = w.ndim - 2
    got = run(x, w, KEY, sampler="priority", block=2, **options)
    plain = {"strides": (1,) * axes, "dilation": (1,) * axes} | options
    drawn = weights(x, w, "priority", 2)
    assert_masked(x, w, got, drawn, **plain)
    _, dx, dw = got
    off = drawn == 0
    assert off.sum() == K // 2
    assert not np.any(dx[..., off])
    assert not np.any(dw[..., off, :])


@pytest.mark.parametrize("name", ["dense", slow("reference")])
def test_implementations_agree(name):
    """ "bernoulli" runs masked."""
    x, w = inputs()
    options = {"sampler": "bernoulli", "scores": jnp.arange(1.0, 1.0 + K)}
    got = run(x, w, KEY, name=name, **options)
    assert_masked(x, w, got, weights(x, w, "bernoulli", scores=options["scores"]))


@pytest.mark.parametrize("dtype", [slow(jnp.bfloat16), jnp.float16])
def test_is_rounded_once(dtype):
    x, w = inputs(dtype=dtype)
    assert_masked(x, w, run(x, w, KEY, sampler="priority"), weights(x, w, "priority"))
    assert_masked(x, w, run(x, w, None), np.ones(K))


@pytest.mark.parametrize("exactly", [{"key": None}, {"fraction": 1}, {"fraction": 0.97}], ids=str)
def test_exact(exactly):
    x, w = inputs()
    assert_masked(x, w, run(x, w, **{"key": KEY} | exactly), np.ones(K))


def test_one_tap_is_sampled_matmul():
    x, w = inputs(window=(1, 1))
    options = {"key": KEY, "fraction": 0.25, "sampler": "wta", "block": 3}
    both = jax.jit(
        lambda x, w: (
            bsjax.sampled_conv(x, w, **options),
            bsjax.sampled_matmul(x, w[0, 0], **options),
        )
    )
    got, want = both(x, w)
    assert_close(got, np.asarray(want), K * 64)


def test_numbers_for_all_axes():
    x, w = inputs()
    short = run.lower(x, w, KEY, strides=2, padding=1, dilation=2)
    long = run.lower(x, w, KEY, strides=(2, 2), padding=(1, (1, 1)), dilation=(2, 2))
    assert short.as_text() == long.as_text()


@pytest.mark.slow
def test_vmap_draws_for_each():
    x, w = inputs()
    keys = jax.random.split(KEY, 2)
    together = jax.vmap(functools.partial(run, name="xla"), (None, None, 0))(x, w, keys)
    for i in range(2):
        for ours, theirs in zip(together, run(x, w, keys[i], name="xla"), strict=True):
            assert_close(ours[i], np.asarray(theirs), x.size)


@pytest.mark.slow
def test_remat_and_second_order():
    x, w = inputs()

    def gradient(f):
        return lambda w: jnp.sum(jnp.cos(jax.grad(lambda w: jnp.sum(jnp.sin(f(x, w))))(w)))

    def sampled(x, w):
        return bsjax.sampled_conv(x, w, key=KEY, fraction=0.5, scores=jnp.ones(K))

    drawn = jnp.asarray(weights(x, w, scores=np.ones(K)), jnp.float32)

    def by_hand(x, w):
        return bsjax.sampled_conv(
            x, w * drawn[None, None, :, None], key=None, fraction=1, implementation="reference"
        )

    want = jax.jit(jax.grad(gradient(by_hand)))(w)
    for f in (sampled, jax.checkpoint(sampled)):
        got = jax.jit(jax.grad(gradient(f)))(w)
        size = float(abs(want).max())  # of derivatives of derivatives, which no sum of terms bounds
        assert_close(got / size, np.asarray(want) / np.float32(size), x.size)


@pytest.mark.parametrize("axis_type", [slow(AxisType.Auto), AxisType.Explicit])
def test_images_over_a_mesh_are_not_gathered(axis_type):
    x, w = inputs(lead=(8,))
    want = run(x, w, KEY, sampler="priority")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        w, key = jax.device_put((w, KEY), NamedSharding(mesh, P()))

        @jax.jit
        def f(x, w, key):
            options = {"key": key, "fraction": 0.5, "sampler": "priority"}
            y, pull = jax.vjp(lambda *a: bsjax.sampled_conv(*a, **options), x, w)
            return y, *pull(jnp.cos(y))

        program = f.lower(x, w, key).compile()
        got = program(x, w, key)
    assert "all-gather" not in program.as_text()
    assert "all-reduce" in program.as_text()
    assert_close(got[0], np.asarray(want[0]), 72 * 64)


@pytest.mark.slow
def test_shard_map():
    """With its checks on: each device samples by its own images, and dw is summed."""
    x, w = inputs(lead=(4,))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P(), P())
    got = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data"), P()))
    )(x, w, KEY)
    halves = [run(x[i : i + 2], w, KEY) for i in (0, 2)]
    assert_close(got[0], np.concatenate([half[0] for half in halves]), 72 * 16)
    assert_close(got[2], np.asarray(halves[0][2] + halves[1][2]), 84 * 64)


X, W = jnp.ones((2, 7, 6, K)), jnp.ones((3, 2, K, M))
call = functools.partial(bsjax.sampled_conv, key=KEY, fraction=0.5)
TAKE_AUTO = 'Use implementation="auto", which takes the fastest that can.'
WRONG = {
    "a matrix": (
        lambda: call(X, W[0, 0]),
        ValueError,
        "sampled_conv: `w` of shape (12, 5) must have shape (*window, k, m), with one to three "
        "axes of space.",
    ),
    "channels": (
        lambda: call(X, W[:, :, 1:]),
        ValueError,
        "sampled_conv: `x` of shape (2, 7, 6, 12) cannot be convolved with `w` of shape "
        "(3, 2, 11, 5): expected (..., space, space, 11).",
    ),
    "no space": (
        lambda: call(X[0, 0], W),
        ValueError,
        "sampled_conv: `x` of shape (6, 12) cannot be convolved with `w` of shape (3, 2, 12, 5): "
        "expected (..., space, space, 12).",
    ),
    "policy": (
        lambda: call(X, W, policy="weight"),
        ValueError,
        "sampled_conv: `policy` must be one of \"forward\", got 'weight'.",
    ),
    "seed": (
        lambda: call(X, W, key=0),
        TypeError,
        "sampled_conv: `key` must be one PRNG key, got 0: make one with jax.random.key(seed) and "
        "split it for every call.",
    ),
    "block": (
        lambda: call(X, W, block=5),
        ValueError,
        "sampled_conv: `block` must divide the channels in, 12 for `w` of shape (3, 2, 12, 5), got "
        "5: take a divisor of them, or pad with zeros.",
    ),
    "strides": (
        lambda: call(X, W, strides=(1, 1, 1)),
        ValueError,
        "sampled_conv: `strides` must be one number, or one for each of 2 axes of space, got "
        "(1, 1, 1).",
    ),
    "no stride": (
        lambda: call(X, W, strides=0),
        ValueError,
        "sampled_conv: `strides` must be at least 1, got 0.",
    ),
    "padding": (
        lambda: call(X, W, padding="CIRCULAR"),
        ValueError,
        'sampled_conv: `padding` must be one of "SAME", "VALID", "SAME_LOWER", got \'CIRCULAR\'.',
    ),
    "paddings": (
        lambda: call(X, W, padding=((1, 1),)),
        ValueError,
        "sampled_conv: `padding` must be a name, a number, or for each of 2 axes of space a number "
        "or a pair (before, after), got ((1, 1),).",
    ),
    "scores": (
        lambda: call(X, W, scores=jnp.ones(M)),
        ValueError,
        "sampled_conv: `scores` of shape (5,) must have shape (12,), one number for each channel "
        "of `x`.",
    ),
    "NaN": (
        lambda: call(X.at[0, 0, 0, 1].set(jnp.nan), W),
        ValueError,
        "sampled_conv: 1 of 12 scores are NaN or infinite, expected finite norms: look for NaN, or "
        "numbers over 1e19, in `x`, `w` and `scores`.",
    ),
    "no kernel": (
        lambda: call(X, W, implementation="mosaic"),
        ValueError,
        'sampled_conv: implementation="mosaic" cannot run here: there is no kernel for '
        "sampled convolutions. " + TAKE_AUTO,
    ),
    "random size": (
        lambda: call(X, W, implementation="xla", sampler="bernoulli"),
        ValueError,
        'sampled_conv: implementation="xla" cannot run here: the size of a sample of "bernoulli" '
        "is random, and shapes are not. " + TAKE_AUTO,
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_message(call, error, message):
    assert_raises(call, error, message)
