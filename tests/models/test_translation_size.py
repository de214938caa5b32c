"""Sizes of translation models: their parameters, their FLOPs, and equal ones."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from models import _translation_size as sizing
from models import _translation_train as training
from models._buckets import Batch
from models._cli import Mistake
from models._translation import Translator
from models._translation_size import Size
from tests.models.translation_runs import SIZE, tokens

SIZES = {
    "dense": SIZE,
    "gated, learned": SIZE._replace(gated=True, positions="learned"),
    "block-sparse": SIZE._replace(width=24, hidden=40, density=0.5, block=8),
    "sampled": SIZE._replace(fraction=0.5),
    "deep": SIZE._replace(layers=2),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_model(name):
    made = nnx.eval_shape(lambda: Translator(SIZES[name], 1))
    leaves = jax.tree.leaves(nnx.state(made, nnx.Param))
    assert sizing.parameters(SIZES[name]) == sum(math.prod(leaf.shape) for leaf in leaves)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("name", ["dense", "gated, learned"])
def test_flops_are_those_of_the_products_in_the_gradient(name):
    size, (n, s, t) = SIZES[name], (2, 8, 4)
    graph, params, rest = nnx.split(Translator(size, 0), nnx.Param, ...)
    batch = Batch(tokens(n, s), np.full(n, s, np.int32), tokens(n, t + 1))

    def loss(params):
        return training.total(nnx.merge(graph, params, rest), batch, 0.1)

    dots = [
        e for e in equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        if e.primitive.name == "dot_general"
    ]  # fmt: skip
    counted = 0
    for e in dots:
        (contracted, _), (batched, _) = e.params["dimension_numbers"]
        if not batched:  # attention has heads
            depth = math.prod(e.invars[0].aval.shape[axis] for axis in contracted)
            counted += 2 * math.prod(e.outvars[0].aval.shape) * depth
    attention = 12 * n * size.width * size.layers * (s * s + t * t + s * t)
    assert sizing.flops(size, {(n, s, t): 1}) == counted + attention
    assert sizing.flops(size, {(n, s, t): 3}) == 3 * (counted + attention)


def test_of_sampled_and_sparse_layers_what_is_taken_and_stored_counts():
    shapes, dense = {(4, 8, 12): 1}, SIZE._replace(width=32, hidden=64)
    linears = sum(
        one.stored * {"source": 32, "target": 48}[one.on] for one in sizing.linears(dense)
    )
    half = sizing.flops(dense._replace(density=0.5, block=8), shapes)
    assert sizing.flops(dense, shapes) - half == 3 * linears
    sampled = sizing.flops(dense._replace(fraction=0.5), shapes)
    norms = sum(
        2 * one.k * ({"source": 32, "target": 48}[one.on] + one.m) for one in sizing.linears(dense)
    )
    assert sizing.flops(dense, shapes) - sampled == 3 * linears - norms


@pytest.mark.parametrize("kind", ["block-sparse", "sampled"])
@pytest.mark.parametrize("what", ["parameters", "FLOPs"])
def test_models_at_equal_cost(kind, what):
    dense = Size(2000, 128, 512)
    shapes = {(42, 24, 24): 10, (16, 64, 60): 3}
    cost = sizing.parameters if what == "parameters" else lambda size: sizing.flops(size, shapes)
    other = dense._replace(**{"density": 0.5} if kind == "block-sparse" else {"fraction": 0.75})
    found = sizing.matched(other, cost, cost(dense))
    assert abs(cost(found) / cost(dense) - 1) <= 0.02
    if (kind, what) == ("sampled", "parameters"):
        assert found == other
    else:
        assert found.width > dense.width
    assert found.width % (2 * found.heads) == 0
    if kind == "block-sparse":
        assert found.width % found.block == found.hidden % found.block == 0


def test_a_cost_that_no_size_has():
    size = SIZE._replace(density=0.5, block=64)
    with pytest.raises(Mistake, match=r"no block-sparse model with 2 heads costs the same as the"):
        sizing.matched(size, sizing.parameters, sizing.parameters(SIZE))


@pytest.mark.parametrize("name", ["gated, learned", "block-sparse", "sampled"])
def test_models_of_a_size_share_their_programs(name):
    size = SIZES[name]._replace(attention="longformer", dropout=0.1)
    made = [nnx.eval_shape(lambda seed=seed: Translator(size, seed)) for seed in (0, 1)]
    one, other = (nnx.split(model)[0] for model in made)
    assert one == other
    assert hash(one) == hash(other)
