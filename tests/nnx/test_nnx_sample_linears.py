"""`bsjax.nnx.sample_linears`: which layers it turns, and that their parameters stay theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bsjax.nnx import SampledLinear, sample_linears
from tests.helpers import assert_raises, normal
from tests.nnx.test_nnx_sampled import assert_draws_for_each

SIZE = 16


def linear(rngs, out=SIZE, **options):
    return nnx.Linear(SIZE, out, rngs=rngs, **options)


class Model(nnx.Module):
    """Layers in every kind of container, one of them twice, two that share a kernel, and others."""

    def __init__(self, rngs):
        self.first = linear(rngs)
        self.again = self.first
        self.items = nnx.List([linear(rngs, use_bias=False), nnx.Dict(key=linear(rngs))])
        self.plain = nnx.data([{"key": linear(rngs)}, (linear(rngs),)])
        self.sequence = nnx.Sequential(linear(rngs), nnx.relu)
        self.tied = linear(rngs)
        self.tied.kernel = self.first.kernel
        self.lora = nnx.LoRALinear(SIZE, SIZE, lora_rank=2, rngs=rngs)
        self.general = nnx.LinearGeneral(SIZE, SIZE, rngs=rngs)
        self.head = linear(rngs, 6)

    def __call__(self, x):
        layers = (self.first, *self.items[:1], self.items[1]["key"], self.plain[0]["key"])
        for layer in (*layers, *self.plain[1], self.sequence, self.tied, self.again, self.lora):
            x = jnp.tanh(layer(x)) + x
        return self.head(self.general(x))


PATHS = {
    ("again",),  # and "first", which is later in the order of names
    ("items", 0),
    ("items", 1, "key"),
    ("plain", 0, "key"),
    ("plain", 1, 0),
    ("sequence", "layers", 0),
    ("tied",),
}
HEAD = ("head",)
X = normal(np.random.default_rng(0), (4, SIZE))


def not_head(path, layer):
    assert isinstance(layer, nnx.Linear)
    return path != HEAD


@nnx.jit
def step(model, optimizer, x):
    def loss(model):
        return (model(x) ** 2).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def test_turns_linears_wherever_they_are():
    """In place, with their very Params, and an optimizer that does not notice."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.01, momentum=0.9), wrt=nnx.Param)
    step(model, optimizer, X)
    dense, dense_optimizer = nnx.clone((model, optimizer))
    params = {path: v for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}
    held = model.items[0]

    options = {"filter": not_head, "fraction": 0.5, "sampler": "uniform"}
    turned = sample_linears(model, **options, rngs=nnx.Rngs(0))
    assert turned.keys() == PATHS
    assert {type(layer) for layer in turned.values()} == {SampledLinear}
    assert model.again is model.first is turned["again",]
    assert model.items[0] is held is turned["items", 0]
    assert model.tied.kernel is model.first.kernel
    assert type(model.lora) is nnx.LoRALinear
    assert type(model.general) is nnx.LinearGeneral
    assert type(model.head) is nnx.Linear
    for path, value in nnx.iter_graph(model):
        assert not isinstance(value, nnx.Param) or value is params.pop(path)
    assert not params

    model.eval()  # exact: training goes on as that of the dense model
    for _ in range(2):
        value, want = step(model, optimizer, X), step(dense, dense_optimizer, X)
        np.testing.assert_allclose(value, want, rtol=1e-5)
    model.train()
    assert not np.allclose(nnx.jit(Model.__call__)(model, X), dense(X), rtol=1e-3)


def test_is_what_the_constructor_makes():
    options = {"fraction": 0.25, "sampler": "top_k", "block": 2, "policy": "backward"}
    options |= {"implementation": "dense", "deterministic": None, "rng_collection": "own"}
    made = SampledLinear(SIZE, SIZE, **options, dtype=jnp.bfloat16, rngs=nnx.Rngs(own=1, params=0))
    model = [linear(nnx.Rngs(0), dtype=jnp.bfloat16)]
    turned = sample_linears(model, **options, rngs=nnx.Rngs(own=1))
    assert turned[(0,)] is model[0]
    (graph, got), (want_graph, want) = nnx.split(model[0]), nnx.split(made)
    assert dict(vars(model[0])).keys() == dict(vars(made)).keys()
    assert graph == want_graph
    data = (jax.tree.map(as_numbers, nnx.to_pure_dict(state)) for state in (got, want))
    jax.tree.map(np.testing.assert_array_equal, *data)


