"""The recipe: the models are what they claim, runs resume bitwise, mistakes are one line."""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from models import _text as texts
from models import transformer
from models._cli import INTERRUPTED, Mistake, parse
from models._train import Checkpoints
from models.transformer import Config, Run, Size, Transformer, block_sparse, dense

TINY = shlex.split(
    "--steps 6 --batch 2 --length 16 --width 32 --layers 1 --heads 2 --block 8 --density 0.25 "
    "--heldout_bytes 100 --rounds 2 --sample_length 5"
)
HOUSE = Path(__file__).parents[2]


def config(*more):
    return parse(Config, [*TINY, *more], command="it")


@pytest.fixture(scope="module")
def text():
    draw = np.random.default_rng(0).choice(np.frombuffer(b"abcde \n", np.uint8), 3000)
    return texts.Text(draw[:2500], draw[2500:], "letters")


@pytest.fixture
def words(tmp_path, text):
    path = tmp_path / "words.txt"
    path.write_bytes(text.train.tobytes())
    return path


# ------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--density 1",
        "--density 0.05 --pattern random",
        "--width 512 --heads 8 --layers 3 --block 64 --density 0.1",
        "--width 96 --heads 3 --block 16",
    ],
)
def test_parameters_are_equal_counted_whole(flags):
    c = config(*flags.split())
    sparse = transformer.wide(c)
    narrow = transformer.narrower(c, sparse)
    assert narrow.width <= c.width
    counts = [transformer.parameters(c, size) for size in (sparse, narrow)]
    assert abs(counts[1] / counts[0] - 1) < 0.02


def test_every_parameter_is_counted():
    c = config()
    model = Transformer(c, transformer.wide(c), nnx.Rngs(0))
    linears = 4 * 0.25 * 32 * 32 * 3 + 32 * (3 + 1 + 4 + 1)  # qkv, projection, up, down: 12 grids
    rest = 256 * 32 + 3 * 32 + 32 * 256 + 256  # embeddings, norms, the head and its bias
    assert transformer.parameters(c, transformer.wide(c)) == linears + rest
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == linears + rest


def test_the_sparse_model_is_sparse_in_every_layer_and_the_dense_one_nowhere():
    c = config("--layers", "2")
    sparse, full = (
        Transformer(c, Size(32, 128, linear), nnx.Rngs(0)) for linear in (block_sparse, dense)
    )
    layers = [m for _, m in nnx.iter_modules(sparse) if isinstance(m, bsjax.nnx.BlockLinear)]
    assert len(layers) == 2 * 4
    patterns = [layer.pattern.get_value() for layer in layers]
    assert {p.density for p in patterns} == {0.25}
    masks = {p.mask().tobytes() for p in patterns if p.grid == (4, 16)}
    assert len(masks) == 2  # each layer has its own
    assert not [m for _, m in nnx.iter_modules(full) if isinstance(m, bsjax.nnx.BlockLinear)]
    shapes = [(m.in_features, m.out_features) for m in layers]
    linears = [m for _, m in nnx.iter_modules(full) if isinstance(m, nnx.Linear)]
    dense_shapes = [(m.in_features, m.out_features) for m in linears]
    assert sorted(dense_shapes) == sorted([*shapes, (32, 256)])  # and the head


@pytest.mark.parametrize("linear", [block_sparse, dense])
def test_a_byte_changes_what_follows_and_nothing_before(linear):
    c = config()
    model = Transformer(c, Size(32, 128, linear), nnx.Rngs(0))
    data = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    before, after = model(data), model(data.at[:, 9].add(1))
    assert before.shape == (2, 16, 256)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    # the embedding reaches three bytes back; beyond it, attention does
    assert (jnp.abs(before - after).max((0, 2))[9:] > 1e-4).all()


def test_rotary_positions_are_relative():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))
    q, k = (transformer.rotate(jnp.tile(x, (1, 12, 1, 1)))[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T)
    for distance in range(-11, 12):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products) > 0.1


def test_equal_sizes_share_one_compilation():
    """Timing fresh models must not compile what training has compiled already."""
    first, second = (Run.start(config(), transformer.wide(config())) for _ in range(2))
    assert nnx.graphdef(first) == nnx.graphdef(second)


# ------------------------------------------------------------------------------------ the training


