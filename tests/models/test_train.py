"""Checkpoints, Ctrl-C and progress, without a model."""

import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bsjax
import bsjax.nnx
from models import _train
from models._cli import Mistake
from models._train import Checkpoints, CtrlC, Progress, finite, output_folder

MASK = np.eye(4, dtype=bool)


def tree(seed=0, block=8):
    """A layer and its optimizer, some moments in, and a random key."""
    layer = bsjax.nnx.BlockLinear(
        4 * block, 4 * block, pattern=MASK, block=block, rngs=nnx.Rngs(seed)
    )
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    return {"run": nnx.state((layer, optimizer)), "key": jax.random.key(seed)}


def leaves(tree):
    tree = {**tree, "key": jax.random.key_data(tree["key"])}
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def checkpoints(tmp_path):
    made = []

    def make(**about):
        made.append(Checkpoints(tmp_path / "saved", about))
        return made[-1]

    yield make
    for saved in made:
        saved.close()


def test_what_was_saved_comes_back_bit_by_bit(checkpoints):
    saved, before = checkpoints(), tree(seed=1)
    saved.save(3, before, {"loss": [0.1, 1e-300]})
    saved.close()
    step, after, log = checkpoints().restore(tree(seed=2))
    assert (step, log) == (3, {"loss": [0.1, 1e-300]})
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for was, is_ in zip(leaves(before), leaves(after), strict=True):
        assert was.dtype == is_.dtype
        np.testing.assert_array_equal(was, is_)
    assert any((a != b).any() for a, b in zip(leaves(before), leaves(tree(seed=2)), strict=True))


def test_arrays_may_change_while_they_are_written(checkpoints):
    saved, array = checkpoints(), np.zeros(200_000, np.float32)
    saved.save(1, {"x": array}, None)
    array += 1
    saved.close()
    _, after, _ = checkpoints().restore({"x": array})
    assert not np.asarray(after["x"]).any()


def test_only_the_last_checkpoint_is_kept(checkpoints):
    saved = checkpoints()
    for step in (1, 2, 3):
        saved.save(step, {"x": jnp.float32(step)}, None)
    saved.close()
    assert [path.name for path in saved.folder.iterdir()] == ["3"]
    assert checkpoints().step() == 3


@pytest.mark.parametrize("step", [1, 9, 12])
def test_a_new_run_replaces_an_old_one_when_it_first_saves(checkpoints, step):
    old = checkpoints()
    old.save(9, {"x": jnp.float32(9)}, None)
    old.close()
    new = checkpoints()
    assert new.step() == 9
    new.save(step, {"x": jnp.float32(0.5)}, None)
    new.close()
    assert [path.name for path in new.folder.iterdir()] == [str(step)]
    _, after, _ = checkpoints().restore({"x": jnp.float32(0)})
    assert after["x"] == 0.5


@pytest.mark.parametrize("resumes", [False, True])
def test_a_checkpoint_is_kept_until_the_next_is_there(checkpoints, monkeypatch, resumes):
    saved = checkpoints()
    saved.save(1, {"x": jnp.float32(1)}, None)
    if resumes:
        saved.close()
        saved = checkpoints()
        saved.restore({"x": jnp.float32(0)})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(_train.ocp.CheckpointManager, "save", full)
        with pytest.raises(OSError, match="No space"):
            saved.save(2, {"x": jnp.float32(2)}, None)
    saved.close()
    assert checkpoints().step() == 1
    saved.save(3, {"x": jnp.float32(3)}, None)
    saved.close()
    assert checkpoints().step() == 3


def refused(saved, like):
    with pytest.raises(Mistake) as caught:
        saved.restore(like)
    message = str(caught.value)
    assert "\n" not in message
    assert "without --resume" in message
    return message


def test_nothing_to_resume(checkpoints, tmp_path):
    assert refused(checkpoints(), tree()).startswith(f"no checkpoint in {tmp_path / 'saved'}: ")


@pytest.fixture
def one_saved(checkpoints):
    saved = checkpoints(width=32)
    saved.save(5, tree(block=8), None)
    saved.close()
    return saved


def test_another_configuration_is_refused(one_saved, checkpoints):
    assert "5 has width 32, this run 64: " in refused(checkpoints(width=64), tree())
    assert "5 has width 32, this run None: " in refused(checkpoints(), tree())


