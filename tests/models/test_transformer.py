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
from models import _report, transformer
from models import _text as texts
from models._cli import INTERRUPTED, Mistake, parse
from models._train import Checkpoints
from models.transformer import Config, Run, Size, Transformer, block_sparse, dense

TINY = shlex.split(
    "--steps 30 --learning_rate 0.02 --batch 2 --length 16 --width 32 --layers 1 --heads 2 "
    "--block 8 --density 0.25 --heldout_bytes 100 --rounds 2 --sample_length 5"
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


@pytest.fixture(scope="module")
def models():
    """One of each kind, equally wide."""
    c = config()
    return {
        make: Transformer(c, Size(32, 128, make), nnx.Rngs(0)) for make in (block_sparse, dense)
    }


def found(model, kind):
    return [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, kind)]


def test_every_parameter_is_counted(models):
    linears = 4 * 0.25 * 32 * 32 * 3 + 32 * (3 + 1 + 4 + 1)  # qkv, projection, up, down: 12 grids
    rest = 256 * 32 + 3 * 32 + 32 * 256 + 256  # embeddings, norms, the head and its bias
    assert transformer.parameters(config(), transformer.wide(config())) == linears + rest
    leaves = jax.tree.leaves(nnx.state(models[block_sparse], nnx.Param))
    assert sum(leaf.size for leaf in leaves) == linears + rest


def test_one_model_is_sparse_in_every_layer_and_the_other_nowhere(models):
    sparse, full = models[block_sparse], models[dense]
    layers = found(sparse, bsjax.nnx.BlockLinear)
    assert [layer.pattern.get_value().density for layer in layers] == [0.25] * 4
    assert not found(full, bsjax.nnx.BlockLinear)
    head = (32, 256)
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    others = [(layer.in_features, layer.out_features) for layer in found(full, nnx.Linear)]
    assert sorted([*shapes, head]) == sorted(others)


def test_each_layer_has_a_pattern_of_its_own_and_the_seed_decides():
    def masks(*flags):
        linear = block_sparse(config(*flags), nnx.Rngs(0))
        return [linear(64, 64).pattern.get_value().mask().tolist() for _ in range(3)]

    first, second, third = masks()
    assert first != second != third != first
    assert masks() == [first, second, third]
    assert masks("--seed", "1") != [first, second, third]


@pytest.mark.parametrize("linear", [block_sparse, dense])
def test_a_byte_changes_what_follows_and_nothing_before(models, linear):
    data = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    before, after = (jax.jit(models[linear])(d) for d in (data, data.at[:, 9].add(1)))
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


def test_equal_sizes_share_one_compilation(straight):
    """Timing fresh models must not compile what training has compiled already."""
    for name, run in runs_of(config()).items():
        assert nnx.graphdef(run) == nnx.graphdef(straight[0][name])


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


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """(runs, losses) without an interruption."""
    runs = runs_of(config())
    saved = Checkpoints(tmp_path_factory.mktemp("straight"), {})
    with jax.numpy_dtype_promotion("standard"):
        return runs, transformer.train(config(), text, runs, saved)


def test_both_models_learn(straight):
    _, losses = straight
    assert [len(of_one) for of_one in losses.values()] == [config().steps] * 2
    for of_one in losses.values():
        assert of_one[0] > 6
        assert np.mean(of_one[-4:]) < math.log2(7) + 0.6  # seven letters, at random


@pytest.mark.usefixtures("optax_promotes")
def test_a_resumed_run_has_the_same_losses_bit_by_bit(straight, tmp_path, text, monkeypatch, capfd):
    def interrupting(config, text, step):
        if step == 11:
            signal.raise_signal(signal.SIGINT)
        return batch(config, text, step)

    c, batch = config(), transformer.batch
    monkeypatch.setattr(transformer, "batch", interrupting)
    assert transformer.train(c, text, runs_of(c), Checkpoints(tmp_path, {})) is None
    monkeypatch.undo()
    saved = Checkpoints(tmp_path, {})
    assert saved.step() == 12  # the step under way ended
    resumed = runs_of(c)
    losses = transformer.train(dataclasses.replace(c, resume=True), text, resumed, saved)
    assert losses == straight[1]
    for a, b in zip(leaves(straight[0]), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "Going on from step 12." in capfd.readouterr().out


def test_a_model_that_diverges_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "train_step", lambda *_: jnp.float32(jnp.nan))
    with pytest.raises(Mistake, match=r"^the block-sparse model diverged.*: lower --learning_rate"):
        transformer.train(config(), text, runs_of(config()), Checkpoints(tmp_path, {}))


# ---------------------------------------------------------------------------------- the whole thing


@pytest.mark.usefixtures("optax_promotes")
def test_the_recipe_from_flags_to_pictures(tmp_path, words, capsys, monkeypatch):
    monkeypatch.setattr(_report, "DENSITIES", (0.125, 0.5))
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
    with pytest.raises(Mistake, match=r"30 has --width 32, this run 64: "):
        transformer.main([*flags, "--resume", "--width", "64"])
    words.write_bytes(words.read_bytes() + b"more")
    with pytest.raises(Mistake, match=r"30 has a text with the hash \w+, this run \w+: "):
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
