"""The width sweep: its programs do what a plain loop does, and its results are kept and told."""

import json
import shlex
import signal
import types
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from models import _text as texts
from models import transformer, widths
from models._cli import INTERRUPTED
from models._language import bits
from models._train import is_matrix
from models._widths import Kind, compiled, make, parameters, program
from tests.models.stories import one_line
from tests.models.sweep import DENSE, SAMPLED, TINY, config, equations
from tests.models.tiny import write_words


@pytest.fixture(scope="module", autouse=True)
def optax_promotes():
    """Not by a context, as elsewhere: it would not hold in the threads that compile."""
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


# ------------------------------------------------------------------------------------ the programs


@pytest.fixture(scope="module")
def words(text, tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"), text)


@pytest.fixture(scope="module")
def data(words):
    return widths.arrays(config(), texts.load((words,), 17))


@pytest.fixture(scope="module")
def programs(data):
    """They depend neither on the learning rates nor on what else a config says of the sweep."""
    return {kind: compiled(config(), kind, data) for kind in (DENSE, SAMPLED)}


@pytest.fixture(scope="module")
def results(programs, data):
    """Of both kinds, at two learning rates side by side."""
    rates, seeds = jnp.array([0.02, 0.01]), jnp.array([0, 0], jnp.int32)
    return {kind: run(rates, seeds, *data) for kind, run in programs.items()}


def test_a_program_is_the_plain_loop(results, data):
    """Blocks one by one, steps one by one, the rate in the optimizer, windows one by one."""
    c = config()
    train, validation, heldout = data
    state = jax.jit(lambda: nnx.state(make(c, DENSE, 0), nnx.Param))()
    shape = transformer.Config(layers=c.layers, heads=2)
    size = transformer.Size(16, 64, transformer.dense)
    model = nnx.eval_shape(lambda: transformer.Transformer(shape, size, nnx.Rngs(0)))
    for name in ("embeddings", "norm", "head"):
        nnx.update(getattr(model, name), state[name])
    for i, block in enumerate(model.blocks):
        nnx.update(block, jax.tree.map(lambda a, i=i: a[i], state["blocks"][0]["block"]))
    tx = transformer.adam(0.01, c.warmup, c.steps, c.weight_decay)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for step in range(c.steps):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2), step)
        starts = jax.random.randint(key, (c.batch, 1), 0, len(train) - c.length)[:, 0]
        batch = jnp.stack([train[s : s + c.length + 1] for s in starts]).astype(jnp.int32)
        losses.append(transformer.train_step(model, optimizer, batch))
    late = nnx.jit(lambda model, data: bits(model, data)[:, c.length // 2 :].mean())
    expected = [losses[-1], *(np.mean([late(model, d) for d in w]) for w in (validation, heldout))]
    found = [float(values[1]) for values in results[DENSE][:3]]
    # bits of some 6, of sums of at most 64 in another order through two layers, and Adam divides
    # by the size of a gradient: what is small may change by as much as its rate
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-4)
    assert abs(float(results[DENSE].heldout[0]) - found[2]) > 1e-3  # the other rate


def test_exact_measurements_sample_nothing(programs, data):
    """At a rate of 0 both kinds keep the weights that they share."""
    still = {kind: run(jnp.zeros(2), jnp.arange(2), *data) for kind, run in programs.items()}
    for name in ("validation", "heldout"):
        dense, sampled = (getattr(still[kind], name) for kind in (DENSE, SAMPLED))
        np.testing.assert_allclose(dense, sampled, rtol=1e-6)
    assert (jnp.abs(still[SAMPLED].training - still[DENSE].training) > 1e-3).all()
    assert abs(float(still[DENSE].heldout[0] - still[DENSE].heldout[1])) > 1e-3  # the other seed


def test_only_a_sampled_model_is_measured_twice(results):
    np.testing.assert_array_equal(results[DENSE].heldout, results[DENSE].heldout_sampled)
    assert (jnp.abs(results[SAMPLED].heldout - results[SAMPLED].heldout_sampled) > 1e-3).all()
    assert (jnp.abs(results[SAMPLED].heldout - results[DENSE].heldout) > 1e-3).all()
    assert all(jnp.isfinite(values).all() for values in results[SAMPLED])


@pytest.fixture(scope="module")
def sampled():
    return make(config(), SAMPLED, 0)


def test_all_linears_but_the_classifier_are_sampled(sampled):
    kinds = {str(path[-1]): type(part) for path, part in nnx.iter_modules(sampled) if path}
    for name in ("qkv", "projection", "up", "down"):
        assert kinds[name] is bsjax.nnx.SampledLinear
    assert kinds["head"] is nnx.Linear
    layer = sampled.blocks[0].block.up
    assert (layer.fraction, layer.block, layer.policy) == (0.5, 4, "forward")


def test_both_kinds_begin_with_the_same_weights(sampled):
    state = nnx.state(make(config(), DENSE, 0), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, state, nnx.state(sampled, nnx.Param))
    first, second = state["blocks"][0]["block"]["up"]["kernel"][...]
    assert jnp.abs(first - second).max() > 0.01  # each layer has its own


def test_every_layer_and_every_call_draws_its_own_sample(sampled):
    key, *_ = jax.tree.leaves(nnx.state(sampled, nnx.RngKey))
    assert len({tuple(one) for one in jax.random.key_data(key).tolist()}) == config().layers
    call = nnx.jit(lambda model, data: model(data))
    first, second = (call(sampled, jnp.zeros((1, 16), jnp.int32)) for _ in range(2))
    assert jnp.abs(first - second).max() > 1e-3


def test_what_is_computed_in_bfloat16(data):
    c = config("--dtype", "bfloat16")
    jaxpr = jax.make_jaxpr(program(c, SAMPLED))(jnp.float32(0.01), jnp.int32(0), *data)
    dots = [e for e, _ in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    narrow = [e for e in dots if e.invars[0].aval.dtype == e.invars[1].aval.dtype == jnp.bfloat16]
    assert narrow  # attention, and exact layers while the model is measured
    head = [e for e in dots if e.outvars[0].aval.shape == (c.batch, c.length, 256)]
    assert head
    assert all(v.aval.dtype == jnp.float32 for e in head for v in e.invars)


def test_weights_decay_but_no_biases_and_gains(sampled):
    single = nnx.eval_shape(
        lambda: transformer.Transformer(
            transformer.Config(), transformer.wide(transformer.Config()), nnx.Rngs(0)
        )
    )
    state = nnx.state(single, nnx.Param)
    by_name = jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), state)
    assert jax.tree.leaves(by_name) == [leaf.ndim > 1 for leaf in jax.tree.leaves(state)]
    state = nnx.state(sampled.blocks[0].block, nnx.Param)
    by_name = jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), state)
    assert jax.tree.leaves(by_name) == [leaf.ndim > 2 for leaf in jax.tree.leaves(state)]


