"""The recipe from flags over Ctrl-C to pictures, and its mistakes: one line each."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from models import _report, transformer
from models._cli import INTERRUPTED, Mistake
from models._train import Checkpoints
from tests.models.stories import one_line
from tests.models.tiny import TINY, ctrl_c_at, optax_promotes, write_words

HOUSE = Path(__file__).parents[2]
EARLIER = '{"settings": {}, "result": {}}\n'


@pytest.fixture(scope="module")
def story(text, tmp_path_factory):
    """The recipe from flags over Ctrl-C to the pictures, and what it printed on its way."""
    folder = tmp_path_factory.mktemp("story")
    out, words = folder / "out", write_words(folder, text)
    flags = [*TINY, "--data", str(words), "--out", str(out)]
    out.mkdir()
    (out / "transformer.jsonl").write_text(EARLIER)
    with pytest.MonkeyPatch.context() as patch, optax_promotes():
        patch.setattr(_report, "DENSITIES", (0.125, 0.5))
        stopped, began = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stopped), ctrl_c_at(5):
            interrupted = transformer.main(flags)
        step = Checkpoints(out / "transformer-checkpoint", {}).step()
        again = re.search(r"models\.transformer (.*)", stopped.getvalue())
        assert again
        with contextlib.redirect_stdout(began):
            ended = transformer.main(shlex.split(again[1]))
    return types.SimpleNamespace(
        flags=flags,
        words=words,
        out=out,
        interrupted=interrupted,
        stopped=stopped.getvalue(),
        step=step,
        again=again[1],
        ended=ended,
        printed=began.getvalue(),
    )


def test_ctrl_c_leaves_a_checkpoint_and_the_way_back(story):
    assert story.interrupted == INTERRUPTED
    assert story.step == 6
    assert f"The checkpoint is in {story.out / 'transformer-checkpoint'}" in story.stopped
    assert "--resume" in story.again
    assert f"--data {story.words}" in story.again


def test_the_recipe_from_flags_to_pictures(story):
    assert story.ended == 0
    expected = ("Going on from step 6.", "block-sparse", "dense, 32 wide", "unigram", "lzma")
    for part in (*expected, str(story.out), "What the "):
        assert part in story.printed
    pictures = {"losses.png", "patterns.png", "speed.png"}
    made = {path.name.removeprefix("transformer-") for path in story.out.glob("*.png")}
    assert made == pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in story.out.glob("*.png"))
    models = json.loads((story.out / "transformer.json").read_text())["models"]
    # a line is added to those of other runs
    before, line = (story.out / "transformer.jsonl").read_text().splitlines()
    assert f"{before}\n" == EARLIER
    kept = json.loads(line)
    assert kept["result"]["models"] == models
    for name, row in models.items():
        if "ms/step" in row:
            assert np.median(kept["result"]["seconds"][name]) * 1e3 == row["ms/step"]
    assert kept["settings"]["--rounds"] == 2
    assert shlex.quote(str(story.words)) in kept["where"]["command"]
    sparse, narrow = models["block-sparse"], models["dense"]
    assert abs(sparse["parameters"] / narrow["parameters"] - 1) < 0.02
    assert sparse["stored"] == 0.25
    assert all(1 < models[name]["bits/byte"] < 9 for name in ("block-sparse", "dense", "unigram"))
    assert models["dense, 32 wide"]["bits/byte"] == "not trained"


def test_going_on_with_something_else_is_refused(story, words):
    words.write_bytes(words.read_bytes() + b"more")
    for flags, message in {
        ("--batch", "3"): r"30 has --batch 2, this run 3: ",
        ("--data", str(words)): r"30 has a text with the hash \w+, this run \w+: ",
    }.items():
        with pytest.raises(Mistake, match=message), optax_promotes():
            transformer.main([*story.flags, "--resume", *flags])


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
    with one_line(message), optax_promotes():
        transformer.main(argv)


def start(*flags):
    # one device, as a user has it
    command = [sys.executable, "-u", "-m", "models.transformer", *TINY, *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=HOUSE, **streams)


@pytest.mark.slow
def test_ctrl_c_from_another_process(tmp_path, words):
    """As above, but the program runs alone and the signal comes from outside."""
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


def test_a_mistake_on_the_command_line_leaves_no_traceback(tmp_path):
    failing = start("--data", str(tmp_path / "gone"), "--out", str(tmp_path))
    out, err = failing.communicate(timeout=100)
    assert failing.returncode == 2
    assert out == ""
    assert err == f"error: {tmp_path / 'gone'} does not exist: check the path given with --data\n"
