"""The feed-forward layer in three kernels, in the interpreter, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from bsjax.ops import _fused, _mlp
from bsjax.ops._core import Spec
from tests.helpers import assert_close, normal, random_mask
from tests.kernels.test_interpreted import few_workers, interpreted  # noqa: F401 - a fixture

pytestmark = pytest.mark.interpreted
ACTIVATIONS = ["relu", "gelu", "silu", "tanh", "sigmoid"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

MASK = random_mask(3, 3, 0.5)  # blocks of features in and hidden: one column full, one row empty
MASK[:, 1], MASK[1] = True, False


def weights(rng, mask, block, dtype, biases, spare=2):
    p = bsjax.BlockPattern.from_mask(mask, block, capacity=int(mask.sum()) + spare)
    values = normal(rng, (p.capacity, *p.block), jnp.float32) / (p.block[0] * 2) ** 0.5
    values = values.astype(dtype).at[p.nnz :].set(jnp.nan)
    return _mlp.Weights(values, p, normal(rng, p.shape[1:], dtype) if biases else None)


def problem(n, block, dtype=jnp.bfloat16, *, gated=False, biases=True, residual=True):
    """x, both weights, a residual and a random cotangent."""
    rng = np.random.default_rng(0)
    up = weights(rng, MASK, (block, block * (1 + gated)), dtype, biases)
    down = weights(rng, MASK.T, block, dtype, biases)
    x, added, dy = (normal(rng, (n, 3 * block), dtype) for _ in range(3))
    return (x, up, down, added if residual else None), dy


def reference(x, up, down, residual, *, form):
    def product(x, one):
        y = bsjax.matmul(x, one.values, one.p, implementation="reference")
        return y if one.bias is None else y + one.bias[None]

    y = product(form(product(x, up), up.p.block[1]), down)
    return y if residual is None else y + residual


def with_gradients(f, args, dy):
    """y and the gradients of everything that is not an index."""
    x, up, down, residual = args

    @jax.jit
    def both(floats, dy):
        def of(floats):
            x, (u, b), (d, c), residual = floats
            return f(x, _mlp.Weights(u, up.p, b), _mlp.Weights(d, down.p, c), residual)

        y, pull = jax.vjp(of, floats)
        return y, *pull(dy.astype(y.dtype))

    return both((x, (up.values, up.bias), (down.values, down.bias), residual), dy)


def conforms(activation, n, block, dtype=jnp.bfloat16, *, gated=False, **options):
    args, dy = problem(n, block, dtype, gated=gated, **options)
    form = _fused.Form(activation, gated)
    with interpreted():
        got = with_gradients(functools.partial(_mlp.mlp, form=form, precision=None), args, dy)
        jax.block_until_ready(got)
    # by value: spare slots hold NaN, which the reference drops
    args = jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.float32), args)
    want = with_gradients(functools.partial(reference, form=form), args, dy)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == dtype
        # z, act(z), dz and the result are rounded once each, by at most half of eps
        off = jnp.abs(g.astype(jnp.float32) - w).max()
        assert float(off) <= 2 * float(jnp.finfo(dtype).eps) * float(jnp.abs(w).max())


@pytest.mark.parametrize(
    ("activation", "n", "block", "dtype", "options"),
    [
        pytest.param("gelu", 70, 32, jnp.bfloat16, {}, id="plain"),
        slow("silu", 70, 32, jnp.bfloat16, {"gated": True, "biases": False}, id="gated"),
        slow("gelu", 70, 32, jnp.float16, {"gated": True}, id="gated, biases, f16"),
        slow("relu", 300, 16, jnp.float16, {"residual": False}, id="f16, no residual"),
        slow("tanh", 1, 64, jnp.bfloat16, {"biases": False}, id="one token, no bias"),
        slow("sigmoid", 130, 128, jnp.bfloat16, {"biases": False, "residual": False}, id="bare"),
    ],
)
def test_conforms(activation, n, block, dtype, options):
    conforms(activation, n, block, dtype, **options)


def slopes(form, args, *, total=True):
    """What the kernel writes, and dz and its sum in float32 by the formula."""
    (_, _, down, _), dy = args
    rng = np.random.default_rng(1)
    z = 2 * normal(rng, (*dy.shape[:-1], down.p.shape[0] * (1 + form.gated)), dy.dtype)
    run = functools.partial(_mlp._slope, Spec("mosaic", None, dy.dtype), form, total)
    with interpreted():
        got = jax.block_until_ready(jax.jit(run)(dy, down.values, down.p, z))
    dense = bsjax.todense(down.values.astype(jnp.float32), down.p)
    dh = (dy.astype(jnp.float32) @ dense.T).astype(jnp.float32)
    act = jax.vjp(functools.partial(form, width=2 * down.p.block[0]), z.astype(jnp.float32))[1]
    return got, act(dh)[0]


@pytest.mark.parametrize(
    ("activation", "gated", "n", "block"),
    [
        ("silu", True, 150, 32),
        ("relu", False, 250, 128),
        *(slow(name, gated, 70, 32) for name in ACTIVATIONS for gated in (False, True)),
        *(slow("gelu", gated, 260, side) for gated in (False, True) for side in (16, 64, 128)),
    ],
)
def test_gradient_of_the_activation(activation, gated, n, block):
    """Rounded once; its sums over tokens are those of what was written."""
    (dz, total), want = slopes(_fused.Form(activation, gated), problem(n, block))
    assert_close(dz, want, 2 * block)
    rows = np.asarray(dz.astype(jnp.float32))
    few = 8 * float(jnp.finfo(jnp.float32).eps)  # two orders of adding
    np.testing.assert_allclose(total, rows.sum(0), atol=few * np.abs(rows).sum(0).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes(activation):
    """The closed forms are derivatives, and finite wherever their argument is."""
    from pallas_kernels.epilogue import SLOPES

    z = jnp.linspace(-20, 20, 4001)
    slope = jax.grad(_fused.ACTIVATIONS[activation])
    few = 32 * float(jnp.finfo(jnp.float32).eps)  # both lose digits where 1 - tanh^2 is small
    np.testing.assert_allclose(SLOPES[activation](z), jax.vmap(slope)(z), atol=few)
    huge = jnp.asarray([-3e38, -1e20, -100, 100, 1e20, 3e38])
    ends = np.repeat([0.0, activation in ("relu", "gelu", "silu")], 3)
    np.testing.assert_allclose(
        SLOPES[activation](huge), ends, atol=float(jnp.finfo(jnp.float32).tiny)
    )


def mlp(gated=False, **options):
    options = {"dtype": jnp.bfloat16, "implementation": "mosaic", "rngs": nnx.Rngs(0)} | options
    options = {"activation": "silu", "bias_init": jax.nn.initializers.normal()} | options
    return bsjax.nnx.BlockMLP(70, 64, pattern=MASK[:, :2], block=32, gated=gated, **options)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused operation was called."""
    made, fused = [], _mlp.mlp
    monkeypatch.setattr(_mlp, "mlp", lambda *args, **kw: made.append(1) or fused(*args, **kw))
    return made


