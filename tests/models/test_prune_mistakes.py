"""What pruning refuses: one line each, that says what to do."""

import json
import shlex

import numpy as np
import pytest

from models import _decoders, prune
from models._cli import Mistake
from tests.models import gpt2 as files
from tests.models import test_bpe as bpe
from tests.models.prune_runs import TINY, run_main
from tests.models.stories import one_line
from tests.models.tiny import write_words


@pytest.fixture
def folder(tmp_path, text, monkeypatch):
    """Words, a GPT-2 and tokens, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path, text)
    files.write(tmp_path / "model", files.tensors(layers=1))
    np.save("ids.npy", np.arange(400) % 37)
    np.save("large.npy", np.arange(400) % 38)
    np.save("square.npy", np.ones((20, 20), int))
    np.save("few.npy", np.arange(30))
    (tmp_path / "ids.txt").write_text("1 2 3")
    bpe.write(tmp_path, bpe.vocabulary(), bpe.MERGES)
    return tmp_path


GPT2 = "--model model --tokens ids.npy"
MISTAKES = {
    "density": ("--densities 0", r"--densities must be above 0 and at most 1, got 0\.0"),
    "scope": ("--scope all", r"argument --scope: invalid choice: 'all' \(choose from"),
    "width": ("--width 18 --heads 4", r"--width 18 is no multiple of 2 x --heads \(8\): try 16 or"),
    "model": ("--model nowhere", "nowhere does not exist: check the path given with --model"),
    "text": ("--model words.txt", "words.txt is no safetensors file"),
    "length": (f"{GPT2} --length 21", "--length 21 is more than the 20 positions of the model"),
    "bytes": ("--model model", "a vocabulary of 37 tokens, so bytes do not fit it: give --tokens"),
    "block": (f"{GPT2} --block 25", r"--block 25 is larger than a side of the layer layers\.0\."),
    "large": (
        "--model model --tokens large.npy",
        "large.npy has ids from 0 to 37, the model a vocabulary of 37: use the tokenizer",
    ),
    "square": ("--model model --tokens square.npy", r"holds int64 numbers of shape \(20, 20\)"),
    "few": ("--model model --tokens few.npy", "3 held-out tokens are fewer than one window of 17"),
    "txt": ("--model model --tokens ids.txt", "--tokens ids.txt must end in .npy or .bin"),
    "missing": ("--model model --tokens no.npy", "no.npy has no tokens to read"),
    "both": (f"{GPT2} --data words.txt", "--tokens are the text already: leave --data and"),
    "three": (f"{GPT2} ids.npy ids.npy", "--tokens has 3 files: give one, or one to train on and"),
    "tokenizer": ("--model model --tokenizer model", "no tokenizer in model .*: name a folder"),
    "vocabulary": ("--model model --tokenizer .", "has ids from .* the model a vocabulary of 37"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, folder):
    flags, message = MISTAKES[name]
    data = [] if "--tokens" in flags and "--data" not in flags else ["--data", "words.txt"]
    argv = [*TINY, *data, "--out", "out", *shlex.split(flags)]
    with one_line(message):
        run_main(argv)


def test_a_block_that_is_too_large_is_told_before_training(folder, monkeypatch):
    monkeypatch.setattr(prune, "fit", None)
    with pytest.raises(Mistake, match=r"^--block 40 is larger than a side of the layer"):
        run_main([*TINY, "--data", "words.txt", "--out", "out", "--block", "40"])


def test_a_saved_file_that_was_changed_says_so(tmp_path):
    model = _decoders.start({"layers": 1, "heads": 2}, 8)
    _decoders.save(tmp_path / "a.safetensors", model)
    tensors = files.tensors(layers=1)
    for said, message in {
        "{}": r"a.safetensors does not say what it holds \(KeyError\): it was made by another",
        json.dumps({"kind": "transformer", "about": model.about, "patterns": {}}): (
            r"a.safetensors lacks .* and has unknown .*: it does not hold what it says"
        ),
    }.items():
        _decoders._tensors.write(tmp_path / "a.safetensors", tensors, {"bsjax": said})
        with pytest.raises(Mistake, match=message):
            _decoders.load(tmp_path / "a.safetensors")
