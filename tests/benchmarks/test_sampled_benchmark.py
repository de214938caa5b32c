"""`python -m benchmarks.sampled` on layers so small that nothing takes long."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from benchmarks import _gpu_steps, _gpu_table, sampled
from benchmarks import _sampled_cases as cases
from benchmarks import _sampled_suite as suite
from benchmarks._gpu_clock import Times
from benchmarks._gpu_floor import Ceilings
from benchmarks._products import DENSE, Programs
from benchmarks._sampled_cases import PARTS, SampledCase, goal, predicted
from tests.helpers import tolerance

SMALL = SampledCase(
    block=8, fraction=0.25, implementation="xla", tokens=48, shape=(64, 32), dtype="float32"
)


def clock(runs):
    """Ours takes 2 ms, the dense product 8."""
    for run in runs.values():
        run(0)
    seconds = {name: np.full(3, 8e-3 if name == DENSE else 2e-3) for name in runs}
    return {name: Times("wall", one, one, None) for name, one in seconds.items()}


def measure(case, programs=None, **more):
    found = suite.measure(case, programs or Programs(), Ceilings(), clock=clock, **more)
    return {one["part"]: one for one in found}


@pytest.fixture(scope="module")
def programs():
    return Programs()


@pytest.fixture(scope="module")
def measured(programs):
    return measure(SMALL, programs)


def test_a_record_for_each_part(measured):
    assert tuple(measured) == PARTS
    json.dumps(measured, allow_nan=False)
    for part, one in measured.items():
        assert (one["refused"], one["skipped"]) == (None, None)
        assert (one["ms"], one["dense_ms"], one["ratio"], one["clock"]) == (2, 8, 0.25, "wall")
        assert (one["policy"], one["block"], one["shape"]) == ("forward", 8, [64, 32])
        assert one["of_floor"] == one["floor_ms"] / 2
        product = part not in ("sampler", "gather")
        assert (one["speedup"], one["efficiency"]) == ((4, 1) if product else (None, None))


def test_a_line_for_each_part(measured):
    lines = list(suite.lines(list(measured.values())))
    assert len(lines) == len(PARTS)
    assert "layer       2.0000 ms (wall), floor 0.0" in lines[0]
    assert lines[0].endswith("dense 8.0000, speed-up 4.00")
    assert lines[4].endswith("share 0.250")


def test_what_is_sampled_alone_is_what_the_layer_samples():
    x, dy, w = suite.check_inputs(SMALL, 3)
    key = jax.random.key(0)
    for case in (SMALL, dataclasses.replace(SMALL, block=1, sampler="priority")):
        alone, layer = (
            jax.jit(functools.partial(f, case=case)) for f in (suite._sampler, suite._forward)
        )
        (corner,), (y,) = (f(x, dy, w, key) for f in (alone, layer))
        # the scores differ by their own roundings, of sums over the tokens, and so do the scales
        near = tolerance(jnp.float32, x.shape[0])
        np.testing.assert_allclose(
            corner, y[: suite.CORNER, : suite.CORNER], near["rtol"], near["atol"] * abs(y).max()
        )


def test_sums_of_squares_of_what_is_checked_are_not_rounded():
    """At the largest size, of as many numbers as a group of 128 has: exact in float32."""
    x, dy, w = suite.check_inputs(SMALL, 0)
    for a in (x, dy, w):
        assert set(np.unique(np.abs(a))) == {1, 2, 4}
    assert 4.0**2 * cases.GPU_SIDE * 128 <= 2**24


def test_copies_are_those_of_the_layer():
    x, _, w = suite.check_inputs(SMALL, 0)
    columns, rows = suite._gather(x, np.array([1, 5]), w, SMALL)
    taken = [*range(8, 16), *range(40, 48)]
    np.testing.assert_array_equal(columns, x[:, jnp.array(taken)])
    np.testing.assert_array_equal(rows, w[jnp.array(taken)])


@pytest.fixture
def spoil(monkeypatch):
    """Makes another function of every implementation but the reference."""
    real = bsjax.sampled_matmul

    def spoiled(change):
        def product(x, w, *, implementation, **options):
            f = functools.partial(real, implementation=implementation, **options)
            return f(x, w) if implementation == "reference" else change(f, x, w, options)

        monkeypatch.setattr(bsjax, "sampled_matmul", product)

    return spoiled


def test_a_wrong_gradient_has_no_speed(spoil):
    spoil(lambda f, x, w, _: f(x, 1.1 * w - jax.lax.stop_gradient(0.1 * w)))
    found = measure(SMALL, parts=PARTS[:4])
    for part in ("layer", "dw"):
        assert found[part]["refused"] == "dw is wrong by 0.1 of the result"
        assert "ms" not in found[part]
    assert found["forward"]["ms"] == found["dx"]["ms"] == 2
    assert "REFUSED: dw is wrong" in list(suite.lines([found["layer"]]))[0]  # noqa: RUF015
    assert "REFUSED dw is wrong" in list(_gpu_table.sampled(list(found.values())))[2]


def test_another_sample_is_wrong(spoil):
    """As by a kernel that takes the neighbours of what it is told to take."""
    spoil(lambda f, x, w, _: f(jnp.roll(x, 8, 1), jnp.roll(w, 8, 0)))
    found = measure(SMALL, parts=("forward",))
    assert found["forward"]["refused"].startswith("y is wrong by")


def test_what_is_not_exact_without_a_key_is_wrong(spoil):
    spoil(lambda f, x, w, options: f(x, w) * (1.1 if options["key"] is None else 1))
    found = measure(SMALL, parts=("forward",))
    assert found["forward"]["refused"] == "without a key y is wrong by 0.1 of the result"


def test_what_cannot_run_is_skipped_and_what_breaks_is_refused(spoil):
    bernoulli = dataclasses.replace(SMALL, sampler="bernoulli")
    found = measure(bernoulli)
    assert tuple(found) == PARTS
    for one in found.values():
        assert "cannot run here" in one["skipped"]
        assert one["refused"] is None
        assert one["floor_ms"] > 0
    assert "not measured: ValueError: sampled_matmul" in next(suite.lines([found["layer"]]))
    assert "not measured: ValueError" in list(_gpu_table.sampled(list(found.values())))[2]

    def broken(*_):
        raise ValueError("no such layout\nand much more")

    spoil(broken)
    assert measure(SMALL, parts=("layer",))["layer"]["refused"] == "ValueError: no such layout"


def records(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_the_command(tmp_path, capsys):
    """Ceilings and floors come before the first time; what is not measured says so."""
    path = tmp_path / "new" / "results.jsonl"
    flags = ["--size", "64", "--block", "8", "--fraction", "0.5,0.25", "--rounds", "2"]
    flags += ["--policy", "backward", "--sampler", "systematic,bernoulli", "--parts", "dx"]
    assert sampled.main([*flags, "--json", str(path)]) == 0
    found = records(path)
    assert all({"device", "cpu", "cores", "jax", "commit"} <= set(one) for one in found)
    assert [one["ceiling"] for one in found[:2]] == ["flops", "memory"]
    predictions, measured, cannot = found[2:6], found[6:8], found[8:]
    assert [one["skipped"] for one in predictions] == ["not measured"] * 4
    assert {one["ceilings"] for one in found[2:]} == {"measured"}
    for one in measured:
        assert (one["rounds"], one["clock"]) == (2, "wall")
        assert one["ratio_low"] <= one["ratio"] <= one["ratio_high"]
    assert all("cannot run here" in one["skipped"] for one in cannot)
    said = capsys.readouterr().out
    assert said.index("layer floor") < said.index("dx  ")
    assert "== sampled layers" in said


def test_predictions_alone(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    assert sampled.main(["--dry-run", "--json", str(path)]) == 0
    found = records(path)
    assert {one["skipped"] for one in found} == {"not measured"}
    assert {one["ceilings"] for one in found} == {"assumed"}
    assert len({one["case"] for one in found}) == 18
    assert "goal: speedup 1" in capsys.readouterr().out


def test_bad_flags_are_refused(capsys):
    for flags, text in (
        (["--fraction", "1.5"], "expected a fraction above 0, at most 1, got '1.5'"),
        (["--policy", "both"], "expected one of forward, backward, weight, got 'both'"),
        (["--block", "0"], "expected a positive whole number, got '0'"),
        (["--size", "100", "--block", "64"], "--size 100 is no multiple of --block 64"),
    ):
        with pytest.raises(SystemExit) as found:
            sampled.main(flags)
        assert found.value.code == 2
        assert text in capsys.readouterr().err


FLOPS, MEMORY = 790e12, 4.3e12


def test_the_floor_of_a_kernel_by_hand():
    """8192^3, a quarter: 2048 of the features."""
    case = SampledCase(block=64, fraction=0.25)
    n, s = 8192, 2048
    product = 2 * n * n * s / FLOPS
    norms = 2 * 2 * n * n / MEMORY
    zeros = 2 * n * (n - s) / MEMORY
    for part, seconds, ideal in (
        ("layer", 3 * product + norms + 2 * zeros, 0.25),
        ("forward", product + norms, 0.25),
        ("dx", product + zeros, 0.25),
        ("dw", product + zeros, 0.25),
        ("sampler", norms, 0),
    ):
        one = predicted(case, part, Ceilings())
        assert one["floor_ms"] == pytest.approx(1e3 * seconds)
        assert one["ideal"] == ideal
    layer = predicted(case, "layer", Ceilings())
    assert layer["dense_floor_ms"] == pytest.approx(3e3 * 2 * n**3 / FLOPS)
    assert layer["floor_speedup"] == pytest.approx(3.62, abs=0.01)
    uniform = dataclasses.replace(case, sampler="uniform")
    less = predicted(uniform, "layer", Ceilings())["floor_ms"]
    assert layer["floor_ms"] - less == pytest.approx(1e3 * norms)
    assert predicted(uniform, "sampler", Ceilings())["floor_ms"] == 0


def test_the_floor_of_copies_by_hand():
    case = SampledCase(block=1, fraction=0.25, implementation="xla")
    n, s = 8192, 2048
    gather = 2 * 2 * 2 * n * s / MEMORY  # x and w, read and written, of two bytes
    back = 2 * 2 * n * (s + n) / MEMORY
    products, norms = 3 * 2 * n * n * s / FLOPS, 2 * 2 * n * n / MEMORY
    assert predicted(case, "gather", Ceilings())["floor_ms"] == pytest.approx(1e3 * gather)
    layer = predicted(case, "layer", Ceilings())["floor_ms"]
    assert layer == pytest.approx(1e3 * (products + norms + gather + back))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_ideals(fraction):
    for policy, want in (
        ("forward", fraction),
        ("backward", (1 + 2 * fraction) / 3),
        ("weight", (2 + fraction) / 3),
    ):
        case = SampledCase(block=1, fraction=fraction, policy=policy)
        assert predicted(case, "layer", Ceilings())["ideal"] == pytest.approx(want, abs=1e-4)


def test_goals():
    for fraction, speedup in ((0.25, 3.0), (0.5, 1.7), (0.1, 6.0)):
        for block in (64, 128):
            case = SampledCase(block=block, fraction=fraction)
            assert goal(case, "layer") == {"speedup": speedup}
            assert goal(case, "dx") == {}
            assert goal(dataclasses.replace(case, implementation="xla"), "layer") == {}
    on_cpu = {one.policy: goal(one, "layer") for one in cases.on_cpu()}
    assert on_cpu == {"forward": {"speedup": 1.0}, "backward": {}, "weight": {}}


def test_the_run_book_measures_the_most_telling_first():
    (step,) = (step for step in _gpu_steps.ordered() if step.name == "sampled")
    names = [item.name for item in step.items()]
    size = "sampled 8192 tokens 8192x8192 bfloat16 block"
    assert names[:2] == [f"{size} {side} 0.25 forward systematic mosaic" for side in (64, 128)]
    assert f"{size} 1 0.25 forward systematic xla" in names
    for how, fraction in itertools.product(("systematic mosaic", "systematic xla"), (0.1, 0.5)):
        assert f"{size} 128 {fraction} forward {how}" in names
    predict = step.items()[0].predict
    assert predict
    assert "goal: speedup 3" in next(predict(Ceilings()))


def test_an_item_of_the_run_book(programs, measured, monkeypatch):
    """By the clock that it has on a GPU."""
    monkeypatch.setattr(cases, "on_gpu", lambda: [SMALL])
    (item,) = _gpu_steps.sampled()
    found = list(item.run(_gpu_steps.Context(Ceilings(), programs, "mosaic", 0)))
    assert [one["part"] for one in found] == list(measured)
    assert all(one["ms"] > 0 for one in found)
    assert item.lines
    assert len(list(item.lines(found))) == len(found)


def test_the_table_says_which_goals_were_met():
    case = SampledCase(block=64, fraction=0.25)
    one = suite.describe(case, "layer") | predicted(case, "layer", Ceilings())
    one |= {"ms": 2.0, "dense_ms": 5.0, "speedup": 2.5, "efficiency": 0.6, "of_floor": 0.5}
    one |= {"goal": {"speedup": 3.0}, "met": {"speedup": False}, "item": case.name}
    good = one | {"case": "other", "speedup": 3.5, "met": {"speedup": True}}
    part = good | {"part": "dx", "ms": 0.6, "goal": {}, "met": {}}
    said = list(_gpu_table.table([one, good, part]))
    assert any("2.50     0.60    3!   0.50" in line for line in said)
    assert any("3.50     0.60     3   0.50  dx 0.6000" in line for line in said)
    assert said[-1] == "goals met: 1 of 2; ! is one that was missed"
