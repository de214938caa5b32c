"""`bsjax.linen.SampledLinear`: agrees with its NNX sibling, and draws as `nn.Dropout` does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bsjax.nnx
from bsjax.linen import SampledLinear, from_nnx, to_nnx
from tests.helpers import assert_close, assert_raises, normal

pytestmark = pytest.mark.usefixtures("quick_compilations")
IN, OUT, DEPTH = 16, 6, 3
KEY, OTHER = jax.random.key(7), jax.random.key(8)
X = normal(np.random.default_rng(0), (5, IN))
DY = normal(np.random.default_rng(1), (5, OUT))


def layer(out_features=OUT, **options):
    options = {"fraction": 0.5, "deterministic": False, "sampler": "uniform"} | options
    return SampledLinear(out_features, **options)


@functools.cache
def variables():
    return layer(deterministic=True, bias_init=nn.initializers.normal(1.0)).init(KEY, X)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "systematic"},
        {"policy": "weight", "sampler": "uniform", "block": 2},
        {"dtype": jnp.bfloat16, "deterministic": True, "sampler": "uniform"},
    ],
    ids=str,
)
def test_both_dialects_agree(options):
    """Equal outputs and gradients from equal parameters and the same key, to the last bit."""
    ours, x = layer(**options), X
    theirs = bsjax.nnx.SampledLinear(IN, OUT, **({"fraction": 0.5} | options), rngs=nnx.Rngs(0))
    to_nnx({"params": {"linear": variables()["params"]}}, nnx.Dict(linear=theirs))
    back = from_nnx(nnx.Dict(linear=theirs))
    jax.tree.map(np.testing.assert_array_equal, back["params"]["linear"], variables()["params"])

    @jax.jit
    def linen(variables):
        def loss(variables):
            y = ours.apply(variables, x, rng=KEY)
            return (y.astype(jnp.float32) * DY).sum(), y

        return jax.grad(loss, has_aux=True)(variables)

    @nnx.jit
    def nnx_(layer):
        def loss(layer):
            y = layer(x, rngs=KEY)
            return (y.astype(jnp.float32) * DY).sum(), y

        return nnx.grad(loss, has_aux=True)(layer)

    (grads, y), (want, want_y) = linen(variables()), nnx_(theirs)
    np.testing.assert_array_equal(y, want_y)
    assert y.dtype == options.get("dtype", jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, grads["params"], nnx.to_pure_dict(want))


def test_starts_as_a_dense_layer():
    ours, theirs = layer(fraction=1).init(KEY, X), nn.Dense(OUT).init(KEY, X)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert layer(use_bias=False, fraction=1).init(KEY, X)["params"].keys() == {"kernel"}


def test_the_key_is_of_its_stream():
    """One for each call; no stream is needed where nothing is drawn."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            one = layer(name="linear")
            return one(x), one(x)

    shared = {"params": {"linear": variables()["params"]}}
    first, second = Twice().apply(shared, X, rngs={"sampling": KEY})
    assert not np.allclose(first, second)
    again = jax.jit(Twice().apply)(shared, X, rngs={"sampling": KEY})
    for one, other in zip(again, (first, second), strict=True):
        assert_close(one, other, X.shape[-1])
    jitted = nn.jit(SampledLinear)(OUT, fraction=0.5, sampler="uniform", deterministic=False)
    # nn.jit has keys of its own, made of these
    a, b, c = (jitted.apply(variables(), X, rngs={"sampling": key}) for key in (KEY, KEY, OTHER))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
    exact = X @ variables()["params"]["kernel"] + variables()["params"]["bias"][None]
    for still, call in (
        (layer(deterministic=None), {"deterministic": True}),
        (layer(deterministic=True), {}),
        (layer(fraction=1), {}),
    ):
        got = still.apply(variables(), X, **call)
        assert_close(got, exact, X.shape[-1])


class Layer(nn.Module):
    """One layer of a scan, which says what it computed."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        cls = nn.remat(SampledLinear) if self.remat else SampledLinear
        init = {"kernel_init": lambda key, shape, dtype: jnp.eye(IN, dtype=dtype)}
        y = cls(IN, fraction=0.5, sampler="uniform", deterministic=False, name="linear", **init)(x)
        return x, y


Stack = nn.scan(
    Layer,
    variable_axes={"params": 0},
    split_rngs={"params": True, "sampling": True},
    length=DEPTH,
)


def test_scanned_layers_draw_for_themselves_and_remat_repeats():
    """Kernels are the identity, features are all one: what is not zero was sampled."""
    x = jnp.ones((1, IN))
    params = Stack().init(KEY, x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(remat, params):
        def loss(params):
            _, ys = Stack(remat).apply(params, x, rngs={"sampling": OTHER})
            return (ys**2).sum() / 2, ys

        return jax.grad(loss, has_aux=True)(params)

    grads, ys = run(False, params)
    again, _ = run(True, params)
    taken = np.asarray(ys[:, 0] != 0)
    assert (taken.sum(1) == IN / 2).all()
    assert len(np.unique(taken, axis=0)) == DEPTH
    rows = np.any(grads["params"]["linear"]["kernel"] != 0, axis=2)
    np.testing.assert_array_equal(rows, taken)
    jax.tree.map(np.testing.assert_array_equal, again, grads)


ERRORS = {
    "no stream": (
        lambda: layer().apply(variables(), X),
        'SampledLinear: no stream "sampling" to sample with: give apply rngs={"sampling": key}, or '
        "call the layer with deterministic=True.",
    ),
    "neither": (
        lambda: layer(deterministic=None).apply(variables(), X),
        'Parameter "deterministic" must be passed to the constructor or at call time.',
    ),
    "both": (
        lambda: layer().apply(variables(), X, deterministic=True),
        'Parameter "deterministic" was passed to the constructor and at call time. Should be '
        "passed just once.",
    ),
    "block": (
        lambda: layer(block=5).init(KEY, X),
        'SampledLinear: `block` must divide the features that policy="forward" samples, 16 for '
        "weights of shape (16, 6), got 5: take a divisor of them, or pad with zeros.",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    assert_raises(call, ValueError, message)
