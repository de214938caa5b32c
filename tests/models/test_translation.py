"""The recipe from flags over Ctrl-C to BLEU and pictures, bitwise resumed, and its mistakes."""

import functools
import json
import types

import jax
import numpy as np
import pytest
from sacrebleu import corpus_bleu

from models import _translation_bench as bench
from models import _translation_report as reporting
from models import translation
from models._cli import INTERRUPTED, Mistake, parse
from models._train import Checkpoints
from models._translation_train import Run
from tests.models import stories
from tests.models.stories import ctrl_c_at, one_line, way_back
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module
from tests.models.translation_runs import TINY, write_pairs

run_main = functools.partial(stories.run_main, translation)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Interrupted in step 3 of 6 and gone on with; and the same without an interruption."""
    folder = tmp_path_factory.mktemp("story")
    out, straight = folder / "out", folder / "straight"
    flags = [*TINY, *write_pairs(folder)]
    with ctrl_c_at(3, Run, "step"):
        interrupted, stopped = run_main([*flags, "--out", str(out)])
    (checkpoint,) = out.glob("translation-checkpoint-*")
    step = Checkpoints(checkpoint, {}).step()
    again = way_back(translation, stopped)
    ended, printed = run_main(again)
    run_main([*flags, "--out", str(straight)])
    return types.SimpleNamespace(**{k: v for k, v in locals().items() if k != "folder"})


def result(folder):
    (line,) = (folder / "translation.jsonl").read_text().splitlines()
    return json.loads(line)


def test_ctrl_c_ends_after_the_step_and_tells_the_way_back(story):
    assert story.interrupted == INTERRUPTED
    assert story.step == 3
    assert "--resume" in story.again
    assert "dense: going on from step 3." in story.printed


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(story):
    one, other = result(story.out), result(story.straight)
    assert one["settings"] == other["settings"]
    for name, found in one["result"].items():
        if "seconds" not in name:
            assert found == other["result"][name]
    saved = []
    for folder in (story.out, story.straight):
        (checkpoint,) = folder.glob("translation-checkpoint-*")
        settings = one["settings"]
        config = parse(translation.Config, story.flags, command="it")
        run = Run.start(
            translation.Size(**settings["size"]), config.training(0.01), settings["seed"]
        )
        saved.append(Checkpoints(checkpoint, settings).restore(run.tree())[1]["average"])
    jax.tree.map(np.testing.assert_array_equal, *saved)


def test_it_says_what_it_found(story):
    assert story.ended == 0
    record = result(story.out)
    assert {"command", "commit", "jax", "flax", "sacrebleu", "sentencepiece", "device"} <= set(
        record["where"]
    )
    assert record["settings"]["size"]["width"] == 16
    found = record["result"]
    assert [step for step, _ in found["valid curve"]] == [3, 6]
    assert found["valid curve"][1][1] < found["valid curve"][0][1]
    for part in ("tok:13a", "BLEU beam", "Sentence 1", "reference", found["signature"]):
        assert part in story.printed
    lines = (story.out / "translation-dense.txt").read_text().splitlines()
    assert len(lines) == 24
    picture = (story.out / "translation-curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert json.loads((story.out / "translation.json").read_text())["models"]["dense"]


def test_what_is_known_is_not_trained_again(story, monkeypatch):
    monkeypatch.setattr(Run, "start", None)
    code, printed = run_main([*story.flags, "--out", str(story.out), "--resume"])
    assert code == 0
    assert f"dense, seed 0: in {story.out / 'translation.jsonl'} already" in printed


def test_translating_a_file_with_the_trained_model(story, tmp_path):
    """The test set again: the lines that BLEU was computed of."""
    out, (test, _) = ["--out", str(story.out)], story.flags[-2:]
    code, printed = run_main([*story.flags, *out, "--translate", test])
    assert code == 0
    written = (story.out / "translation-dense.txt").read_text().splitlines()
    assert printed.splitlines()[-24:] == written
    with pytest.raises(Mistake, match=r"no model in .*: give the flags that it was trained with"):
        run_main([*story.flags, *out, "--translate", test, "--width", "24"])


def test_going_on_with_another_model_starts_that_one(story):
    settings = result(story.out)["settings"]
    config = parse(translation.Config, [*story.flags, "--width", "24"], command="it")
    data = types.SimpleNamespace(about={})
    other = bench.Bench(config, data, None, {}).settings(
        bench.Task("dense", config.size(259), 0.01, 0)
    )
    assert other["size"]["width"] == 24
    assert {*other} <= {*settings}
    assert other["training"] == settings["training"]


# ------------------------------------------------------------------------------- comparisons


class Pretended:
    """Results that the kind, the rate and the seed decide, and no model."""

    def __init__(self):
        self.made = []

    def trained(self, bench, task, settings, stop):
        self.made.append(task)
        worse = task.size.density < 1
        bleu = 25.0 - 2 * worse - task.seed
        return {
            "name": task.name, "parameters": 1000, "FLOPs": 10**9, "test": 2.0,
            "valid": 2.0 + abs(task.learning_rate - (0.01 if worse else 0.02)),
            "valid curve": [[3, 2.5], [6, 2.0]], "loss curve": [[6, 2.0]], "seconds": 2.0,
            "processor seconds": 1.0, "BLEU greedy": bleu - 1, "BLEU beam": bleu,
            "signature": "it", "examples": ["x"],
        }  # fmt: skip


COMPARE = [*TINY, "--compare", "--density", "0.5", "--fraction", "0.5", "--width", "32"]
COMPARE += ["--hidden", "64", "--learning_rates", "0.01", "0.02", "--seeds", "2"]


def test_a_comparison_chooses_rates_on_validation_text_and_keeps_every_run(tmp_path, monkeypatch):
    pretended = Pretended()
    monkeypatch.setattr(bench.Bench, "_trained", lambda *args: pretended.trained(*args))
    flags = [*COMPARE, *write_pairs(tmp_path), "--out", str(tmp_path / "out")]
    code, printed = run_main(flags)
    assert code == 0
    made = {}
    for task in pretended.made:
        made.setdefault(task.name, []).append((task.learning_rate, task.seed))
    assert next(iter(made)) == "dense"
    assert {name.split(",")[0] for name in made} == {"dense", "block-sparse", "sampled"}
    for name, runs in made.items():
        best = 0.01 if "sparse" in name else 0.02
        assert runs == [(0.01, 0), (0.02, 0), (best, 1)]
    assert "(0.71)" in printed  # the deviation of 25 and 24
    assert "below 20" not in printed
    count = len(pretended.made)
    assert len((tmp_path / "out" / "translation.jsonl").read_text().splitlines()) == count
    run_main([*flags, "--resume", "--kinds", "sampled"])
    assert len(pretended.made) == count


def test_no_order_is_claimed_below_20_bleu(tmp_path, capsys):
    one = Pretended().trained(
        None, bench.Task("a", types.SimpleNamespace(density=1), 0.02, 6), {}, None
    )  # fmt: skip
    one |= {"width": 8, "hidden": 8, "rate": 0.1}
    pairs = translation.texts.Pairs(["s"], ["r"])
    corpus = translation.texts.Corpus(pairs, pairs, pairs, "it")
    config = types.SimpleNamespace(out=tmp_path)
    reporting.report(config, corpus, {"a": [one], "b": [one]}, {})
    assert "the lowest BLEU is 19.00: below 20 models have not learnt enough" in (
        " ".join(capsys.readouterr().out.split())
    )


def test_bleu_is_that_of_sacrebleu_with_its_signature():
    written, references = ["the cat sat on a mat ."], ["the cat sat on the mat ."]
    score, signature = reporting.bleu(written, references)
    assert score == corpus_bleu(written, [references]).score
    assert "tok:13a" in signature
    assert reporting.bleu(references, references)[0] == pytest.approx(
        100,
        abs=400 * np.finfo(float).eps,  # of the logarithms of four precisions
    )


# ---------------------------------------------------------------------------------- mistakes


MISTAKES = {
    "heads": ("--heads 3", r"--width 16 is no multiple of twice --heads \(6\): try 12 or 18"),
    "block": ("--density 0.5 --block 5", r"--width 16 is no multiple of --block \(5\): try 15"),
    "sample": ("--fraction 0.5 --sample_block 5", r"--width 16 is no multiple of --sample_block"),
    "both": ("--density 0.5 --fraction 0.5", r"below 1, but layers that store some blocks are not"),
    "kinds": ("--compare --kinds thin", r"--kinds thin: choose from dense, block-sparse, sampled"),
    "compare": ("--compare --density 0.5", r"sampled share from --fraction: give both below 1, f"),
    "longest": ("--longest 4 --train {long} {long}", r"all 2 pairs to train on are empty or"),
    "one file": ("--test {long}", r"--test names 1 files: with files, --train, --valid and --test"),
    "missing": ("--test {long} nowhere", r"nowhere is no file: check the paths given"),
    "vocabulary": ("--tokens sentencepiece --vocabulary 300 --train {wide} {wide}",
                   r"sentencepiece cannot make --vocabulary 300 of this text"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, tmp_path):
    flags, message = MISTAKES[name]
    files = {"long": tmp_path / "long", "wide": tmp_path / "wide"}
    files["long"].write_text("abcdefgh\nabcdefghi\n")
    files["wide"].write_text("".join(f"{chr(0x4E00 + i)}\n" for i in range(2000)))
    argv = [*TINY, *write_pairs(tmp_path), "--out", str(tmp_path / "out")]
    argv += [word.format(**files) for word in flags.split()]
    with one_line(message):
        run_main(argv)


def test_diverging_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "step", lambda *_: np.float32(np.nan))
    with pytest.raises(Mistake, match=r"^the dense model diverged, its loss is nan: lower --learn"):
        run_main([*TINY, *write_pairs(tmp_path), "--out", str(tmp_path / "out")])