# ------------------------------------------------------------------------------------ the recipe


@pytest.fixture(scope="module")
def story(words, programs, tmp_path_factory):
    """Begun with one learning rate, then resumed with both, and once more."""
    folder = tmp_path_factory.mktemp("story")
    flags = [*TINY, "--data", str(words), "--out", str(folder), "--commit", "abc"]
    asked, seen = [], []

    def compiled_before(_, kind, __):
        asked.append(kind)
        return programs[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "compiled", compiled_before)
        for more in (["--learning_rates", "0.01"], ["--resume"], ["--resume"]):
            code = widths.main([*flags, *more])
            seen.append((code, len(asked), (folder / "widths.jsonl").read_text()))
    return types.SimpleNamespace(folder=folder, flags=flags, seen=seen)


def test_a_resumed_sweep_trains_what_is_missing(story):
    assert [code for code, _, _ in story.seen] == [0, 0, 0]
    assert [asked for _, asked, _ in story.seen] == [2, 4, 4]
    first, second, third = (lines for _, _, lines in story.seen)
    assert second.startswith(first)
    assert third == second
    runs = [json.loads(line) for line in second.splitlines()]
    names = ("learning_rate", "width", "fraction", "seed")
    found = [tuple(run["settings"][name] for name in names) for run in runs]
    assert found == [(rate, 16, f, 0) for rate in (0.01, 0.02) for f in (None, 0.5)]


