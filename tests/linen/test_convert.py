"""`from_nnx` and `to_nnx`: whole models, there and back, and what does not fit."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bsjax.linen
import bsjax.nnx
from bsjax.linen import from_nnx, to_nnx
from tests.helpers import normal, random_mask

pytestmark = pytest.mark.usefixtures("quick_compilations")
MASK = random_mask(3, 3, 0.5, seed=4)
X = normal(np.random.default_rng(0), (5, 23))


class Inner(nnx.Module):
    """Block, dense and normalising layers, under names and in a list."""

    def __init__(self, mask: Any, rngs: nnx.Rngs) -> None:
        options = {"pattern": mask, "block": 8, "rngs": rngs}
        self.first = bsjax.nnx.BlockLinear(23, 23, **options)
        self.layers = nnx.List(
            [
                bsjax.nnx.BlockLinear(23, 20, use_bias=False, **options),
                nnx.Linear(20, 6, rngs=rngs),
            ]
        )
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return self.dropout(self.norm(x))


class Outer(nnx.Module):
    def __init__(self, mask: Any = MASK, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.inner = Inner(mask, rngs)
        self.head = nnx.Sequential(nnx.relu, nnx.Linear(6, 2, rngs=rngs))

    def __call__(self, x):
        return self.head(self.inner(x))


class LinenInner(nn.Module):
    mask: Any

    def setup(self):
        options = {"pattern": self.mask, "block": 8}
        self.first = bsjax.linen.BlockLinear(23, **options)
        self.layers = [bsjax.linen.BlockLinear(20, use_bias=False, **options), nn.Dense(6)]
        self.norm = nn.BatchNorm(use_running_average=True)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LinenOuter(nn.Module):
    mask: Any

    def setup(self):
        self.inner = LinenInner(self.mask)
        self.head = nn.Sequential([nn.relu, nn.Dense(2)])

    def __call__(self, x):
        return self.head(self.inner(x))


def nnx_model(mask=MASK, seed=0):
    model = Outer(mask, seed)
    model.inner.norm.mean[...] = normal(np.random.default_rng(seed), (6,))
    model.eval()
    return model


LINEN = LinenOuter(MASK)


def variables(seed=1):
    drawn = LINEN.init(jax.random.key(seed), X)
    return jax.tree.map(lambda a: a + 0.1 if a.dtype == jnp.float32 else a, drawn)


def test_from_nnx():
    ours = nnx_model()
    got, like = from_nnx(ours), variables()
    assert jax.tree.structure(got) == jax.tree.structure(like)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, like)
    np.testing.assert_array_equal(LINEN.apply(got, X), ours(X))


def test_to_nnx():
    given, ours = variables(), nnx_model(np.roll(MASK, 1, axis=0))
    values = ours.inner.first.values
    to_nnx(given, ours)
    np.testing.assert_array_equal(ours(X), LINEN.apply(given, X))
    assert ours.inner.first.values is values  # in place
    np.testing.assert_array_equal(values[...], given["params"]["inner"]["first"]["values"])
    moved = ours.inner.first.pattern.get_value()
    assert moved.equals(bsjax.BlockPattern.from_mask(MASK, 8))


def test_there_and_back():
    given, ours = variables(), nnx_model()
    to_nnx(given, ours)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(ours), given)


def test_annotated_and_frozen_variables():
    init = nn.with_partitioning(bsjax.inits.stored_fan_in(), (None, None, None))
    layer = bsjax.linen.BlockLinear(20, pattern=MASK, block=8, kernel_init=init)
    given = nn.FrozenDict(layer.init(jax.random.key(0), X))
    ours = bsjax.nnx.BlockLinear(23, 20, pattern=MASK, block=8, rngs=nnx.Rngs(1))
    to_nnx(given, ours)
    np.testing.assert_array_equal(ours(X), layer.apply(given, X))


def test_stacked_layers():
    """`nnx.vmap` and `nn.scan` stack alike, patterns too."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return bsjax.nnx.BlockLinear(23, 23, pattern=MASK, block=8, rngs=rngs)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bsjax.linen.BlockLinear(23, pattern=MASK, block=8, name="linear")(x), None

    stack = nn.scan(
        Layer, variable_axes={"params": 0, "patterns": 0}, split_rngs={"params": True}, length=2
    )()
    ours = nnx.Dict(linear=make(nnx.Rngs(0)))
    got, like = from_nnx(ours), stack.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, like)
    to_nnx(like, ours)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(ours), like)


