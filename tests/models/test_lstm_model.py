"""The recurrent language model: its parameters, its state, its files, and the text it writes."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _generate as writing
from models import _recurrent as recurrent
from models._cli import Mistake
from models._recurrent import Size, make, parameters
from tests.helpers import tolerance
from tests.models.lstm_runs import SIZE, count, leaves

SIZES = {
    "small": SIZE,
    "odd strides, no norm": SIZE._replace(in_stride=3, out_stride=5, layer_norm=False),
    "ring": SIZE._replace(graph="watts_strogatz", depth=3, hidden=40),
    "strides": SIZE._replace(graph="strides", hidden=36, in_stride=1),
    "one pattern, dropout": SIZE._replace(shared=True, dropout=0.1),
    "dense, one step": SIZE._replace(graph="dense", hidden=7, depth=1),
}


call = nnx.jit(lambda model, data, carry: model(data, carry))


@nnx.jit
def states(model, data, carry, lengths):
    """Of every step, and those of texts of these lengths."""
    return model.states(data, carry), model.states(data, carry, lengths=lengths)


@pytest.fixture(scope="module")
def model():
    return make(SIZE, 3)


@pytest.fixture(scope="module")
def data():
    return jax.random.randint(jax.random.key(0), (3, 8), 0, 256)


@pytest.fixture
def double():
    """A model and its first carry, to compute with in float64."""
    with jax.enable_x64(True):
        made = make(SIZE._replace(dtype="float64"), 3)
        yield made, jax.tree.map(lambda a: a.astype(jnp.float64), made.initial_carry(3))


# sums over the features of a state, once in each of the 8 steps that it goes through
SUMS = tolerance(jnp.float64, 8 * SIZE.hidden)


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", SIZES)
def test_parameters_by_formula_are_those_of_the_model(name):
    made = nnx.eval_shape(lambda: make(SIZES[name], 1))
    assert count(made) == parameters(SIZES[name])


def test_every_seed_has_other_graphs_with_as_many_blocks():
    size = SIZE._replace(hidden=64)
    first, second = (recurrent.masks(size, seed) for seed in (0, 1))
    assert [m.sum() for m in first] == [m.sum() for m in second]
    assert any((a != b).any() for a, b in zip(first, second, strict=True))
    assert len({m.tobytes() for m in first}) == size.depth + 1  # each step has its own
    assert recurrent.density(size) == pytest.approx(first[0].mean())


@pytest.mark.parametrize(("wanted", "depth"), [(50_000, 2), (300_000, 6), (1_000_000, 1)])
def test_the_dense_twin_has_as_many_parameters(wanted, depth):
    sparse = recurrent.widest(Size(0, depth=depth, block=16, embedding=16), wanted)
    dense = recurrent.matching_dense(sparse)
    wider = sparse._replace(hidden=sparse.hidden + sparse.block)
    assert parameters(sparse) <= wanted < parameters(wider)
    assert abs(parameters(dense) / parameters(sparse) - 1) <= 0.01
    assert (dense.depth, dense.layer_norm, dense.embedding) == (depth, True, 16)
    assert (dense.in_stride, dense.out_stride) == (1, 1)
    assert dense.hidden < sparse.hidden


def test_sizes_that_cannot_be():
    with pytest.raises(Mistake, match=r"^no dense model has 1,200 parameters within 1%: take a la"):
        recurrent.matching_dense(SIZE._replace(embedding=4), 1200)
    with pytest.raises(
        Mistake, match=r"smallest model of blocks of 32 has .* more than the 9 want"
    ):
        recurrent.widest(Size(0), 9)


# ------------------------------------------------------------------------------------------ state


def test_state_carried_over_is_that_of_one_long_sequence(double, data):
    model, start = double
    whole, end = call(model, data, start)
    first, between = call(model, data[:, :4], start)
    second, last = call(model, data[:, 4:], between)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, **SUMS)
    for a, b in zip(end, last, strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, **SUMS)
    assert whole.shape == (3, 8, 256)
    assert whole.dtype == jnp.float64
    assert np.abs(np.asarray(end[0])).min() > 0


def test_states_are_those_the_readout_sees(double, data):
    model, start = double
    lengths = jnp.array([8, 1, 5])
    (c, h), kept = states(model, data, start, lengths)
    assert c.shape == h.shape == (3, 8, SIZE.hidden)
    logits, end = call(model, data, start)
    np.testing.assert_allclose(model.readout(h[..., :: SIZE.out_stride]), logits, **SUMS)
    for every, of_lengths, after in zip((c, h), kept, end, strict=True):
        np.testing.assert_allclose(every[:, -1], after, **SUMS)
        # texts of unequal lengths keep the state that they end with
        expected = every[jnp.arange(3), lengths - 1]
        np.testing.assert_allclose(of_lengths[:, -1], expected, **SUMS)


def test_dropout_is_off_after_eval(data):
    noisy = make(SIZE._replace(dropout=0.5))
    for mode, same in ((noisy.train, False), (noisy.eval, True)):
        mode()
        a, b = (call(noisy, data, noisy.initial_carry(3))[0] for _ in range(2))
        assert np.array_equal(a, b) is same


def test_bfloat16_computes_near_float32(model, data):
    low = make(SIZE._replace(dtype="bfloat16"), 3)
    logits, (c, h) = call(low, data, low.initial_carry(3))
    exact, _ = call(model, data, model.initial_carry(3))
    assert (logits.dtype, c.dtype, h.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    error = np.abs(np.asarray(logits - exact)).mean() / np.abs(np.asarray(exact)).mean()
    assert 0 < error < 0.1


# -------------------------------------------------------------------------------- models on a disk


def test_a_saved_model_is_loaded_by_its_folder_alone(model, data, tmp_path):
    recurrent.save(tmp_path / "it", model, {"step": 7})
    found = recurrent.load(tmp_path / "it")
    assert found.size == SIZE
    assert json.loads((tmp_path / "it" / "model.json").read_text())["step"] == 7
    for a, b in zip(leaves(nnx.state(model)), leaves(nnx.state(found)), strict=True):
        np.testing.assert_array_equal(a, b)
    found.train()  # as the one that was saved, so that nothing compiles
    made, expected = (call(m, data, m.initial_carry(3))[0] for m in (found, model))
    np.testing.assert_array_equal(made, expected)


def test_mistakes_of_files(model, tmp_path):
    with pytest.raises(
        Mistake, match=r"^no model in .*nowhere: `python -m models.lstm` writes one"
    ):
        recurrent.load(tmp_path / "nowhere")
    recurrent.save(tmp_path, model, {})
    with np.load(tmp_path / "model.npz") as found:
        arrays = {name: array for name, array in found.items() if "embed" not in name}
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(Mistake, match=r"^the model in .* has other variables than its size says: "):
        recurrent.load(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(Mistake, match=r"^the model in .* cannot be read \(JSONDecodeError\): "):
        recurrent.load(tmp_path)


# ------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def story(model):
    """Text of 40 bytes, and how often a step was compiled for it and for all else below."""
    before = writing._compiled._cache_size()
    text, _ = writing.generate(model, None, b"once", 40, 0.9, jax.random.key(1))
    return types.SimpleNamespace(text=text, before=before)


def test_one_program_writes_everything(model, story):
    for prompt, heat in ((b"", 0.0), (b"a longer prompt", 1.0), (b"x", 0.3)):
        text, _ = writing.generate(model, None, prompt, 3, heat)
        assert len(text) == 3
    assert writing._compiled._cache_size() == story.before + 1


def test_text_goes_on_from_a_file_as_if_it_had_not_stopped(model, story, tmp_path):
    first, state = writing.generate(model, None, b"once", 13, 0.9, jax.random.key(1))
    writing.save_state(tmp_path / "state", state)
    state = writing.load_state(tmp_path / "state", model)
    second, _ = writing.generate(model, state, b"", 27, 0.9)
    assert first + second == story.text
    other, _ = writing.generate(model, state, b"", 27, 0.9, jax.random.key(2))
    assert other != second


def test_greedy_text_is_the_likeliest_byte_after_all_before(model):
    text, _ = writing.generate(model, None, b"ab", 6, 0.0)
    seen = jnp.asarray([list(b"\nab" + text[:-1])], jnp.int32)
    logits, _ = call(model, seen, model.initial_carry(1))
    assert text == bytes(np.asarray(logits[0, 2:].argmax(-1)).tolist())


def test_a_temperature_draws_from_the_probabilities(model):
    _, state = writing.generate(model, None, b"a", 0)
    logits, _ = call(model, state.last[None, None], state.carry)
    p = np.asarray(jax.nn.softmax(logits[0, 0] / 0.5))
    drawn = [
        writing.generate(model, state, b"", 1, 0.5, jax.random.key(i))[0][0] for i in range(60)
    ]
    share = np.bincount(drawn, minlength=256) / 60
    top = p > np.median(p)
    deviation = (p[top].sum() * (1 - p[top].sum()) / 60) ** 0.5
    assert abs(share[top].sum() - p[top].sum()) < 4 * deviation


def test_states_of_something_else_are_refused(model, tmp_path):
    state = writing.begin(model, jax.random.key(0))
    other = state._replace(carry=tuple(leaf[:, 1:] for leaf in state.carry))
    writing.save_state(tmp_path / "other", other)
    with pytest.raises(Mistake, match=r"other holds a state of 23 features, the model has 24: "):
        writing.load_state(tmp_path / "other", model)
    (tmp_path / "broken").write_bytes(b"no state")
    with pytest.raises(Mistake, match=r"broken holds no state of a text \(\w+\): name another"):
        writing.load_state(tmp_path / "broken", model)
