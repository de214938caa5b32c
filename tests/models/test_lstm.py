"""The recipe from flags over Ctrl-C to pictures and text, bitwise resumed, and its mistakes."""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import _lstm, lstm
from models import _recurrent as recurrent
from models import _streams as streams
from models._cli import INTERRUPTED, Mistake
from models._lstm import Run, Training, heldout_bits
from models._streams import Streams
from models._train import Checkpoints
from tests.helpers import tolerance
from tests.models import stories
from tests.models.lstm_runs import (
    SIZE,
    TINY,
    config,
    ctrl_c_at,
    leaves,
    letters,
    write_letters,
)
from tests.models.stories import one_line, way_back
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module

STEPS = 22  # two passes of 11 windows over 2 streams of 88 bytes


run_main = functools.partial(stories.run_main, lstm)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Interrupted in the second pass and gone on with; and the same without an interruption."""
    folder = tmp_path_factory.mktemp("story")
    path, out, straight = write_letters(folder), folder / "out", folder / "straight"
    flags = [*TINY, "--data", str(path), "--match-parameters"]
    with ctrl_c_at(13):
        interrupted, stopped = run_main([*flags, "--out", str(out)])
    step = Checkpoints(out / "lstm-checkpoint", {}).step()
    again = way_back(lstm, stopped)
    ended, printed = run_main(again)
    run_main([*flags, "--out", str(straight)])
    return types.SimpleNamespace(**{k: v for k, v in locals().items() if k != "folder"})


def test_ctrl_c_ends_after_the_step_and_tells_the_way_back(story):
    assert story.interrupted == INTERRUPTED
    assert story.step == 14
    assert f"The checkpoint is in {story.out / 'lstm-checkpoint'}" in story.stopped
    assert "--resume" in story.again
    assert "--match_parameters" in story.again


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(story):
    one, other = (
        json.loads((folder / "lstm.json").read_text()) for folder in (story.out, story.straight)
    )
    assert one["curves"] == other["curves"]
    assert len(one["curves"]["dense"]["losses"]) == STEPS
    assert [step for step, _ in one["curves"]["dense"]["valid"]] == [9, 18, STEPS]
    for name in ("small-world", "dense"):
        a, b = (recurrent.load(folder / f"lstm-{name}") for folder in (story.out, story.straight))
        for x, y in zip(leaves(nnx.state(a)), leaves(nnx.state(b)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_it_learns_and_says_what_it_found(story):
    assert story.ended == 0
    found = json.loads((story.out / "lstm.json").read_text())
    sparse, dense = found["models"]["small-world"], found["models"]["dense"]
    assert abs(sparse["parameters"] / dense["parameters"] - 1) <= 0.01
    assert sparse["width"] > dense["width"]
    assert sparse["density"] < dense["density"] == 1
    for name in ("small-world", "dense"):
        losses = found["curves"][name]["losses"]
        assert losses[0] > 6
        assert losses[-1] < 4
        assert found["models"][name]["last weights"] < 5
        assert found["models"][name]["bits/byte"] < 7
        assert f"What the {name} model writes, its likeliest bytes:" in story.printed
    assert "What the dense model writes, at temperature 0.6:" in story.printed
    for part in ("Going on from step 14.", "bytes/s", "ms/step", "unigram", "lzma"):
        assert part in story.printed
    pictures = {path.name: path.read_bytes() for path in story.out.glob("*.png")}
    assert set(pictures) == {"lstm-losses.png", "lstm-patterns.png", "lstm-mixing.png"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_the_model_on_the_disk_is_the_averaged_one_that_was_reported(story):
    c = config("--data", str(story.path), "--out", str(story.out))
    spool, held = story.out / "spool", {"valid": c.valid, "test": c.test}
    parts = _lstm.Parts(c, streams.load(c.data, spool, most=c.bytes, **held))
    found = json.loads((story.out / "lstm.json").read_text())["models"]["small-world"]
    model = recurrent.load(story.out / "lstm-small-world")
    assert heldout_bits(model, parts.test) == pytest.approx(found["bits/byte"], rel=1e-6)
    assert found["last weights"] != pytest.approx(found["bits/byte"], rel=1e-3)


def test_every_pass_begins_with_an_empty_state(tmp_path, monkeypatch):
    seen = []

    class Watched:
        model = None
        averaged = staticmethod(dict)
        tree = staticmethod(lambda: {"nothing": np.zeros(1)})
        rewind = staticmethod(lambda: seen.append("rewind"))

        def step(self, window, count):
            seen.extend(window[:, 1 : count + 1].T.tolist())
            return jnp.float32(1)

    monkeypatch.setattr(lstm, "heldout_bits", lambda *_: 1.0)
    monkeypatch.setattr(recurrent, "save", lambda *_: None)
    data = np.arange(41, dtype=np.uint8)
    parts = types.SimpleNamespace(train=Streams(data, 2, 8), valid=None)
    lstm.train(config(), parts, {"it": Watched()}, Checkpoints(tmp_path, {}))
    one_pass = [[i, 20 + i] for i in range(1, 21)]
    assert seen == ["rewind", *one_pass, "rewind", *one_pass]


def test_writing_from_the_trained_model_without_training(story, tmp_path):
    where = ["--out", str(story.out), "--temperature", "0.7"]
    state = ["--state", str(tmp_path / "state.npz")]
    _, whole = run_main([*where, "--generate", "30", "--prompt", "a b"])
    _, first = run_main([*where, *state, "--generate", "12", "--prompt", "a b"])
    _, second = run_main([*where, *state, "--generate", "18", "--prompt", ""])

    def text(printed):
        return printed.split("writes:", 1)[1].split("\nThe state is in")[0].replace("\n", "")

    assert text(whole).replace(" ", "") == (text(first) + text(second)).replace(" ", "")
    assert "a b" in text(first)
    _, other = run_main([*where, "--model", str(story.out / "lstm-dense"), "--generate", "3"])
    width = recurrent.load(story.out / "lstm-dense").size.hidden
    assert f"What a model of {width} features writes:" in other


def test_going_on_with_something_else_is_refused(story):
    flags = [*TINY, "--match-parameters", "--out", str(story.out), "--resume"]
    flags += ["--data", str(story.path)]
    with pytest.raises(Mistake, match=r"has --batch 2, this run 3: "):
        lstm.main([*flags, "--batch", "3"])


MISTAKES = {
    "block": ("--hidden 25", r"--hidden 25 is no multiple of --block \(4\): try 24 or 28"),
    "links": ("--links 6", r"--links 6 are more than a barabasi_albert graph of 6 blocks has room"),
    "ring": ("--links 3 --graph watts_strogatz", r"give at most 2, a larger --hidden or a smaller"),
    "strides": ("--graph strides --shared", r"--shared does not go with --graph strides"),
    "length": ("--length 200", r"177 bytes of training text are fewer than 2 windows of 200: "),
    "resume": ("--resume", r"no checkpoint in .*: start without --resume"),
    "generate": ("--generate 3", r"no model in .*: `python -m models.lstm` writes one to --out"),
    "text": ("--data nowhere", r"nowhere does not exist: check the path given with --data"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = MISTAKES[name]
    argv = [*TINY, "--data", str(write_letters(tmp_path)), "--out", "out", *flags.split()]
    with one_line(message):
        lstm.main(argv)


def test_diverging_ends_the_run(tmp_path, monkeypatch):
    class Wild:
        rewind = staticmethod(lambda: None)
        step = staticmethod(lambda *_: jnp.float32(jnp.nan))

    parts = types.SimpleNamespace(train=Streams(letters(100), 2, 8))
    with pytest.raises(Mistake, match=r"^the wild model diverged, its loss is nan: lower --learn"):
        lstm.train(config(), parts, {"wild": Wild}, Checkpoints(tmp_path, {}))


# ----------------------------------------------------------------------------- a step, by hand


# the shapes of the story, so that its program is used again
TRAINING = Training(STEPS, batch=2, learning_rate=0.01, warmup=0, clip=1.0, average=0.9)
# A gradient is a sum over 2 streams, 5 bytes and the features of a state. Updates by Adam are of
# the size of the rate, 0.01, not of 1: two digits are left for gradients whose terms cancel.
NEAR = tolerance(jnp.float64, 2 * 5 * SIZE.hidden)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def steps():
    """Two steps by the recipe, and by optax and plain autodiff over the same windows. In float64:
    Adam divides by gradients, however small they are."""
    with jax.enable_x64(True):
        return two_steps()


def two_steps():
    run = Run.start(SIZE._replace(dtype="float64"), TRAINING, 0)
    double = lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a  # noqa: E731
    run.update(jax.tree.map(double, run.tree()))
    graph, parameters, rest = nnx.split(run.model, nnx.Param, ...)
    parameters = jax.tree.map(jnp.copy, parameters)
    rate = optax.cosine_decay_schedule(float(np.float32(0.01)), STEPS, 1 / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.999))
    moments, average = tx.init(parameters), parameters
    carry = jax.tree.map(jnp.copy, run.carry)
    rest = jax.tree.map(jnp.copy, rest)

    def loss(parameters, carry, window):
        logits, carry = nnx.merge(graph, parameters, rest)(window[:, :-1], carry)
        p = jax.nn.softmax(logits)
        bits = -jnp.log2(jnp.take_along_axis(p, window[:, 1:, None], 2))[..., 0]
        return bits[:, :5].mean(), carry  # five of the eight are in the pass

    @jax.jit
    def expected(parameters, moments, average, carry, window, share):
        (value, carry), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, carry, window)
        updates, moments = tx.update(gradient, moments, parameters)
        parameters = optax.apply_updates(parameters, updates)
        average = jax.tree.map(lambda a, b: share * a + (1 - share) * b, parameters, average)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
        return parameters, moments, average, carry, value, norm

    losses = []
    for i in range(2):
        window = np.random.default_rng(i).integers(97, 101, (2, 9)).astype(np.int32)
        own, share = run.step(window, 5), max(1 - np.float32(0.9), np.float32(9 / (10 + i)))
        parameters, moments, average, carry, value, norm = expected(
            parameters, moments, average, carry, window, share
        )
        losses.append((own, value))
        assert norm > 1  # or nothing would be clipped
    return types.SimpleNamespace(run=run, losses=losses, parameters=parameters, average=average)


@pytest.mark.usefixtures("x64")
def test_a_step_is_clipped_adam_on_the_bytes_in_the_pass(steps):
    for own, expected in steps.losses:
        assert own.dtype == jnp.float64
        np.testing.assert_allclose(own, expected, **NEAR)
    found = nnx.state(steps.run.model, nnx.Param)
    for a, b in zip(leaves(found), leaves(steps.parameters), strict=True):
        np.testing.assert_allclose(a, b, **NEAR)


@pytest.mark.usefixtures("x64")
def test_the_averaged_model_has_the_averaged_parameters(steps):
    model = steps.run.averaged()
    found = leaves(nnx.state(model, nnx.Param))
    for a, b in zip(found, leaves(steps.average), strict=True):
        np.testing.assert_allclose(a, b, **NEAR)
    now = leaves(nnx.state(steps.run.model, nnx.Param))
    assert any((a != b).any() for a, b in zip(found, now, strict=True))
    assert steps.run.model.rnn.cell.dropout.deterministic is False  # the original still trains


@pytest.mark.usefixtures("x64")
def test_heldout_bits_are_those_of_a_walk_byte_by_byte(steps):
    """One stream is read as a whole; of two, the second begins with the window before it."""
    model, data = steps.run.averaged(), letters(50, seed=3)
    logits = nnx.jit(lambda model, data: model(data, model.initial_carry(1))[0])

    def bits(text):
        p = jax.nn.softmax(logits(model, jnp.asarray(text[None, :-1], jnp.int32)))[0]
        return -np.log2(np.asarray(p)[np.arange(len(text) - 1), text[1:]])

    alone = heldout_bits(model, Streams(data, 1, 8))
    np.testing.assert_allclose(alone, bits(data).mean(), **NEAR)
    span = 49 // 2
    # the second stream's bytes 24 .. 48, its state from byte 16 on
    second = bits(data[span - 8 : 2 * span + 1])[8:]
    expected = np.concatenate([bits(data[: span + 1]), second]).mean()
    np.testing.assert_allclose(heldout_bits(model, Streams(data, 2, 8)), expected, **NEAR)


def test_one_program_trains_with_every_seed_and_rate():
    window, compiled = np.zeros((2, 9), np.int32), set()
    for seed, rate in ((0, 0.01), (1, 0.02), (2, 0.003)):
        run = Run.start(SIZE, TRAINING._replace(learning_rate=rate), seed)
        assert math.isfinite(run.step(window, 8))
        compiled.add(_lstm.train_step.jitted_fn._cache_size())
    assert len(compiled) == 1
