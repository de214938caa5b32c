"""`RNN` is Flax's, but for when the gradients of shared weights are computed, and how often."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.nnx
from tests.helpers import loop_bodies, slow
from tests.recurrent.cells import (
    BATCH,
    HIDDEN,
    IN,
    NAMES,
    TIME,
    agree,
    cotangent,
    make,
    sequence,
)

DY = cotangent((BATCH, TIME, HIDDEN))
LENGTHS = np.array([2, TIME, 4])


@nnx.jit(static_argnames=("options",))
def results(rnn, x, lengths, options=()):
    """Carry, outputs, and the gradients of all parameters and of x."""

    def loss(rnn, x):
        (c, h), y = rnn(x, seq_lengths=lengths, return_carry=True, **dict(options))
        dy = jnp.moveaxis(DY, 1, 0) if y.shape[0] == TIME else DY
        dy = dy.astype(y.dtype)
        return (y * dy).sum() + (c * jnp.sin(h)).sum(), ((c, h), y)

    gradients, out = nnx.grad(loss, argnums=(0, 1), has_aux=True)(rnn, x)
    return out, gradients


SMALL = {"SmallWorldLSTMCell": {"depth": 3}}  # its other steps are as the third


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options", "lengths"),
    [
        ("SmallWorldLSTMCell", {"reverse": True}, LENGTHS),
        slow("BlockMultiplicativeLSTMCell", {"reverse": True}, LENGTHS),
        ("BlockLSTMCell", {"time_major": True, "reverse": True, "keep_order": True}, LENGTHS),
        slow("BlockLSTMCell", {"reverse": True}, None),
        slow("SmallWorldLSTMCell", {}, None),
    ],
)
def test_is_flax_rnn(name, options, lengths, sums):
    """Outputs, carry and gradients are those of `nnx.RNN`; of each product, one sddmm."""
    x = sequence()
    x = jnp.moveaxis(x, 1, 0) if "time_major" in options else x
    options, cells = tuple(options.items()), [make(name, **SMALL.get(name, {})) for _ in range(2)]
    ours = results(bsjax.nnx.RNN(cells[0]), x, lengths, options)
    products = cells[0].kind.steps + 1
    assert sums == [(TIME, BATCH)] * products
    sums.clear()
    theirs = results(nnx.RNN(cells[1]), x, lengths, options)
    assert set(sums) == {(BATCH,)}
    agree(ours, theirs)


def test_no_sddmm_in_the_compiled_loop():
    """Where an sddmm is one dot, no loop of the compiled program has a dot of its shape."""
    cell = make("BlockLSTMCell", implementation="dense")
    shape = rf"f32\[{HIDDEN},{4 * HIDDEN}\]|f32\[{4 * HIDDEN},{HIDDEN}\]"

    def in_loops(rnn):
        text = results.lower(rnn, sequence(), None).compile().as_text()
        bodies = loop_bodies(text)
        assert bodies
        return len(re.findall(rf"= (?:{shape})\S* dot\(", bodies))

    assert in_loops(bsjax.nnx.RNN(cell)) == 0
    assert in_loops(nnx.RNN(cell)) == 1


@pytest.mark.usefixtures("x64")
def test_carried_state_is_one_long_sequence():
    """Two windows with the carry handed over are the whole sequence."""
    rnn = bsjax.nnx.RNN(make(depth=2, in_stride=2, out_stride=3), return_carry=True)
    run = nnx.jit(lambda rnn, x, carry: rnn(x, initial_carry=carry))
    x, start = sequence(), rnn.cell.initialize_carry((BATCH, IN))
    carry, whole = run(rnn, x, start)
    middle, first = run(rnn, x[:, : TIME // 2], start)
    last, second = run(rnn, x[:, TIME // 2 :], middle)
    agree((last, jnp.concatenate([first, second], 1)), (carry, whole))


@pytest.mark.usefixtures("x64")
def test_truncated_backpropagation_stops_at_the_carry():
    rnn = bsjax.nnx.RNN(make("BlockLSTMCell"), return_carry=True)

    def loss(x, cut):
        carry, _ = rnn(x)
        carry = jax.lax.stop_gradient(carry) if cut else carry
        return rnn(x[:, :2] * 0, initial_carry=carry)[1].sum()

    whole, cut = jax.jit(lambda x: [jax.grad(loss)(x, cut) for cut in (False, True)])(sequence())
    assert whole.any()
    assert not cut.any()


@pytest.mark.usefixtures("x64")
def test_remat_is_no_remat():
    """The same numbers, and only the inputs and cotangents of products kept."""
    cells = [make("BlockLSTMCell"), make("BlockLSTMCell")]
    rnns = [
        bsjax.nnx.RNN(cell, remat=remat) for cell, remat in zip(cells, (False, True), strict=True)
    ]
    agree(*(results(rnn, sequence(), None) for rnn in rnns))

    def program(rnn):
        graphdef, state = nnx.split(rnn)
        gradient = jax.grad(lambda x, state: nnx.merge(graphdef, state)(x).sum())
        return str(jax.make_jaxpr(gradient)(sequence(), state))

    # the three gates are computed once, or once more for the backward pass
    assert [program(rnn).count("= logistic") for rnn in rnns] == [3, 6]


@pytest.mark.usefixtures("x64")
def test_lengths_select_the_carry():
    """Any number of batch axes; after no step at all it is the first one."""
    rnn = bsjax.nnx.RNN(make("BlockLSTMCell"))
    x = jnp.stack([sequence(), 2 * sequence()])
    lengths = jnp.array([[0, 1, TIME], [3, 0, 2]], jnp.int16)
    start = jax.tree.map(lambda a: a + 0.5, rnn.cell.initialize_carry((2, BATCH, IN)))
    run = nnx.jit(lambda rnn, x, **kw: rnn(x, return_carry=True, **kw))
    (c, h), y = run(rnn, x, initial_carry=start, seq_lengths=lengths)
    for i, j in np.ndindex(2, BATCH):
        carry = jax.tree.map(lambda a, i=i, j=j: a[i, j], start)
        for t in range(lengths[i, j]):
            carry, _ = rnn.cell(carry, x[i, j, t])
        agree((c[i, j], h[i, j]), carry)
    assert y.shape == (2, BATCH, TIME, HIDDEN)
    with pytest.raises(ValueError, match=r"`seq_lengths` must be whole numbers of shape \(2, 3\)"):
        rnn(x, seq_lengths=jnp.ones((2,), jnp.int32))


@pytest.mark.usefixtures("x64")
def test_dropout_draws_for_each_step():
    """As under `nnx.RNN`, with its random numbers; another call draws anew; `eval` is exact."""
    ours, theirs = (
        kind(make("BlockLSTMCell", dropout_rate=0.5)) for kind in (bsjax.nnx.RNN, nnx.RNN)
    )
    run = nnx.jit(lambda rnn, x: rnn(x))
    x = jnp.broadcast_to(sequence()[:, :1], (BATCH, TIME, IN))
    first, second = run(ours, x), run(ours, x)
    agree((first, second), (run(theirs, x), run(theirs, x)))
    assert not np.array_equal(first, second)
    ours.eval()
    exact = run(ours, x)
    np.testing.assert_array_equal(exact, run(ours, x))
    np.testing.assert_array_equal(exact, run(bsjax.nnx.RNN(make("BlockLSTMCell")), x))


@pytest.mark.usefixtures("x64")
def test_other_cells():
    """Any cell of Flax: one without `project`, and one with a variable of its own."""

    class Counting(nnx.GRUCell):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.count = nnx.Variable(jnp.int32(0))

        def __call__(self, carry, x):
            self.count[...] += 1
            return super().__call__(carry, x)

    cells = [Counting(IN, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0)) for _ in range(2)]
    x = sequence()
    agree(bsjax.nnx.RNN(cells[0])(x), nnx.RNN(cells[1])(x))
    assert int(cells[0].count[...]) == TIME
    axes = nnx.StateAxes({nnx.Param: None, nnx.Variable: 0, ...: nnx.Carry})
    stacked = Counting(IN, HIDDEN, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    stacked.count.set_value(jnp.arange(TIME))
    bsjax.nnx.RNN(stacked, state_axes=axes)(x)
    np.testing.assert_array_equal(stacked.count[...], 1 + np.arange(TIME))


@pytest.mark.usefixtures("x64")
def test_changed_params_must_be_carried():
    class Decaying(nnx.SimpleCell):
        def __call__(self, carry, x):
            self.dense_h.kernel[...] *= 0.5
            return super().__call__(carry, x)

    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    cells = [Decaying(IN, HIDDEN, **dtypes, rngs=nnx.Rngs(0)) for _ in range(3)]
    with pytest.raises(ValueError, match="a step changed a Param"):
        bsjax.nnx.RNN(cells[0])(sequence())
    axes = nnx.StateAxes({...: nnx.Carry})
    agree(bsjax.nnx.RNN(cells[1], state_axes=axes)(sequence()), nnx.RNN(cells[2])(sequence()))
    assert cells[1].dense_h.kernel[...].max() < 0.1


@pytest.mark.usefixtures("x64")
def test_both_directions():
    def both(kind):
        forward, backward = (kind(make("BlockLSTMCell", seed=i)) for i in range(2))
        run = nnx.jit(lambda rnn, x: rnn(x, seq_lengths=LENGTHS))
        return run(nnx.Bidirectional(forward, backward), sequence())

    agree(both(bsjax.nnx.RNN), both(nnx.RNN))


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[:2]), NAMES[2]]
)
def test_learns_in_16_bits(name):
    """A few steps of training in bfloat16 lower the loss."""
    rnn = bsjax.nnx.RNN(make(name, dtype=jnp.bfloat16, out_stride=2, **SMALL.get(name, {})))

    @nnx.jit
    def step(rnn, x):
        def loss(rnn):
            y = rnn(x)
            assert y.dtype == jnp.bfloat16
            return jnp.square(y.astype(jnp.float32) - 0.3).mean()

        value, gradient = nnx.value_and_grad(loss)(rnn)
        params = nnx.state(rnn, nnx.Param)
        nnx.update(rnn, jax.tree.map(lambda a, g: a - 2 * g, params, gradient))
        return value

    losses = [float(step(rnn, sequence())) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