def test_another_block_is_refused_where_every_leaf_fits(checkpoints, one_saved):
    """Grid and block are no leaves: 4 x 4 blocks of 8 x 8 fit a 4 x 4 pattern of any block."""
    like = tree()
    layer = like["run"]
    wrong = bsjax.BlockPattern.from_mask(MASK, (8, 16))
    swapped = jax.tree.map(
        lambda leaf: wrong if isinstance(leaf, bsjax.BlockPattern) else leaf,
        layer,
        is_leaf=lambda leaf: isinstance(leaf, bsjax.BlockPattern),
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(swapped)]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(layer)]
    message = refused(checkpoints(width=32), {**like, "run": swapped})
    assert "5 has pattern (grid, block) run.0.pattern" in message
    assert " [[4, 4], [8, 8]], this run [[4, 4], [8, 16]]: " in message


def test_another_shape_is_refused(checkpoints):
    saved = checkpoints()
    saved.save(1, {"x": jnp.zeros(3), "y": jnp.zeros(2)}, None)
    saved.close()
    again = checkpoints()
    message = refused(again, {"x": jnp.zeros(4), "y": jnp.zeros(2)})
    named = "has array (shape, type)"
    assert f"{named} x [[3], 'float32'], this run [[4], 'float32']: " in message
    other = {"x": jnp.zeros(3), "y": jnp.zeros(2, jnp.int32)}
    assert f"{named} y [[2], 'float32'], this run [[2], 'int32']: " in refused(again, other)
    less = {"x": jnp.zeros(3)}
    assert f"{named} y [[2], 'float32'], this run None: " in refused(again, less)
    more = {"x": jnp.zeros(3), "y": jnp.zeros(2), "z": jnp.zeros(1)}
    assert f"{named} z None, this run [[1], 'float32']: " in refused(again, more)


@pytest.mark.parametrize("damage", ["record", "arrays"])
def test_a_damaged_checkpoint_is_one_line(checkpoints, one_saved, damage):
    for path in sorted((one_saved.folder / "5" / damage).rglob("*")):
        if path.is_file() and "commit_success" not in path.name:
            path.write_bytes(b"")
    message = refused(checkpoints(width=32), tree())
    assert "5 cannot be read (" in message
    assert "another --out" in message


def test_a_record_is_json(one_saved):
    record = json.loads((one_saved.folder / "5" / "record" / "metadata").read_text())
    assert record["about"] == {"width": 32}
    assert list(record["pattern (grid, block)"].values()) == [[[4, 4], [8, 8]]]


def test_the_first_ctrl_c_asks_and_the_second_interrupts(capfd):
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_ctrl_c_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as stop:
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert not stop.asked


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))  # seconds
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Progress(10, start=2, tokens=100) as progress:
        for step in range(3, 11):
            progress.update(step, f"loss {step}")
    first, *later = capsys.readouterr().out.splitlines()
    assert first == "training 3/10 loss 3"
    assert later[0] == "training 6/10 loss 6, 25 tokens/s, 0:16 left"
    assert later[-1] == "training 10/10 loss 10, 25 tokens/s, 0:00 left"
    assert len(later) == 3


def test_progress_says_what_is_done(capsys):
    with Progress(2, tokens=1, unit="bytes", doing="reading") as progress:
        progress.update(1, "it")
    assert capsys.readouterr().out == "reading 1/2 it\n"


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    def terminal():
        return _train.Console(force_terminal=True, width=100)

    monkeypatch.setattr(_train, "console", terminal)
    with Progress(4, tokens=100) as progress:
        progress.update(1, "loss 1")
        progress.update(2, "loss 0.5")
    out = capsys.readouterr().out
    assert "loss 0.5, " in out
    assert "━" in out


def test_a_loss_that_is_no_number_ends_the_run():
    assert finite("big", jnp.float32(0.5)) == 0.5
    with pytest.raises(
        Mistake, match=r"^the big model diverged, its loss is nan: lower --learning"
    ):
        finite("big", jnp.float32(jnp.nan))


def test_output_folders(tmp_path):
    assert output_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for path, why in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(Mistake, match=rf"^cannot write to .*{path} \({why}\): .* --out$"):
            output_folder(tmp_path / path)