X = normal(np.random.default_rng(2), (40, 70), jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_layers_are_the_ones_without_kernels(gated, calls):
    """In both dialects, with padded features; parameters get the same gradients."""
    ours = mlp(gated)
    plain = mlp(gated, implementation="dense")
    twin = bsjax.linen.BlockMLP(
        64,
        pattern=MASK[:, :2],
        block=32,
        gated=gated,
        activation="silu",
        dtype=jnp.bfloat16,
        implementation="mosaic",
    )
    variables = bsjax.linen.from_nnx(ours)

    def grads(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, rest):
            y = nnx.merge(graph, params, rest)(X, residual=X)
            return jnp.sum(y.astype(jnp.float32) * jnp.sin(jnp.arange(70.0))[None]), y

        return jax.jit(jax.grad(loss, has_aux=True))(params, rest)

    with interpreted():
        got, y = jax.block_until_ready(grads(ours))
        other = jax.jit(lambda v: twin.apply(v, X, residual=X))(variables)
    assert len(calls) == 2 - gated  # in Linen each layer has variables of its own
    want, same = grads(plain)
    both = ((got, y, other), (want, same, same))
    for g, w in zip(*map(jax.tree.leaves, both), strict=True):
        g, w = (np.asarray(a).astype(np.float32) for a in (g, w))
        assert np.abs(g - w).max() <= 2 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(w).max()


@pytest.mark.parametrize(
    ("changed", "fused"),
    [
        pytest.param({}, 1, id="plain"),
        pytest.param({"gated": True}, 1, id="gated"),
        pytest.param({"activation": jax.nn.silu}, 0, id="a function"),
        pytest.param({"gated": True, "activation": jax.nn.silu}, 0, id="a gate by a function"),
        pytest.param({"implementation": "dense"}, 0, id="dense"),
        pytest.param({"hidden": 60}, 0, id="padded hidden features"),
        pytest.param({"tokens": 0}, 0, id="no token"),
    ],
)
def test_what_is_fused(changed, fused, calls):
    """A kernel for the whole layer needs an activation with a name and whole hidden blocks."""
    changed = dict(changed)
    hidden, tokens = changed.pop("hidden", 64), changed.pop("tokens", 40)
    options = {"dtype": jnp.bfloat16, "implementation": "mosaic", "rngs": nnx.Rngs(0)} | changed
    layer = bsjax.nnx.BlockMLP(70, hidden, pattern=MASK[:, :2], block=32, **options)
    y = jax.eval_shape(layer, X[:tokens])
    assert (y.shape, y.dtype) == ((tokens, 70), jnp.bfloat16)
    assert len(calls) == fused


def test_layers_that_were_changed_are_not_fused(calls):
    """What somebody gave a layer of its own is kept."""
    biased, narrow, exact = mlp(gated=True), mlp(), mlp()
    biased.up.bias = nnx.Param(jnp.ones(64))
    narrow.down.dtype = jnp.float16
    exact.down.precision = "highest"
    for layer, dtype in ((biased, jnp.bfloat16), (narrow, jnp.float16), (exact, jnp.bfloat16)):
        assert jax.eval_shape(layer, X).dtype == dtype
    assert calls == []


def test_gate_and_up_must_be_seen_to_have_one_pattern(calls):
    """As the one variable that they share, also where it is traced."""
    layer = mlp(gated=True)

    def shape():
        graph, state = nnx.split(layer)
        return jax.eval_shape(lambda state: nnx.merge(graph, state)(X), state)

    shape()
    assert len(calls) == 1
    layer.gate.pattern = bsjax.nnx.Pattern(layer.up.pattern.get_value())
    jax.eval_shape(layer, X)
    assert len(calls) == 2  # another variable, but known to be the same
    shape()
    layer.gate.pattern = bsjax.nnx.Pattern(bsjax.BlockPattern.from_mask(MASK[:, 1::-1], 32))
    jax.eval_shape(layer, X)
    assert len(calls) == 2


def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="it needs a Hopper GPU, and JAX found cpu only"):
        mlp()(X)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives(gated):
    (x, up, down, _), dy = problem(64, 16, gated=gated, biases=not gated)
    dy = dy.astype(jnp.float32)
    up, down = (one._replace(values=jnp.nan_to_num(one.values)) for one in (up, down))
    form = _fused.Form("tanh", gated)

    def twice(x, u, b, d, *, f):
        def loss(x):
            y = f(x, up._replace(values=u, bias=b), _mlp.Weights(d, down.p, None), None)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)) * dy)  # its slope depends on y

        return jnp.sum(jnp.sin(jax.grad(loss)(x).astype(jnp.float32)))

    def through(f, cast):
        args = [None if a is None else cast(a) for a in (x, up.values, up.bias, down.values)]
        wanted = [i for i, a in enumerate(args) if a is not None]
        return jax.jit(jax.grad(functools.partial(twice, f=f), wanted))(*args)

    with interpreted():
        got = through(functools.partial(_mlp.mlp, form=form, precision=None), lambda a: a)
        jax.block_until_ready(got)
    plain = functools.partial(reference, form=form)
    for g, w in zip(got, through(plain, lambda a: a.astype(jnp.float32)), strict=True):
        off = jnp.abs(g.astype(jnp.float32) - w.astype(jnp.float32)).max()
        assert float(off) < 0.05 * float(jnp.abs(w.astype(jnp.float32)).max())


@pytest.mark.slow
def test_inside_shard_map():
    """With its checks on: what varies over the mesh, and what a gradient sums."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    args, dy = problem(70, 32)
    form, P = _fused.Form("gelu"), jax.sharding.PartitionSpec

    def sharded(x, up, down, residual):
        return jax.shard_map(
            functools.partial(_mlp.mlp, form=form, precision=None),
            mesh=mesh,
            in_specs=(P("d"), P(), P(), P("d")),
            out_specs=P("d"),
        )(x, up, down, residual)

    with interpreted():
        got = with_gradients(sharded, args, dy)
        want = with_gradients(functools.partial(_mlp.mlp, form=form, precision=None), args, dy)
        jax.block_until_ready((got, want))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w))