@pytest.fixture
def optax_promotes():
    """Adam raises a float to the power of an integer step, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def runs_of(c):
    sparse = transformer.wide(c)
    sizes = {"block-sparse": sparse, "dense": transformer.narrower(c, sparse)}
    return {name: Run.start(c, size) for name, size in sizes.items()}


def leaves(runs):
    return [np.asarray(leaf) for leaf in jax.tree.leaves([nnx.state(run) for run in runs.values()])]


@pytest.mark.usefixtures("optax_promotes")
def test_a_resumed_run_has_the_same_losses_bit_by_bit(tmp_path, text, monkeypatch, capfd):
    c = config()
    straight = runs_of(c)
    losses = transformer.train(c, text, straight, Checkpoints(tmp_path / "straight", {}))
    assert [len(losses[name]) for name in straight] == [c.steps, c.steps]
    assert all(1 < loss < 12 for name in losses for loss in losses[name])

    def interrupting(config, text, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return batch(config, text, step)

    batch = transformer.batch
    monkeypatch.setattr(transformer, "batch", interrupting)
    assert transformer.train(c, text, runs_of(c), Checkpoints(tmp_path / "cut", {})) is None
    monkeypatch.undo()
    saved = Checkpoints(tmp_path / "cut", {})
    assert saved.step() == 4  # the step under way ended
    resumed = runs_of(c)
    again = transformer.train(dataclasses.replace(c, resume=True), text, resumed, saved)
    assert again == losses
    for a, b in zip(leaves(straight), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "Going on from step 4." in capfd.readouterr().out


@pytest.mark.usefixtures("optax_promotes")
def test_both_models_learn(text, tmp_path):
    c = config("--steps", "60", "--learning_rate", "0.01")
    saved = Checkpoints(tmp_path / "c", {})
    losses = transformer.train(c, text, runs_of(c), saved)
    for of_one in losses.values():
        assert np.mean(of_one[-5:]) < math.log2(7) + 0.5 < of_one[0] - 3  # seven letters at random


@pytest.mark.usefixtures("optax_promotes")
def test_a_rate_that_is_too_high_is_said(text, tmp_path):
    c = config("--learning_rate", "1e30", "--warmup", "0")
    with pytest.raises(Mistake, match=r"^the (block-sparse|dense) model diverged.* lower --learni"):
        transformer.train(c, text, runs_of(c), Checkpoints(tmp_path / "c", {}))


# ---------------------------------------------------------------------------------- the whole thing


@pytest.mark.usefixtures("optax_promotes")
def test_the_recipe_from_flags_to_pictures(tmp_path, words, capsys):
    out = tmp_path / "out"
    flags = [*TINY, "--data", str(words), "--out", str(out)]
    assert transformer.main(flags) == 0
    printed = capsys.readouterr().out
    for part in ("block-sparse", "dense, 32 wide", "unigram", "lzma", str(out), "What the "):
        assert part in printed
    pictures = {"losses.png", "patterns.png", "speed.png"}
    made = {path.name.removeprefix("transformer-") for path in out.glob("*.png")}
    assert made == pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    models = json.loads((out / "transformer.json").read_text())["models"]
    sparse, narrow = models["block-sparse"], models["dense"]
    assert abs(sparse["parameters"] / narrow["parameters"] - 1) < 0.02
    assert sparse["stored"] == 0.25
    assert all(1 < models[name]["bits/byte"] < 9 for name in ("block-sparse", "dense", "unigram"))
    assert models["dense, 32 wide"]["bits/byte"] == "not trained"

    # of a finished run, resuming repeats the report; with another width it refuses
    with pytest.raises(Mistake, match=r"6 has --width 32, this run 64: "):
        transformer.main([*flags, "--resume", "--width", "64"])
    words.write_bytes(words.read_bytes() + b"more")
    with pytest.raises(Mistake, match=r"6 has a text with the hash \w+, this run \w+: "):
        transformer.main([*flags, "--resume"])


MISTAKES = {
    "missing": ("--data nowhere", "nowhere does not exist: check the path given with --data"),
    "resume": ("--resume", "no checkpoint in .*: start without --resume"),
    "out": ("--out words.txt", r"cannot write to words.txt \(File exists\): .* --out"),
    "length": ("--length 300", "250 bytes of held-out text are fewer than one window of 301: "),
    "width": ("--width 40 --block 16", r"--width 40 is no multiple of --block \(16\): try 32 or "),
    "heads": ("--heads 5", r"--width 32 is no multiple of 2 x --heads \(10\): try 30 or 40"),
    "density": ("--density 0", r"--density must be above 0 and at most 1, got 0\.0"),
    "nothing": ("--density 0.01", "--density 0.01 stores less than one of the 4 x 4 blocks of a "),
    "flag": ("--widht 3", "unrecognized arguments: --widht 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, words, monkeypatch):
    monkeypatch.chdir(words.parent)
    flags, message = MISTAKES[name]
    argv = [*TINY, "--data", str(words), "--out", "out", *flags.split()]
    with pytest.raises(Mistake, match=message) as caught:
        transformer.main(argv)
    assert "\n" not in str(caught.value)


def start(*flags):
    # one device, as a user has it
    command = [sys.executable, "-u", "-m", "models.transformer", *TINY, *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=HOUSE, **streams)


def test_ctrl_c_leaves_a_checkpoint_and_the_way_back(tmp_path, words):
    flags = ["--data", str(words), "--out", str(tmp_path / "out"), "--steps", "100000"]
    running = start(*flags)
    assert running.stdout
    for line in running.stdout:
        if line.startswith("training 1/"):
            os.kill(running.pid, signal.SIGINT)
            break
    out, err = running.communicate(timeout=100)
    assert running.returncode == INTERRUPTED, err
    assert "Traceback" not in err
    step = Checkpoints(tmp_path / "out" / "transformer-checkpoint", {}).step()
    assert step is not None
    assert step < 100000
    assert f"The checkpoint is in {tmp_path / 'out' / 'transformer-checkpoint'}" in out
    again = re.search(r"models\.transformer (.*)", out)
    assert again
    assert "--resume" in again[1]
    assert f"--data {words}" in again[1]


def test_a_mistake_on_the_command_line_leaves_no_traceback(tmp_path):
    failing = start("--data", str(tmp_path / "gone"), "--out", str(tmp_path))
    out, err = failing.communicate(timeout=100)
    assert failing.returncode == 2
    assert out == ""
    assert err == f"error: {tmp_path / 'gone'} does not exist: check the path given with --data\n"
