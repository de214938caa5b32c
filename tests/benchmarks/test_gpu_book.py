"""The run book: what it does when steps work, fail, fault, hang and run out of time."""

import json
import sys
import time

import pytest

from benchmarks import _gpu_steps, _gpu_table, gpu
from benchmarks._gpu_watch import watch

FAKE = ["--steps", "tests.benchmarks.fake_steps", "--any-device", "--slack", "3"]


def records(path):
    return [json.loads(text) for text in path.read_text().splitlines() if text]


def failures(found):
    return {one["item"]: one["failed"] for one in found if one.get("failed")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything that can go wrong: exit status, file."""
    out = tmp_path_factory.mktemp("book") / "new" / "results.jsonl"
    return gpu.main([*FAKE, "--out", str(out), "--minutes", "1", "--commit", "abc"]), out


def test_what_works_is_written_and_what_does_not_says_why(whole):
    status, out = whole
    assert status == 1
    found = records(out)
    values = {one["item"]: one["value"] for one in found if "value" in one}
    assert values == {
        "ceilings flops": 7,
        "fails": 0,  # what it had until then
        "works": 2,
        "works after all": 2,  # after what faulted and what hung
        "last": 7,  # knows the ceiling that another process measured
    }
    why = failures(found)
    assert why["fails"] == "ValueError: as it was told to"
    assert why["faults"].startswith("took its process along (exit status 9)")
    assert "the last words of a kernel" in why["faults"]
    assert why["hangs"].startswith("hung")
    assert set(why) == {"fails", "faults", "hangs"}
    assert {one["commit"] for one in found} == {"abc"}
    assert all({"device", "jax", "step", "item"} <= set(one) for one in found)


def test_the_order_is_that_of_priorities(whole):
    steps = [one["step"] for one in records(whole[1])]
    assert list(dict.fromkeys(steps)) == ["ceilings", "bad", "last"]


def resumed(whole, tmp_path, *flags):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(whole[1].read_text() + '{"item": "cut o')
    before = copy.read_text().count("\n")
    gpu.main([*FAKE, "--out", str(copy), "--minutes", "1", "--resume", *flags])
    lines = copy.read_text().splitlines()[before + 1 :]
    return [json.loads(text) for text in lines if text]


def test_resuming_skips_what_is_there(whole, tmp_path):
    assert resumed(whole, tmp_path, "--commit", "abc") == []


@pytest.mark.slow
def test_another_commit_tries_again_what_failed(whole, tmp_path):
    again = resumed(whole, tmp_path, "--commit", "def", "--only", "bad")
    assert set(failures(again)) == {"fails", "faults", "hangs"}
    assert {one["item"] for one in again} == set(failures(again))


@pytest.mark.slow
def test_a_run_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE", 0)
    start = time.monotonic()
    out = tmp_path / "a.jsonl"
    gpu.main([*FAKE, "--out", str(out), "--minutes", "0.15", "--slack", "60", "--only", "bad"])
    assert time.monotonic() - start < 15
    assert "hangs" not in failures(records(out))  # cut, so to be tried again


def test_without_a_gpu_it_stops_at_once(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    assert gpu.main([*FAKE[:2], "--out", str(out)]) == 2
    assert "JAX found no GPU (cpu); --dry-run needs none" in capsys.readouterr().out
    assert records(out) == []


def test_the_plan_names_every_item_and_its_floor(capsys, tmp_path):
    assert gpu.main(["--dry-run", "--minutes", "2"]) == 0
    said = capsys.readouterr().out
    for step in _gpu_steps.ordered():
        for item in step.items():
            assert f"    {item.name}" in said
    case = said.index("    matmul 8192 tokens 8192x8192 64x64 0.1")
    assert "forward  floor 0.29" in said[case : case + 120]
    assert "goal: of_floor 0.8, efficiency 0.42" in said
    assert "(beyond --minutes)" in said


def test_the_most_telling_comes_first():
    names = [step.name for step in _gpu_steps.ordered()]
    first = ["ceilings", "quick tests", "matmul", "attention", "conv", "sampled", "lstm", "tuner"]
    assert names[:8] == first
    assert len({item.name for step in _gpu_steps.STEPS for item in step.items()}) == sum(
        len(step.items()) for step in _gpu_steps.STEPS
    )


def test_an_operation_adds_itself(monkeypatch):
    monkeypatch.setattr(_gpu_steps, "STEPS", list(_gpu_steps.STEPS))
    _gpu_steps.register(_gpu_steps.Step("another", 31))
    names = [step.name for step in _gpu_steps.ordered()]
    assert names.index("another") == names.index("matmul") + 1


@pytest.mark.slow
def test_tests_are_run_one_by_one_and_not_again(tmp_path):
    """(They are skipped here, which is a result.)"""
    flags = ["--any-device", "--only", "quick tests", "--minutes", "1"]
    out = tmp_path / "a.jsonl"
    assert gpu.main([*flags, "--out", str(out)]) == 0
    found = records(out)
    assert len(found) > 20
    assert {one["outcome"] for one in found} == {"skipped"}
    files = {one["item"].partition("::")[0] for one in found}
    assert files == set(_gpu_steps.FILES)
    gpu.main([*flags, "--out", str(out), "--resume"])
    assert len(records(out)) == len(found)


def test_a_failing_test_says_why(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text("def test_a():\n    assert 1 == 2\ndef test_b():\n    pass\n")
    command = [*(sys.executable, "-m", "pytest", "-p", "benchmarks._gpu_pytest", str(test))]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--rootdir", str(tmp_path)]
    log, until = tmp_path / "log", time.time() + 60
    events = list(watch(command, "", until=until, warm_up=20, log=log))
    done = [one for one in events if one["event"] == "done"]
    assert [one["records"][0]["outcome"] for one in done] == ["failed", "passed"]
    assert done[0]["records"][0]["why"].startswith("E       assert 1 == 2")
    assert events[-1]["event"] == "ended"
    assert events[-1]["status"] == 1


PRODUCT = {
    "benchmark": "matmul gpu",
    "item": "matmul a",
    "case": "a",
    "product": "dx",
    "refused": None,
    "ms": 0.5,
    "dense_ms": 1.0,
    "speedup": 2.0,
    "efficiency": 0.25,
    "goal": {"of_floor": 0.8, "efficiency": 0.42},
    "met": {"of_floor": True, "efficiency": False},
    "of_floor": 0.9,
    "of_tile_floor": 0.95,
    "clock": "kernels",
    "differs": None,
}


def test_the_table():
    tuned = {"benchmark": "tune", "item": "tune b", "config": {"tile": 64, "workers": 9}}
    found = [
        {"item": "x", "failed": "first"},
        {"item": "x", "benchmark": "fake"},  # went well later
        {"item": "y", "step": "s", "failed": "hung\nfor  long"},
        PRODUCT,
        PRODUCT | {"product": "forward", "refused": "wrong by 0.5", "met": {}},
        tuned | {"us": 9.0, "heuristic": True},
        tuned | {"us": 7.0, "heuristic": False, "config": {"tile": 128, "workers": 9}},
        {"item": "t::test_a[1]", "benchmark": "tests", "outcome": "failed", "why": "E  nan"},
        {"item": "t::test_b", "benchmark": "tests", "outcome": "passed", "why": ""},
        {"item": "c", "benchmark": "ceilings", "ceiling": "l2", "value": 5.5e12, "unit": "B/s"},
    ]
    said = list(_gpu_table.table(found))
    assert "y: hung for long" in said
    assert not any(line.startswith("x:") for line in said)
    assert "\n== tests: 1 failed, 1 passed" in said
    assert "test_a[1]: E nan" in said
    assert "tune b: 9.0 -> 7.0 {'tile': 128}" in said
    assert any(line.split()[-4:] == ["0.42!", "0.90", "0.95", "(kernels)"] for line in said)
    assert any("REFUSED wrong by 0.5" in line for line in said)
    assert "goals reached: 1 of 2; ! is one that was missed" in said
    assert said[-1] == "\n== ceilings: l2 5.5e+12 B/s"
