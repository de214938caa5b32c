"""The digits recipe: what it compares, and a run from Ctrl-C to the picture."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import signal
import types

import jax
import numpy as np
import pytest

from models import _images as images
from models import _mlp as net
from models import _mlp_methods as methods
from models import _runs, mlp
from models._cli import INTERRUPTED
from models._mlp_methods import Method
from tests.models.idx import write_mnist
from tests.models.stories import one_line

TINY = shlex.split(
    "--width 32 --layers 1 --epochs 2 --batch 10 --seeds 2 --learning_rate 0.01 --fraction 0.5"
)


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Programs are compiled in threads, which a context manager does not reach."""
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """What is compiled alike in several tests."""
    compile_programs, there = net.compile_programs, {}

    def kept(method, training, width, *arrays):
        key = method, training, width, str(jax.tree.map(jax.typeof, arrays))
        if key not in there:
            there[key] = compile_programs(method, training, width, *arrays)
        return there[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "compile_programs", kept)
        yield


# -------------------------------------------------------------------------------------- the cases


def config(*flags):
    return mlp.cli.parse(mlp.Config, [*TINY, *flags], command="it").settled()


def test_equal_work_is_equal_but_for_one_step():
    c = config("--width", "64", "--epochs", "10")
    found = mlp.cases(c, "flops", 20, 50)
    spent = [case.steps * mlp.flops(c, case.method, 64, 20) for case in found]
    budget = 500 * mlp.flops(c, mlp.sampled(c, "forward", 0.5), 64, 20)
    for case, total in zip(found, spent, strict=True):
        assert abs(total - budget) <= total / case.steps / 2 * 1.001
    kinds = {case.method.kind for case in found}
    assert kinds == {"dense", *methods.POLICIES, *methods.MEPROP}
    assert found[0].steps < 500  # dense


def test_every_part_begins_with_what_it_is_compared_with():
    c = config("--widths", "8", "16")
    for part in mlp.PARTS:
        found = mlp.cases(c, part, 20, 5)
        dense = {case.width for case in found if case.method == Method()}
        assert dense == {case.width for case in found}
    crossed = mlp.cases(c, "samplers", 20, 5) + mlp.cases(c, "cross", 20, 5)
    pairs = {(case.method.kind, case.method.sampler) for case in crossed}
    assert pairs == {(p, s) for p in methods.POLICIES for s in methods.SAMPLERS} | {("dense", "")}


