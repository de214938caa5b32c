"""The cells and `RNN` of Linen are those of NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bsjax.linen
import bsjax.nnx
from tests.helpers import slow
from tests.recurrent.cells import (
    BATCH,
    BLOCK,
    HIDDEN,
    IN,
    MASK,
    NAMES,
    TIME,
    agree,
    default,
    make,
    sequence,
)

X = sequence()
LENGTHS = np.array([2, TIME, 4])
OPTIONS = {
    "BlockLSTMCell": {"use_layer_norm": True, "out_stride": 2},
    "BlockMultiplicativeLSTMCell": {"pattern": [MASK, MASK.T]},
    "SmallWorldLSTMCell": {"depth": 2, "in_stride": 5, "use_layer_norm": False},
}


def linen(name="SmallWorldLSTMCell", **options):
    options = {"pattern": MASK, "block": BLOCK, "param_dtype": default(), **options}
    return getattr(bsjax.linen, name)(HIDDEN, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [slow(NAMES[0]), slow(NAMES[1]), NAMES[2]])
def test_both_dialects_and_flax_agree(name, sums):
    """Outputs, carry and gradients, with converted parameters, under all four kinds of RNN."""
    x = sequence()
    cell, ours = linen(name, **OPTIONS[name]), make(name, noisy=True, **OPTIONS[name])
    assert (cell.out_features, cell.num_feature_axes) == (ours.out_features, 1)
    options = {"return_carry": True, "reverse": True}
    rnn = bsjax.linen.RNN(cell, **options)
    theirs = nn.RNN(cell, variable_broadcast=("params", "patterns"), **options)
    variables = bsjax.linen.from_nnx(bsjax.nnx.RNN(ours))
    # the structure is that of variables that `init` makes, with either RNN
    shapes = [
        jax.tree.map(jnp.shape, jax.eval_shape(r.init, jax.random.key(0), x)) for r in (rnn, theirs)
    ]
    assert shapes[0] == shapes[1] == jax.tree.map(jnp.shape, variables)

    def loss(rnn, params, x):
        rest = {"patterns": variables["patterns"]}
        (c, h), y = rnn.apply({"params": params, **rest}, x, seq_lengths=LENGTHS)
        return jnp.sin(y).sum() + (c * h).sum(), ((c, h), y)

    def results(rnn):
        f = jax.jit(jax.grad(functools.partial(loss, rnn), argnums=(0, 1), has_aux=True))
        return f(variables["params"], x)

    got = results(rnn)
    assert sums == [(TIME, BATCH)] * (ours.kind.steps + 1)
    agree(got, results(theirs))

    @nnx.jit
    def in_nnx(rnn, x):
        return rnn(x, seq_lengths=LENGTHS)

    agree(got[1], in_nnx(bsjax.nnx.RNN(ours, **options), x))


@pytest.mark.usefixtures("x64")
def test_remat_and_time_major():
    """Of a cell with layer norm, beside that of NNX."""
    options, x = OPTIONS["BlockLSTMCell"], sequence()
    ours = make("BlockLSTMCell", noisy=True, **options)
    variables = bsjax.linen.from_nnx(bsjax.nnx.RNN(ours))
    twin = bsjax.linen.RNN(linen("BlockLSTMCell", **options), remat=True, time_major=True)
    y = jax.jit(twin.apply)(variables, x.swapaxes(0, 1)).swapaxes(0, 1)
    agree(y, nnx.jit(lambda rnn, x: rnn(x))(bsjax.nnx.RNN(ours), x))


def test_dropout_needs_a_stream():
    """Another draw at every step and for every key; none without a stream, or if deterministic."""
    cell = linen("BlockLSTMCell", dropout_rate=0.5)
    rnn = bsjax.linen.RNN(cell)
    variables = rnn.init(jax.random.key(0), X)
    apply = jax.jit(rnn.apply)
    exact = apply(variables, X)
    keys = [{"dropout": jax.random.key(i)} for i in (0, 0, 1)]
    first, same, other = (apply(variables, X, rngs=key) for key in keys)
    np.testing.assert_array_equal(first, same)
    assert all(not np.array_equal(a, b) for a, b in ((first, other), (first, exact)))
    off = bsjax.linen.RNN(cell.copy(deterministic=True))
    np.testing.assert_array_equal(jax.jit(off.apply)(variables, X, rngs=keys[0]), exact)
    # with weights of zero, only the draws tell the steps apart
    none = jax.tree.map(jnp.zeros_like, variables["params"])
    none["cell"]["gate_norm"]["bias"] = (
        jnp.ones((4, HIDDEN)) * jnp.array([9.0, -9.0, 1.0, 9.0])[:, None]
    )
    ys = apply({**variables, "params": none}, X, rngs=keys[0])
    dropped = [set(map(tuple, np.argwhere(np.abs(y) < 0.1))) for y in ys.swapaxes(0, 1)]
    assert len(set(map(frozenset, dropped))) == TIME


@pytest.mark.usefixtures("x64")
def test_variables_that_are_carried():
    """As `nn.RNN` carries them, and leaves them after the last step."""

    class Counting(nn.GRUCell):
        @nn.compact
        def __call__(self, carry, x):
            count = self.variable("counts", "count", lambda: jnp.int32(0))
            count.value += 1
            h = nn.Dense(self.features, param_dtype=self.param_dtype)(x)
            return carry + h, h

    ours, theirs = (
        kind(Counting(3, param_dtype=jnp.float64), variable_carry="counts")
        for kind in (bsjax.linen.RNN, nn.RNN)
    )
    x = sequence()
    params = ours.init(jax.random.key(0), x)["params"]
    variables = {"params": params, "counts": {"cell": {"count": jnp.int32(0)}}}
    (y, after), (want, _) = (r.apply(variables, x, mutable="counts") for r in (ours, theirs))
    agree(y, want)
    assert int(after["counts"]["cell"]["count"]) == TIME


def test_stacked_variables_run_as_in_flax():
    rnn = bsjax.linen.RNN(
        nn.SimpleCell(HIDDEN),
        variable_axes={"params": 0},
        variable_broadcast=False,
        split_rngs={"params": True},
    )
    variables = rnn.init(jax.random.key(0), X)
    assert variables["params"]["cell"]["i"]["kernel"].shape == (TIME, IN, HIDDEN)
    with pytest.raises(ValueError, match="`remat` does not go with `variable_axes`"):
        rnn.copy(remat=True).apply(variables, X)


def test_constructors():
    graph = {"block": 4, "depth": 2, "graph": "balanced", "parameters": {"density": 0.3}}
    ours = bsjax.linen.SmallWorldLSTMCell.from_graph(40, seed=3, **graph)
    theirs = nnx.eval_shape(
        lambda: bsjax.nnx.SmallWorldLSTMCell.from_graph(IN, 40, seed=3, rngs=nnx.Rngs(0), **graph)
    )
    assert ours.pattern[0].capacity == theirs.steps[0].pattern.get_value().capacity
    budget = bsjax.linen.SmallWorldLSTMCell.from_budget(IN, 9000, **graph)
    shapes = jax.eval_shape(
        budget.init,
        jax.random.key(0),
        budget.initialize_carry(jax.random.key(0), (1, IN)),
        X[:1, 0],
    )
    size = sum(a.size for a in jax.tree.leaves(shapes["params"]))
    assert 0.8 * 9000 < size <= 9000
    # equal fields are equal modules, so that `nn.jit` compiles once
    assert linen() == linen()
    assert hash(linen()) == hash(linen())
    with pytest.raises(ValueError, match="`depth` must be a whole number of at least 1"):
        linen(depth=0)
    carry = linen(dtype=jnp.bfloat16).initialize_carry(jax.random.key(0), (2, IN))
    assert [a.dtype for a in carry] == [jnp.float32, jnp.bfloat16]
