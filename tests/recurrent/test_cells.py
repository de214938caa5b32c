"""Cells against NumPy, to float64, through many steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.nnx
from bsjax import _small_world
from tests.helpers import random_mask, tolerance
from tests.recurrent import oracle
from tests.recurrent.cells import BLOCK, HIDDEN, IN, MASK, NAMES, agree, cotangent, make, sequence

STEPS = 50
SPARE = bsjax.BlockPattern.from_mask(MASK, BLOCK, capacity=8)
EACH = [random_mask(3, 3, 0.4, seed) for seed in range(4)]
CASES = {
    "lstm": ("BlockLSTMCell", {}),
    "lstm, norm, strides, spare slots": (
        "BlockLSTMCell",
        {"use_layer_norm": True, "in_stride": 2, "out_stride": 5, "pattern": SPARE, "block": None},
    ),
    "multiplicative, strides, padding": (
        "BlockMultiplicativeLSTMCell",
        {"in_stride": 3, "hidden": 10, "pattern": [MASK, MASK.T]},
    ),
    "multiplicative, norm": ("BlockMultiplicativeLSTMCell", {"use_layer_norm": True}),
    "small world, a mask for each step": ("SmallWorldLSTMCell", {"depth": 3, "pattern": EACH}),
    "small world, no norm, strides, padding": (
        "SmallWorldLSTMCell",
        {"use_layer_norm": False, "depth": 3, "in_stride": 2, "out_stride": 2, "hidden": 11},
    ),
    "small world, one step, one block": (
        "SmallWorldLSTMCell",
        {"depth": 1, "pattern": np.ones((1, 1), bool), "block": HIDDEN},
    ),
    "small world, two steps, spare slots": (
        "SmallWorldLSTMCell",
        {"depth": 2, "pattern": SPARE, "block": None},
    ),
}


SLOW = (
    "lstm",
    "multiplicative, norm",
    "small world, one step, one block",
    "small world, two steps, spare slots",
)


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*c, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, c in CASES.items()],
)
def test_equations(name, options):
    """Outputs, carry, and the gradient of every parameter, of the input and of the first carry."""
    with jax.enable_x64(True):
        cell = make(name, noisy=True, param_dtype=jnp.float64, implementation="xla", **options)
        # whatever a spare slot holds, nobody sees it
        p = cell.gates.pattern.get_value()
        cell.gates.values.set_value(cell.gates.values[...].at[p.nnz :].set(jnp.nan))
        xs = sequence(STEPS, dtype=jnp.float64)
        carry = tuple(cotangent((len(xs), cell.hidden_features), jnp.float64) * s for s in (1, 0.5))
        dy = cotangent((len(xs), STEPS, cell.out_features), jnp.float64)
        dc, dh = (cotangent(a.shape, jnp.float64) for a in carry)

        @nnx.jit
        def both(rnn, carry, xs):
            def loss(rnn, carry, xs):
                (c, h), y = rnn(xs, initial_carry=carry)
                return (y * dy).sum() + (c * dc).sum() + (h * dh).sum(), (y, (c, h))

            return nnx.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(rnn, carry, xs)

        (_, (y, last)), (dw, dcarry, dxs) = both(bsjax.nnx.RNN(cell, return_carry=True), carry, xs)
    w, rng = oracle.numbers(cell), np.random.default_rng(0)
    carry, xs, dy, dc, dh = jax.tree.map(np.asarray, (carry, xs, dy, dc, dh))

    def loss(w, carry=carry, xs=xs):
        y, (c, h) = oracle.run(cell, w, carry, xs)
        return (y * dy).sum() + (c * dc).sum() + (h * dh).sum()

    want_y, want_last = oracle.run(cell, w, carry, xs)
    for got, want in zip((y, *last), (want_y, *want_last), strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want.real, rtol=1e-9, atol=1e-9)
    checked = 0
    for path, array, v in oracle.directions(w, rng):
        gradient = oracle.leaf(dw["cell"], path, array)
        if array == "values":
            stored = w[path]["pattern"].nnz
            assert not gradient[stored:].any()
            v[stored:] = 0
        want = oracle.derivative(loss, w, path, array, v)
        np.testing.assert_allclose((gradient * v).sum(), want, rtol=1e-8, atol=1e-8)
        assert abs(want) > 1e-6, (path, array)
        checked += 1
    assert checked == len(jax.tree.leaves(nnx.state(cell, nnx.Param)))
    v = rng.normal(size=xs.shape)
    want = loss(w, xs=xs + 1j * oracle.STEP * v).imag / oracle.STEP
    np.testing.assert_allclose((np.asarray(dxs) * v).sum(), want, rtol=1e-8)
    for i in range(2):
        v = rng.normal(size=carry[i].shape)
        moved = [a + 1j * oracle.STEP * v * (i == j) for j, a in enumerate(carry)]
        want = loss(w, carry=moved).imag / oracle.STEP
        np.testing.assert_allclose((np.asarray(dcarry[i]) * v).sum(), want, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_one_internal_step_does_both():
    """The input multiplies and is added in one: forward, quickly."""
    cell = make(noisy=True, **CASES["small world, one step, one block"][1])
    x = sequence(1)
    carry = tuple(cotangent((len(x), HIDDEN)) * s for s in (1, 0.5))
    got = nnx.jit(lambda cell, carry, x: cell(carry, x))(cell, carry, x[:, 0])
    y, last = oracle.run(cell, oracle.numbers(cell), *jax.tree.map(np.asarray, (carry, x)))
    for a, b in zip(jax.tree.leaves(got), (*last, y[:, 0]), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b.real, **tolerance(jnp.float64, IN + HIDDEN))


@pytest.mark.usefixtures("x64")  # as most tests: what makes a cell is compiled for either
@pytest.mark.parametrize("name", NAMES)
def test_begins_as_its_sources_say(name):
    """Forget bias, gains of one, and, in a small world, matrices that are the identity."""
    w = oracle.numbers(make(name, forget_bias=2.0))
    bias = np.zeros((4, HIDDEN))
    bias[1] = 2
    np.testing.assert_array_equal(w["gate_norm",]["bias"], bias)
    gates = oracle.dense(w["gates",]["values"], w["gates",]["pattern"])
    parts = np.split(gates, 4, axis=1)
    if name != "SmallWorldLSTMCell":
        for part, other in zip(parts, [*parts[1:], parts[0]], strict=True):
            assert not np.array_equal(part, other)
        return
    steps = [oracle.dense(v["values"], v["pattern"]) for k, v in w.items() if k[0] == "steps"]
    assert len(steps) == 5
    for matrix in (*steps, *parts):
        np.testing.assert_array_equal(matrix, np.eye(HIDDEN))
    assert all((v["scale"] == 1).all() for v in w.values() if "scale" in v)


@pytest.mark.usefixtures("x64")
def test_lstm_is_flax_lstm():
    """With a full pattern and the weights of Flax's own cell."""
    theirs = nnx.OptimizedLSTMCell(IN, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    ours = make("BlockLSTMCell", pattern=np.ones((3, 3), bool))
    ours.inputs.kernel.set_value(theirs.dense_i.kernel[...])
    kernel, bias = theirs.dense_h.kernel[...], cotangent((4, HIDDEN))
    ours.gates.values.set_value(bsjax.fromdense(kernel, ours.gates.pattern.get_value()))
    ours.gate_norm.bias.set_value(bias)
    theirs.dense_h.bias.set_value(bias.reshape(-1))
    x = sequence()[:, 0]
    carry = tuple(cotangent((len(x), HIDDEN)) * s for s in (1, 2))
    agree(*nnx.jit(lambda *cells: [cell(carry, x) for cell in cells])(ours, theirs))


@pytest.mark.usefixtures("x64")
def test_diagonal_is_always_there():
    bare = np.zeros((3, 3), bool)
    cell = make(pattern=bare)
    assert all(step.pattern.get_value().mask().diagonal().all() for step in cell.steps)
    assert cell.gates.pattern.get_value().mask().sum() == 4 * 3
    # blocks need not be square
    p = make(pattern=np.zeros((3, 2), bool), block=(4, 6)).steps[0].pattern.get_value()
    np.testing.assert_array_equal(p.mask(), [[1, 0], [1, 1], [0, 1]])
    with pytest.raises(ValueError, match="lacks blocks of the diagonal"):
        make(pattern=bsjax.BlockPattern.from_mask(bare, BLOCK), block=None)
    # a plain LSTM has no reason to need it
    assert (
        make("BlockLSTMCell", pattern=bare | MASK.T).gates.pattern.get_value().nnz == 4 * MASK.sum()
    )


def shapes(make):
    """A cell of which nothing is computed, and the number of its parameters."""
    cell = nnx.eval_shape(make)
    return cell, sum(a.size for a in jax.tree.leaves(nnx.state(cell, nnx.Param)))


@pytest.mark.parametrize("use_layer_norm", [True, False])
def test_parameters_by_formula(use_layer_norm):
    options = {"in_stride": 5, "use_layer_norm": use_layer_norm}
    _, count = shapes(lambda: make(depth=3, pattern=EACH, **options))
    masks = [m | np.eye(3, dtype=bool) for m in EACH]
    assert count == _small_world.small_world_parameters(IN, HIDDEN, masks, BLOCK, **options)
    # the published count: (D + 4) matrices
    full, _ = shapes(lambda: make(pattern=np.ones((3, 3), bool), depth=3, **options))
    matrices = [a for a in jax.tree.leaves(nnx.state(full, nnx.Param)) if a.ndim == 3]
    assert sum(a.size for a in matrices) == (3 + 4) * HIDDEN**2


GRAPH = {"block": 4, "depth": 3, "graph": "watts_strogatz", "parameters": {"k_half": 1, "p": 0.2}}


def test_from_graph():
    draw = functools.partial(bsjax.nnx.SmallWorldLSTMCell.from_graph, IN, 40, **GRAPH)
    cell = draw(seed=5, rngs=nnx.Rngs(0))
    masks = bsjax.patterns.step_masks(10, 3, "watts_strogatz", GRAPH["parameters"], seed=5)
    for step, mask in zip(cell.steps, masks, strict=False):
        np.testing.assert_array_equal(step.pattern.get_value().mask(), mask)
    np.testing.assert_array_equal(cell.gates.pattern.get_value().mask(), np.tile(masks[-1], 4))
    assert (cell.depth, cell.hidden_features) == (3, 40)
    one = draw(share_pattern=True, rngs=nnx.Rngs(0))
    assert one.steps[0].pattern.get_value().equals(one.steps[2].pattern.get_value())


def test_from_budget():
    """The next state, a block wider, has more parameters than allowed."""
    options = {**GRAPH, "in_stride": 2}

    def within(budget):
        return bsjax.nnx.SmallWorldLSTMCell.from_budget(IN, budget, rngs=nnx.Rngs(0), **options)

    def graph(hidden):
        return bsjax.nnx.SmallWorldLSTMCell.from_graph(IN, hidden, rngs=nnx.Rngs(0), **options)

    cell, size = shapes(lambda: within(20_000))
    _, more = shapes(lambda: graph(cell.hidden_features + 4))
    assert size <= 20_000 < more
    assert shapes(lambda: within(size))[1] == size
    with pytest.raises(ValueError, match=r"a state of 3 blocks of 4 has [\d,]+ parameters, more"):
        within(100)


@pytest.mark.parametrize("name", NAMES)
def test_16_bits(name):
    """Products in bfloat16; c sums up in float32, h and y are in bfloat16."""
    cell = make(name, dtype=jnp.bfloat16)
    carry = cell.initialize_carry((2, IN))
    assert [a.dtype for a in carry] == [jnp.float32, jnp.bfloat16]
    (c, h), y = cell(carry, sequence(batch=2)[:, 0])
    assert (c.dtype, h.dtype, y.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    carry = cell.initialize_carry((2, IN), nnx.Rngs(0), jax.nn.initializers.normal(1.0))
    assert not np.array_equal(*(np.asarray(a, np.float32) for a in carry))


ERRORS = {
    "no block": ({"block": None}, "give `block=`"),
    "grid": ({"pattern": np.eye(4, dtype=bool)}, "in_features=12 needs 3 blocks of 4"),
    "too few": ({"pattern": [MASK] * 3}, "has 3 patterns, but 6 are needed"),
    "depth": ({"depth": 0}, "`depth` must be a whole number of at least 1, got 0"),
    "stride": ({"in_stride": 0}, "`in_stride` must be a whole number of at least 1"),
    "hidden": ({"hidden": 0}, "`hidden_features` must be a whole number of at least 1"),
    "dropout": ({"dropout_rate": 1.0}, "must be at least 0 and below 1, got 1.0"),
}


@pytest.mark.parametrize(("options", "text"), ERRORS.values(), ids=ERRORS)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


def test_carry_needs_random_numbers():
    with pytest.raises(ValueError, match=r"give `rngs=nnx\.Rngs"):
        make().initialize_carry((1, IN), carry_init=jax.nn.initializers.normal(1.0))