# ----------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run that Ctrl-C ends after the first sampled networks, the one that goes on, and one with
    nothing left to do."""
    folder = tmp_path_factory.mktemp("mlp")
    data, _ = write_mnist(folder)
    out, compiled = folder / "out", []
    few = shlex.split("--fractions 0.5 --widths 32 --parts goal widths flops --measure test")
    flags = [*TINY, *few, "--data", str(data), "--out", str(out)]
    compile_programs, add = net.compile_programs, _runs.Runs.add

    def counting(method, *others):
        compiled.append(method)
        return compile_programs(method, *others)

    def interrupting(self, settings, result, where):
        add(self, settings, result, where)
        if (settings["kind"], settings["seed"]) == ("forward", 1):
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "compile_programs", counting)
        patch.setattr(mlp.os, "cpu_count", lambda: 1)
        patch.setattr(methods, "POLICIES", ("forward",))  # the others are compared when slow
        patch.setattr(methods, "MEPROP", ("meProp",))
        with contextlib.redirect_stdout(io.StringIO()) as stopped, patch.context() as inner:
            inner.setattr(_runs.Runs, "add", interrupting)
            interrupted = mlp.main(flags)
        lines = (out / "mlp.jsonl").read_text().splitlines()
        compiled.clear()
        again = re.search(r"models\.mlp (.*)", stopped.getvalue())
        assert again
        with contextlib.redirect_stdout(io.StringIO()) as began:
            ended = mlp.main(shlex.split(again[1]))
        once = list(compiled)
        with contextlib.redirect_stdout(io.StringIO()) as repeated:
            mlp.main([*flags, "--resume"])
    return types.SimpleNamespace(
        out=out,
        flags=flags,
        interrupted=interrupted,
        stopped=stopped.getvalue(),
        first=lines,
        ended=ended,
        printed=began.getvalue(),
        compiled=once,
        compiled_again=compiled[len(once) :],
        repeated=repeated.getvalue(),
    )


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ctrl_c_keeps_what_is_there_and_resume_goes_on(story):
    assert story.interrupted == INTERRUPTED
    assert len(story.first) == 6  # two seeds: dense for two parts, and sampled
    assert story.ended == 0
    assert (story.out / "mlp.jsonl").read_text().splitlines()[:6] == story.first
    assert len({json.dumps(one["settings"]) for one in records(story.out / "mlp.jsonl")}) == len(
        records(story.out / "mlp.jsonl")
    )
    assert "3 of 4 kinds of networks are there already" in story.printed
    assert "4 of 4 kinds of networks are there already" in story.repeated
    assert not story.compiled_again


def test_ctrl_c_shows_the_parts_that_are_whole(story):
    assert "Sampled products beside dense ones" in story.stopped
    assert "equal floating-point" not in story.stopped


def test_each_program_compiles_once_whatever_its_steps(story):
    assert len(story.compiled) == len(set(story.compiled))


def test_a_line_says_what_was_run_and_where(story):
    for one in records(story.out / "mlp.jsonl"):
        assert {"kind", "fraction", "sampler", "width", "steps", "seed", "data"} <= set(
            one["settings"]
        )
        assert 0 <= one["result"]["accuracy"] <= 1
        assert one["result"]["flops"] > 0
        where = one["where"]
        assert {"commit", "jax", "device", "python"} <= set(where)
        assert where["command"].split("-m ")[1].startswith("models.mlp --data")


def test_a_network_that_diverges_is_a_result_and_ends_nothing(tmp_path):
    data, _ = write_mnist(tmp_path)
    flags = ["--data", str(data), "--optimizer", "momentum", "--learning_rate", "1e20"]
    found, c = images.load(data, test=True), config(*flags, "--epochs", "3")
    runs = _runs.Runs(tmp_path / "mlp.jsonl", resume=False)
    case = mlp.cases(c, "goal", 20, 6)[0]
    assert mlp.train(c, [case], found, runs, {})
    result = runs.get(mlp.settings(c, case, found.digest, 0))
    assert result["loss"] is None
    assert result["accuracy"] < 0.5


def test_only_a_sampled_forward_pass_is_measured_with_sampling(story):
    for one in records(story.out / "mlp.jsonl"):
        forward = one["settings"]["kind"] == "forward"
        assert ("with sampling" in one["result"]) == forward


def test_the_tables_the_numbers_and_the_picture(story):
    for part in (
        "Sampled products beside dense ones",
        "Width",
        "equal floating-point",
    ):
        assert part in story.printed
    assert (story.out / "mlp.png").read_bytes().startswith(b"\x89PNG")
    parts = json.loads((story.out / "mlp.json").read_text())["parts"]
    assert list(parts) == ["goal", "widths", "flops"]
    found = [
        one for one in records(story.out / "mlp.jsonl") if one["settings"]["kind"] == "forward"
    ]
    row = next(row for row in parts["goal"] if row["kind"] == "forward")
    own = [one["result"] for one in found if one["settings"]["steps"] == 12]
    assert row["accuracy"] == pytest.approx(100 * np.mean([one["accuracy"] for one in own]))
    assert row["with sampling"] == pytest.approx(
        100 * np.mean([one["with sampling"] for one in own])
    )
    assert row["below dense"] == pytest.approx(parts["goal"][0]["accuracy"] - row["accuracy"])


def test_another_flag_is_another_result(story):
    settings = [one["settings"] for one in records(story.out / "mlp.jsonl")]
    c = mlp.cli.parse(mlp.Config, story.flags, command="it").settled()
    runs = _runs.Runs(story.out / "mlp.jsonl", resume=True)
    assert all(runs.get(one) for one in settings)
    case = mlp.cases(c, "goal", 20, 6)[0]
    digest = settings[0]["data"]
    assert runs.get(mlp.settings(c, case, digest, 0))
    for change in (
        {"learning_rate": 0.5},
        {"average": 0.9},
        {"batch": 11},
        {"measure": "validation"},
        {"layers": 3},
    ):
        other = dataclasses.replace(c, **change)
        assert runs.get(mlp.settings(other, case, digest, 0)) is None
    assert runs.get(mlp.settings(c, case, digest, 7)) is None


def test_a_seed_is_what_it_is_whatever_it_is_trained_beside(tmp_path):
    """And enough to learn: one pixel tells the label."""
    data, _ = write_mnist(tmp_path)
    c = config("--data", str(data), "--epochs", "30")
    found = images.load(data, test=True)
    case = mlp.cases(c, "goal", 20, 6)[0]
    with_first, with_third = (_runs.Runs(tmp_path / f"{n}.jsonl", resume=False) for n in (0, 1))
    assert mlp.train(c, [case], found, with_first, {})
    assert mlp.train(dataclasses.replace(c, seed=1), [case], found, with_third, {})
    results = [r.get(mlp.settings(c, case, found.digest, 1)) for r in (with_first, with_third)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)
    assert results[0]["accuracy"] == results[1]["accuracy"] > 0.9


def test_the_bundled_digits():
    found = images.load(None, test=True)
    assert found.train.x.shape == (1437, 64)
    assert found.measured.x.shape == (360, 64)
    assert (found.train.x.min(), found.train.x.max()) == (0, 1)
    assert set(found.measured.y) == set(range(10))


@pytest.mark.slow
def test_the_bundled_digits_are_what_is_trained_on_without_data(tmp_path):
    flags = [*TINY, "--parts", "goal", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert mlp.main(flags) == 0
    assert (
        "scikit-learn's digits, 8 x 8: 1,318 to train on, 119 for validation" in printed.getvalue()
    )


@pytest.mark.slow
def test_every_part_runs_and_noise_learns(tmp_path):
    data, _ = write_mnist(tmp_path)
    flags = [*TINY, "--data", str(data), "--measure", "test", "--epochs", "30"]
    parts = ["--parts", *mlp.PARTS, "--fractions", "0.5", "--widths", "16", "32"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert mlp.main([*flags, *parts, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "mlp.json").read_text())["parts"]
    assert set(found) == set(mlp.PARTS)
    accuracy = {row["name"]: row["accuracy"] for row in found["noise"]}
    assert len(accuracy) == 6
    assert all(value > 80 for value in accuracy.values()), accuracy


MISTAKES = {
    "data": ("--data nowhere", "nowhere does not exist: check the path given with --data"),
    "folder": (
        "--data .",
        r"\. has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz: give",
    ),
    "part": ("--parts goal nothing", "argument --parts: invalid choice: 'nothing'"),
    "fractions": ("--fractions 0.5 1.5", r"--fractions must be above 0 and at most 1, got 1\.5"),
    "batch": ("--batch 2000", "--batch 2000 is more than the 1,318 images: take fewer"),
    "block": ("--block 3", "--block 3 must divide the 64 features of the images: take a divisor"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = MISTAKES[name]
    monkeypatch.setattr(net, "compile_programs", None)  # so far it must not come
    with one_line(message):
        mlp.main([*TINY, *shlex.split(flags), "--out", str(tmp_path / "out")])