def test_what_is_trained_alone_is_what_is_trained_beside_others(story, results):
    """A call for one run fills up its places with copies."""
    runs = [json.loads(line) for line in story.seen[-1][2].splitlines()]
    for run in runs:
        side = (0.02, 0.01).index(run["settings"]["learning_rate"])
        of_kind = results[Kind(16, run["settings"]["fraction"])]
        for name, values in of_kind._asdict().items():
            assert run["result"][name] == float(values[side])


def test_a_record_says_what_made_it(story):
    record = json.loads(story.seen[-1][2].splitlines()[-1])
    where, result = record["where"], record["result"]
    assert "-m models.widths --data" in where["command"]
    assert (where["commit"], where["jax"]) == ("abc", jax.__version__)
    assert {"flax", "numpy", "device"} <= {*where}
    assert record["settings"]["--length"] == 16
    step = widths.spent(config(), SAMPLED)
    assert (result["flops"], result["flops_per_step"]) == (2 * step.total, step._asdict())
    assert result["parameters"] == parameters(config(), SAMPLED)
    assert 5 < result["heldout"] < 10
    assert result["seconds"] > 0


def test_pictures_are_written(story):
    made = {path.name: path.read_bytes()[:4] for path in story.folder.glob("*.png")}
    assert made == {"widths-loss.png": b"\x89PNG", "widths-flops.png": b"\x89PNG"}


@pytest.mark.parametrize(
    ("flags", "left"), [("", 0), ("--steps 3", 4), ("--seeds 2", 4), ("--widths 16 32", 4)]
)
def test_results_are_of_their_settings(story, flags, left, capsys, monkeypatch):
    def stopped(_, __, runs):
        assert sum(map(len, runs.values())) == left
        raise KeyboardInterrupt

    monkeypatch.setattr(widths, "sweep", stopped)
    with pytest.raises(KeyboardInterrupt):
        widths.main([*story.flags, "--resume", *flags.split()])
    assert ("runs are in" in capsys.readouterr().out) == (flags != "--steps 3")


def test_ctrl_c_says_how_to_go_on(words, programs, tmp_path, monkeypatch, capsys):
    def interrupted(_, kind, __):
        signal.raise_signal(signal.SIGINT)
        return programs[kind]

    monkeypatch.setattr(widths, "compiled", interrupted)
    # a signal reaches the main thread only
    monkeypatch.setattr(widths, "in_advance", lambda tasks, _: nullcontext(t() for t in tasks))
    code = widths.main([*TINY, "--data", str(words), "--out", str(tmp_path)])
    assert code == INTERRUPTED
    again = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "--resume" in again
    assert len((tmp_path / "widths.jsonl").read_text().splitlines()) == 1


MISTAKES = {
    "width": ("--widths 16 20", r"--widths 20 is no multiple of --head \(8\): try 16 or 24"),
    "block": ("--block 3", r"--widths 16 is no multiple of --block \(3\): try 15 or 18"),
    "head": ("--head 3", r"--head 3 is no multiple of .* \(2\): try 2 or 4"),
    "fraction": ("--fractions 0.5 1", r"--fractions must be above 0 and at most 0\.9, got 1\.0"),
    "rate": ("--learning_rates 0", r"--learning_rates must be above 0, got 0\.0"),
    "batch": ("--batch 200", "bytes to measure on are too few for 200 windows of 17: give more "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, words, tmp_path):
    flags, message = MISTAKES[name]
    argv = [*TINY, "--data", str(words), "--out", str(tmp_path), *flags.split()]
    with one_line(message):
        widths.main(argv)
