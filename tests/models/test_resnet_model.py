"""Block-sparse residual networks beside dense ones of masked kernels; folding, sampling."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.nnx
from models._resnet import Norm, ResNet, SampledConv, fold
from models._resnet_plan import Size
from tests.helpers import slow, tolerance
from tests.models.test_resnet_plan import equations

SIZES = {
    "basic": Size("basic", (1,), (16,), densities=(0.5,), block=4),
    "wide": Size("wide", (1,), (32,), densities=(0.5,), block=4),
    "basic, two stages": Size("basic", (1, 1), (16, 32), densities=(0.5, 0.25), block=4),
    "wide, two stages": Size("wide", (2, 1), (16, 32), densities=(1.0, 0.5), block=8),
    "bottleneck": Size("bottleneck", (1, 1), (8, 16), densities=(0.5, 0.5), block=4),
}
QUICK = ("basic", "wide")
SPARSE = {"basic": 2, "wide": 2, "basic, two stages": 4, "wide, two stages": 2, "bottleneck": 6}
FOLDED = {"basic": 2, "wide": 1, "basic, two stages": 4, "wide, two stages": 1, "bottleneck": 6}
SIDE, N = 9, 3  # odd: strides round up
X = np.random.default_rng(0).normal(size=(N, SIDE, SIDE, 2)).astype(np.float32)
COTANGENT = np.random.default_rng(1).normal(size=(N, 10)).astype(np.float32)


def kernels(values, p):
    """`values[e, h, w, br, bc]` as a dense kernel [h, w, k, m]."""
    taps = np.asarray(values).transpose(1, 2, 0, 3, 4)
    dense = [[np.asarray(bsjax.todense(jnp.asarray(tap), p)) for tap in row] for row in taps]
    return jnp.asarray(np.array(dense))


def convs_of(model):
    """Every convolution in a stage that may be sparse, in order."""
    return [conv for block in model.blocks for conv in block.convs]


def randomised(model, seed):
    """Gains, offsets and running statistics as after some training."""
    rng = np.random.default_rng(seed)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, nnx.BatchNorm):
            for name, low, high in (
                ("scale", 0.5, 1.5),
                ("bias", -1, 1),
                ("mean", -1, 1),
                ("var", 0.5, 2),
            ):
                own = getattr(norm, name)
                own[...] = jnp.asarray(rng.uniform(low, high, own.shape), jnp.float32)


@nnx.jit
def passes(model, x, cotangent):
    """(logits, gradients of the parameters, statistics after the pass)."""

    def loss(model):
        logits = model(x)
        return (logits * cotangent).sum(), logits

    (_, logits), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
    return logits, gradient, nnx.state(model, nnx.BatchStat)


@pytest.fixture(scope="module", params=[name if name in QUICK else slow(name) for name in SIZES])
def both(request):
    """A sparse network, and a dense one with its kernels and zeros in between; one pass of each."""
    name, size = request.param, SIZES[request.param]
    sparse, dense = (ResNet(s, 2, 10, 0) for s in (size, size._replace(densities=())))
    randomised(sparse, 7)
    randomised(dense, 7)
    dense.classifier = nnx.clone(sparse.classifier)
    dense.stem = nnx.clone(sparse.stem)
    for one, other in zip(sparse.blocks, dense.blocks, strict=True):
        other.projection = nnx.clone(one.projection)
    for one, other in zip(convs_of(sparse), convs_of(dense), strict=True):
        if isinstance(one, bsjax.nnx.BlockConv):
            other.kernel[...] = kernels(one.values[...], one.pattern.get_value())
        else:
            other.kernel[...] = one.kernel[...]
    evaluated = fold(sparse)
    exact = nnx.clone(sparse)
    exact.eval()
    found = [passes(model, X, COTANGENT) for model in (sparse, dense)]
    return types.SimpleNamespace(
        name=name, sparse=sparse, dense=dense, found=found, folded=evaluated, exact=exact
    )


def close(got, want, terms):
    """`got` is `want` but for the rounding of sums of `terms` products of the size of its largest,
    carried through all layers: a normalisation passes errors on as they are, relative to its
    output."""
    scale = np.abs(want).max() or 1
    within = tolerance(jnp.float32, terms)
    np.testing.assert_allclose(got / scale, want / scale, **within)


TERMS = 9 * 64 * 8  # taps, channels, layers: more than in any network here


def test_the_sparse_network_has_sparse_convolutions(both):
    sparse = [conv for conv in convs_of(both.sparse) if isinstance(conv, bsjax.nnx.BlockConv)]
    assert len(sparse) == SPARSE[both.name]
    assert not any(isinstance(conv, bsjax.nnx.BlockConv) for conv in convs_of(both.dense))
    assert isinstance(both.sparse.stem, nnx.Conv)
    assert isinstance(both.sparse.classifier, nnx.Linear)


def test_forward_is_that_of_masked_kernels(both):
    (one, _, _), (other, _, _) = both.found
    assert one.dtype == jnp.float32
    close(np.asarray(one), np.asarray(other), TERMS)


def test_gradients_are_those_of_masked_kernels(both):
    (_, one, _), (_, other, _) = both.found
    for a, b, conv in zip(gradients(one), gradients(other), convs_of(both.sparse), strict=True):
        if isinstance(conv, bsjax.nnx.BlockConv):
            p = conv.pattern.get_value()
            stored = kernels(np.ones(conv.values.shape, np.float32), p)
            a, b = kernels(a, p), b * stored
        close(np.asarray(a), np.asarray(b), TERMS)
    for name in ("stem", "norm", "classifier"):
        pairs = zip(jax.tree.leaves(one[name]), jax.tree.leaves(other[name]), strict=True)
        for a, b in pairs:
            close(np.asarray(a), np.asarray(b), TERMS)


def gradients(state):
    """Of each convolution, in order."""
    found = []
    for block in range(len(state["blocks"])):
        of_block = state["blocks"][block]["convs"]
        for i in range(len(of_block)):
            found += jax.tree.leaves(of_block[i])
    return found


def test_statistics_are_those_of_masked_kernels(both):
    (_, _, one), (_, _, other) = both.found
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        close(np.asarray(a), np.asarray(b), TERMS)


def test_folding_changes_nothing_but_rounding(both):
    model, gone = both.folded
    assert gone == FOLDED[both.name]
    norms = [sum(isinstance(m, Norm) for _, m in nnx.iter_modules(x)) for x in (model, both.exact)]
    assert norms[0] == norms[1] - gone
    one, other = (np.asarray(nnx.jit(lambda m, x: m(x))(m, X)) for m in (model, both.exact))
    close(one, other, TERMS)
    assert np.abs(other).max() > 0.01  # random statistics: folding wrongly would be seen


def test_a_dense_network_has_nothing_to_fold(both):
    assert fold(both.dense)[1] == 0


# ------------------------------------------------------------------------------------------ shapes


def test_shortcuts_take_every_second_pixel_and_pad_channels():
    """With convolutions that give nothing, a block of another stage is its shortcut."""
    model = ResNet(Size("basic", (1, 1), (16, 32)), 2, 10, 0)
    block = model.blocks[1]
    for norm in block.norms:
        norm.scale[...] = jnp.zeros_like(norm.scale[...])
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 5, 5, 16)), jnp.float32)
    y = block(x)
    assert y.shape == (1, 3, 3, 32)
    np.testing.assert_array_equal(y[..., :16], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 16:], 0)


@pytest.mark.parametrize("kind", QUICK)
def test_bfloat16_computes_in_it_and_keeps_float32(kind):
    size = SIZES[kind]._replace(dtype="bfloat16")
    model = nnx.eval_shape(lambda: ResNet(size, 2, 10, 0))
    kept = nnx.state(model, (nnx.Param, nnx.BatchStat))
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    graph, state = nnx.split(model)
    seen = []

    def run(state, x):
        model = nnx.merge(graph, state, copy=True)
        logits = model(x)
        seen.append(nnx.state(model, nnx.BatchStat))
        return logits

    closed = jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct(X.shape, jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype("float32")}
    assert closed.out_avals[0].dtype == jnp.float32
    convs = [e for e in equations(closed.jaxpr) if e.primitive.name == "conv_general_dilated"]
    assert convs
    for conv in convs:  # sums may be kept in float32
        assert {one.aval.dtype for one in conv.invars} == {jnp.dtype("bfloat16")}


# ---------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def sampled():
    size = Size("basic", (1,), (16,))
    dense, model = ResNet(size, 2, 10, 0), ResNet(size._replace(fraction=0.5), 2, 10, 0)
    return dense, model, nnx.jit(lambda model, x: model(x))


def test_sampling_draws_anew_in_training_and_is_exact_in_evaluation(sampled):
    dense, model, run = sampled
    assert all(isinstance(conv, SampledConv) for conv in convs_of(model))
    for one, other in zip(convs_of(dense), convs_of(model), strict=True):
        np.testing.assert_array_equal(one.kernel[...], other.kernel[...])
    first, second = np.asarray(run(model, X)), np.asarray(run(model, X))
    assert np.abs(first - second).max() > 1e-3
    dense.eval()
    model.eval()
    fresh = [nnx.clone(m) for m in (dense, model)]
    for m in fresh:
        randomised(m, 3)
    one, other = (np.asarray(run(m, X)) for m in fresh)
    close(other, one, TERMS)