def test_sizes_are_optional():
    given, ours = variables(), nnx_model()
    first = given["patterns"]["inner"]["first"]
    given["patterns"]["inner"]["first"] = {name: first[name] for name in ("row", "col")}
    to_nnx(given, ours)


def changed(path, value):
    given = variables()
    *parents, last = path.split("/")
    node = given
    for name in parents:
        node = node.setdefault(name, {})
    if value is None:
        del node[last]
    else:
        node[last] = value(node.get(last)) if callable(value) else value
    return given


REFUSED = {
    "missing": (
        ("params/inner/first/bias", None),
        ValueError,
        "to_nnx: `variables` lack params/inner/first/bias, which `model` has: both need the same "
        "layers under the same names.",
    ),
    "many missing": (
        ("params", {}),
        ValueError,
        "to_nnx: `variables` lack params/head/layers_1/bias, params/head/layers_1/kernel, "
        "params/inner/first/bias and 6 more, which `model` has",
    ),
    "surplus": (
        ("params/inner/second/bias", jnp.ones(3)),
        ValueError,
        "to_nnx: `model` has no params/inner/second/bias, which `variables` hold: both need the "
        "same layers under the same names.",
    ),
    "shape": (
        ("params/inner/layers_1/kernel", jnp.ones((20, 7))),
        ValueError,
        "to_nnx: params/inner/layers_1/kernel: expected shape (20, 6), got (20, 7): build `model` "
        "with the sizes and the pattern of the Linen model.",
    ),
    "block": (
        ("params/inner/first/values", lambda a: jnp.ones((len(a), 16, 16))),
        ValueError,
        "to_nnx: params/inner/first/values: expected shape (4, 8, 8), got (4, 16, 16)",
    ),
    "dtype": (
        ("params/inner/first/values", lambda a: a.astype(jnp.bfloat16)),
        TypeError,
        "to_nnx: params/inner/first/values: expected float32, got bfloat16: cast the array first, "
        "or build `model` with param_dtype=bfloat16.",
    ),
    "grid": (
        ("patterns/inner/first/grid", jnp.array([4, 3], jnp.int32)),
        ValueError,
        "to_nnx: patterns/inner/first: BlockPattern: the saved pattern has grid (4, 3), the target "
        "has (3, 3)",
    ),
    "sizes of blocks": (
        ("patterns/inner/first/block", jnp.array([8, 16], jnp.int32)),
        ValueError,
        "to_nnx: patterns/inner/first: BlockPattern: the saved pattern has block (8, 16)",
    ),
    "capacity": (
        ("patterns/inner/first/row", jnp.zeros(2, jnp.int32)),
        ValueError,
        "to_nnx: patterns/inner/first: BlockPattern: the saved `row` has shape (2,)",
    ),
    "out of range": (
        ("patterns/inner/first/row", lambda a: a + 3),
        ValueError,
        "outside the grid (3, 3)",
    ),
    "cast": (
        ("patterns/inner/first/row", lambda a: a.astype(jnp.float32)),
        TypeError,
        "to_nnx: patterns/inner/first: BlockPattern: the saved `row` must be int32, got float32",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, kind, message):
    given, ours = changed(*change), nnx_model()
    before = from_nnx(ours)
    with pytest.raises(kind, match=re.escape(message)) as caught:
        to_nnx(given, ours)
    assert "\n" not in str(caught.value)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(ours), before)  # nothing was changed


def test_a_pattern_that_layers_share():
    """In Linen each has its own, and both must be the same on the way back."""
    model = bsjax.nnx.BlockMLP(
        16, 16, pattern=np.eye(2, dtype=bool), block=8, gated=True, rngs=nnx.Rngs(0)
    )
    variables = bsjax.linen.from_nnx(model)
    assert set(variables["patterns"]) == {"up", "gate", "down"}
    other = bsjax.BlockPattern.from_mask(np.eye(2, dtype=bool)[::-1], 8)
    for name in ("up", "gate"):
        variables["patterns"][name] |= {"row": other.row, "col": other.col}
    bsjax.linen.to_nnx(variables, model)
    assert model.up.pattern is model.gate.pattern
    assert model.up.pattern.get_value().equals(other)
    variables["patterns"]["gate"] |= {"row": other.row[::-1], "col": other.col}
    message = "to_nnx: patterns/gate and patterns/up hold different patterns, but in `model`"
    with pytest.raises(ValueError, match=message):
        bsjax.linen.to_nnx(variables, model)