def as_numbers(a):
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


@pytest.mark.parametrize(
    ("filter", "paths"),
    [
        (None, {("a",), ("b",)}),
        (nnx.PathContains("a"), {("a",)}),
        (nnx.Not(nnx.PathContains("a")), {("b",)}),
        (lambda path, layer: layer.out_features == 6, {("b",)}),
    ],
)
def test_filters(filter, paths):
    rngs = nnx.Rngs(0)
    model = nnx.Dict(a=linear(rngs), b=linear(rngs, 6), c=nnx.relu)
    turned = sample_linears(model, filter=filter, fraction=0.5, rngs=nnx.Rngs(0).default)
    assert turned.keys() == paths
    keys = [as_numbers(layer.rngs.key[...]) for layer in turned.values()]
    assert len(np.unique(keys, axis=0)) == len(paths)


def test_stacked_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return linear(rngs, kernel_init=nnx.initializers.ones, bias_init=nnx.initializers.zeros)

    model = nnx.Dict(layers=make(nnx.Rngs(0)))
    model.layers.kernel[...] = jnp.broadcast_to(jnp.eye(SIZE), (3, SIZE, SIZE))
    sample_linears(model, fraction=0.5, sampler="uniform", rngs=nnx.Rngs(0))
    assert model.layers.rngs.key.shape == model.layers.rngs.count.shape == (3,)
    assert_draws_for_each(model.layers)


def refuse(changes=(), filter=None, block=1, rngs=None, **options):
    """Calls it for a model with one layer that is special, and checks that nothing was turned."""
    model = nnx.Dict(a=linear(nnx.Rngs(0)), b=linear(nnx.Rngs(0), **options))
    for name, value in dict(changes).items():
        setattr(model.b, name, value)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    try:
        sample_linears(model, filter=filter, fraction=0.5, block=block, rngs=rngs)
    finally:
        assert type(model.a) is type(model.b) is nnx.Linear


def why(reason):
    return (
        f"sample_linears: the layer at ('b',) cannot be sampled: {reason} Or leave it out, with "
        "filter=lambda path, layer: path != ('b',)."
    )


def own(*args, **options):
    return jax.lax.dot_general(*args, **options)


ERRORS = {
    "block": (
        lambda: refuse({"in_features": 6, "kernel": nnx.Param(jnp.ones((6, SIZE)))}, block=4),
        why(
            '`block` must divide the features that policy="forward" samples, 6 for weights of '
            "shape (6, 16), got 4: take a divisor of them, or pad with zeros."
        ),
    ),
    "dot_general": (
        lambda: refuse(dot_general=own),
        why("it has a `dot_general` of its own, which sampled products do not have."),
    ),
    "preferred_element_type": (
        lambda: refuse(preferred_element_type=jnp.float32),
        why("it has a `preferred_element_type` of its own, which sampled products do not have."),
    ),
    "precision": (
        lambda: refuse(precision="default"),
        why("its precision is 'default', and sampled products are in full float32."),
    ),
    "stacked elsewhere": (
        lambda: refuse({"kernel": nnx.Param(jnp.ones((SIZE, 3, SIZE)))}),
        why(
            "its kernel has shape (16, 3, 16), expected (..., 16, 16): stack layers along leading "
            "axes."
        ),
    ),
    "filter": (
        lambda: refuse(filter=lambda path, layer: path == "a"),
        "sample_linears: no nnx.Linear passes `filter`, which is given a path and the layer; "
        "`model` has ('a',), ('b',) (other classes do not count, nor do subclasses).",
    ),
    "nothing": (
        lambda: sample_linears(nnx.relu, fraction=0.5, rngs=nnx.Rngs(0)),
        "sample_linears: no nnx.Linear passes `filter`, which is given a path and the layer; "
        "`model` has none (other classes do not count, nor do subclasses).",
    ),
    "stream": (
        lambda: refuse(rngs=nnx.Rngs(params=0)),
        'sample_linears: `rngs` has no stream "sampling" and no "default": give one, for example '
        "rngs=nnx.Rngs(sampling=0).",
    ),
    "fraction": (
        lambda: sample_linears([linear(nnx.Rngs(0))], fraction=2, rngs=nnx.Rngs(0)),
        "sample_linears: `fraction` must be over 0 and at most 1, got 2.",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    assert_raises(call, ValueError, message)
