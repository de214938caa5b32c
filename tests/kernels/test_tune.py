"""Candidates, the table and the tuner: without a GPU, with the interpreter and clocks that lie."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _clock, config, tune
from pallas_kernels.config import Config, Key
from pallas_kernels.tune import OPERATIONS, PROBLEMS, Problem

BLOCKS = [(a, b) for a in config.SIDES for b in config.SIDES if a * b <= config.BLOCK]
H200 = "NVIDIA H200"
SMALL = Problem(operation="matmul", block=(32, 16), density=0.5, tokens=100, shape=(96, 64))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_candidate_fits(operation, block):
    for n in (1, 64, 100, 8192):
        found = list(config.candidates(operation, n, block, 2, workers=7, density=0.5))
        heuristic = (
            config.for_sddmm(block, 2, 7)
            if operation == "sddmm"
            else config.for_matmul(n, block, 2, 7, density=0.5)
        )
        assert found[0] == heuristic
        assert len(set(found)) == len(found)
        assert {one.workers for one in found} == {7 // one.cluster for one in found}
        for one in found:
            assert config.misfit(operation, one, block, 2) is None
    assert len(found) >= 3


@pytest.mark.parametrize(
    ("operation", "changes", "reason"),
    [
        ("matmul", {"tile": 200}, "2 warpgroups cannot share 200 rows by 64"),
        ("matmul", {"warpgroups": 1, "tile": 512}, "512 x 64 sums do not fit in the registers"),
        ("sddmm", {"tile": 192, "warpgroups": 3}, "192 rows are no whole blocks of 128"),
        ("matmul", {"depth": 256}, "steps of 256 features do not divide blocks of 128"),
        ("sddmm", {"depth": 32}, "a product that transposes takes 64 at a time"),
        ("matmul", {"stages": 9}, "9 stages: shared memory holds 2 to 4"),
        ("matmul", {"stages": 1}, "1 stages: shared memory holds 2 to 4"),
    ],
)
def test_what_does_not_fit_says_why(operation, changes, reason):
    one = dataclasses.replace(config.for_matmul(8192, (128, 64), 2), **changes)
    assert reason in str(config.misfit(operation, one, (128, 64), 2))


def test_sizes_near_each_other_share_a_key():
    def of(n, density):
        return config.key(H200, "matmul", "bfloat16", (64, 64), n, density)

    assert of(1, 0.03) == of(64, 0.031)
    assert of(5000, 0.09) == of(100_000, 0.12) == of(8192, 0.1)
    assert len({of(n, d) for n in (64, 65, 257, 2000) for d in (0.05, 0.1, 0.25, 0.5)}) == 16
    assert of(64, 0.0).density == min(config.DENSITIES)  # nothing stored
    assert of(64, 1.0).density == max(config.DENSITIES)


@pytest.fixture
def shipped(monkeypatch):
    """What the table holds."""

    def ship(key, **fields):
        line = json.loads(json.dumps(dataclasses.asdict(key) | {"config": fields, "us": 1.0}))
        monkeypatch.setattr(config, "table", lambda: config.read([line]))

    return ship


def test_a_tuned_configuration_is_used_where_it_fits(shipped):
    key = config.key(H200, "matmul", "bfloat16", (64, 64), 8192, 0.1)
    tuned = {"tile": 128, "warpgroups": 1, "depth": 32, "stages": 3, "split": False}
    shipped(key, **tuned)
    assert config.for_matmul(8192, (64, 64), 2, 9, tuned=key) == Config(**tuned, workers=9)
    heuristic = config.for_matmul(8192, (64, 64), 2, 9)
    assert heuristic.tile == 256
    for other in (
        {"device": "NVIDIA H100"},
        {"dtype": "float16"},
        {"density": 0.5},
        {"tokens": 64},
        {"operation": "matmul transposed"},
    ):
        elsewhere = dataclasses.replace(key, **other)
        assert config.for_matmul(8192, (64, 64), 2, 9, tuned=elsewhere) == heuristic


def test_a_tuned_configuration_that_does_not_fit_is_not_used(shipped):
    key = config.key(H200, "matmul", "bfloat16", (64, 64), 1100, 0.1)
    shipped(key, tile=512, stages=2)
    assert config.for_matmul(4096, (64, 64), 2, tuned=key).tile == 512
    # mostly padding
    assert config.for_matmul(1100, (64, 64), 2, tuned=key) == config.for_matmul(1100, (64, 64), 2)
    # fewer stages where the output takes more room
    shipped(key, tile=256, stages=5)
    assert config.for_matmul(4096, (64, 64), 4, tuned=key).stages == 3


def test_sddmm_looks_up_too(shipped):
    key = config.key(H200, "sddmm", "bfloat16", (64, 64), 8192, 0.1)
    shipped(key, tile=128, stages=3)
    assert config.for_sddmm((64, 64), 2, tuned=key) == Config(tile=128, stages=3)
    assert config.for_sddmm((64, 64), 2).tile == 256


def test_lines_of_other_kernels_are_left_out():
    line = dataclasses.asdict(config.key(H200, "matmul", "bfloat16", (64, 64), 8192, 0.1))
    assert config.read([line | {"config": {"tile": 128, "clusters": 2}}]) == {}
    assert config.read([{"device": H200, "config": {}}]) == {}
    (key,) = config.read([line | {"config": {"tile": 128}, "us": 3.5}])
    assert key == Key(**(line | {"block": (64, 64)}))


def test_the_table_that_ships_can_be_read():
    lines = tune.load(config.TABLE)
    assert len(config.read(lines)) == len(lines)
    assert config.table() == config.read(lines)


def test_a_product_is_written_once(tmp_path):
    path = tmp_path / "tuned.json"
    assert tune.load(path) == []
    first, fast = list(config.candidates("matmul", 8192, (64, 64), 2))[:2]
    problem = Problem(operation="matmul", block=(64, 64), density=0.1)
    line = tune.tuned(problem, H200, {first: 2e-4, fast: 1e-4})
    tune.save(path, tune.merged(tune.load(path), line))
    other = tune.tuned(dataclasses.replace(problem, density=0.5), H200, {first: 1e-4})
    tune.save(path, tune.merged(tune.load(path), other))
    again = tune.tuned(problem, H200, {first: 5e-5, fast: 1e-4})
    tune.save(path, tune.merged(tune.load(path), again))
    lines = tune.load(path)
    assert len(path.read_text().splitlines()) == 2 + len(lines) == 4
    table = config.read(lines)
    assert table[problem.key(H200)] == first
    assert (line["us"], line["heuristic_us"], line["timed"]) == (100, 200, 2)
    tune.save(path, [])
    assert path.read_text() == "[]\n"


def test_what_failed_is_no_result():
    first, second = list(config.candidates("matmul", 8192, (64, 64), 2))[:2]
    assert tune.tuned(PROBLEMS[0], H200, {first: "no such layout"}) is None
    line = tune.tuned(PROBLEMS[0], H200, {first: "no such layout", second: 1e-3})
    assert line["heuristic_us"] is None
    assert line["config"]["tile"] == second.tile


def test_a_run_resumes_and_keeps_to_its_budget(tmp_path, monkeypatch):
    path, timed = tmp_path / "tuned.json", []

    def times(problem, found, until):
        timed.append(problem)
        return dict.fromkeys(found, 1e-3)

    monkeypatch.setattr(tune, "times", times)
    list(tune.run(PROBLEMS[:2], path, 60))
    list(tune.run(PROBLEMS[:3], path, 60))
    assert timed == PROBLEMS[:3]
    list(tune.run(PROBLEMS[:1], path, 60, again=True))
    assert timed == [*PROBLEMS[:3], PROBLEMS[0]]
    list(tune.run(PROBLEMS, path, -1))
    assert len(timed) == 4


def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 1
    assert "JAX found cpu only: run it where a GPU is at hand" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda one, x: jnp.full_like(x, jnp.nan), "wrong by nan of the result"),
        (lambda one, x: 2 * x, "wrong by 1 of the result"),
        (lambda one, x: jnp.ones((3, 2)) @ x, "TypeError: dot_general requires"),
    ],
)
def test_a_candidate_that_is_wrong_or_does_not_compile_is_left_out(monkeypatch, run, reason):
    x = jnp.arange(1.0, 9.0)
    monkeypatch.setattr(tune, "job", lambda problem: tune.Job(run, [(x,)], x))
    (said,) = tune.times(SMALL, [Config()]).values()
    assert str(said).startswith(reason)


def test_candidates_beyond_the_budget_are_not_timed(monkeypatch):
    x = jnp.arange(1.0, 9.0)
    job = tune.Job(lambda one, x: x, [(x,)], x)
    monkeypatch.setattr(tune, "job", lambda problem: job)
    monkeypatch.setattr(tune, "clock", lambda run: 1e-3)
    found = list(config.candidates("matmul", 8192, (64, 64), 2))
    first, *rest = tune.times(SMALL, found, until=0).values()
    assert first == 1e-3
    assert set(rest) == {"out of time"}


def test_short_calls_are_timed_by_their_kernels(monkeypatch):
    monkeypatch.setattr(_clock, "kernel_seconds", lambda run: [1e-6] * len(run()))
    for wall, want in ((1e-3, 1e-3), (1e-5, 1e-6)):
        monkeypatch.setattr(_clock, "queued_seconds", lambda run, calls, wall=wall: wall)
        assert _clock.clock(lambda i: i) == pytest.approx(want)
    monkeypatch.setattr(_clock, "kernel_seconds", lambda run: "no profiler")
    assert _clock.clock(lambda i: i) == 1e-5


def test_a_clock_counts_calls():
    calls = []
    seconds = _clock.queued_seconds(calls.append, 5)
    assert calls == [0, 1, 2, 3, 4]
    assert 0 < seconds < 1


def test_weights_of_few_tokens_rotate():
    few = Problem(operation="matmul", block=(32, 32), density=0.5, tokens=64, shape=(512, 512))
    assert len(tune.job(few).args) == 8
    assert len(tune.job(dataclasses.replace(few, tokens=512)).args) == 1


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "matmul transposed" else ())
        for name in OPERATIONS
    ],
)
def test_the_tuner_runs_the_kernels_as_the_library_does(operation):
    """And what it compares with is right: the kernel agrees with it."""
    problem = dataclasses.replace(SMALL, operation=operation)
    job = tune.job(problem)
    found = list(config.candidates(operation, problem.tokens, problem.sizes, 2, workers=2))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(lambda *args: job.run(found[1], *args))(*job.args[0])
        jax.block_until_ready(got)
    assert got.shape == job.want.shape
    assert _clock.wrong(got, job.want) is None
    assert _clock.wrong(-got, job.want) == "wrong by 2 of the result"
