"""How a case is measured on a GPU: tried on a CPU, with small cases and clocks that do not tick."""

import json

import numpy as np
import pytest

from benchmarks import _gpu_clock, _gpu_kernels, _gpu_peers, _gpu_suite, _products, peers
from benchmarks._gpu_cases import PRODUCTS, TWIN, GpuCase
from benchmarks._gpu_clock import Times, measured
from benchmarks._gpu_floor import Ceilings
from benchmarks._products import DENSE, Programs

SMALL = {"tokens": 128, "shape": (128, 128)}
PLAIN = GpuCase(block=(16, 32), density=0.5, **SMALL)
HUB = GpuCase(block=(16, 16), density=0.5, pattern="hub", **SMALL)


def clock(runs):
    """Ours takes 2 ms, the dense product 8, a twin 1."""
    for run in runs.values():
        run(0)
    seconds = {DENSE: 8e-3, TWIN: 1e-3}
    return {
        name: Times("wall", *[np.full(3, seconds.get(name, 2e-3))] * 2, None, "no profiler")
        for name in runs
    }


def measure(case, **more):
    return list(
        _gpu_suite.measure(case, Programs(), Ceilings(), implementation="xla", clock=clock, **more)
    )


@pytest.fixture(scope="module")
def records():
    return measure(PLAIN)


def test_a_record_for_each_product(records):
    assert [one["product"] for one in records] == list(PRODUCTS)
    json.dumps(records, allow_nan=False)
    for one in records:
        assert (one["ms"], one["dense_ms"], one["ratio"]) == (2, 8, 0.25)
        assert (one["clock"], one["no_kernels"]) == ("wall", "no profiler")
        assert one["speedup"] == 4
        assert one["efficiency"] == one["density"] * 4 == 2
        assert one["of_floor"] == one["floor_ms"] / 2
        assert one["of_tile_floor"] == one["tile_floor_ms"] / 2
        assert (one["goal"], one["met"]) == ({"of_floor": 0.8}, {"of_floor": False})
        assert (one["refused"], one["differs"]) == (None, None)
        assert one["config"]["tile"] == 128 if one["product"] == "forward" else one["config"]


def test_hubs_run_beside_their_twin():
    records = measure(HUB)
    assert {one["over_twin"] for one in records} == {2}
    assert not records[0]["met"]["over_twin"]
    assert "over_twin 2.00 of 1.15 MISSED" in next(_gpu_suite.lines(records))


def test_kind_patterns_are_measured_like_others():
    case = GpuCase(block=(16, 16), density=0.5, pattern="kind 4", **SMALL)
    records = measure(case)
    assert [one["ms"] for one in records] == [2, 2, 2]
    assert {(one["pattern"], one["stored_blocks"]) for one in records} == {("kind 4", 32)}
    assert records[0]["case"].endswith("16x16 0.5 kind 4")


def test_a_wrong_result_has_no_speed(monkeypatch):
    real = _products.SPARSE["dx"]
    spoiled = dict(_products.SPARSE, dx=lambda *args, **more: 1.1 * real(*args, **more))
    monkeypatch.setattr(_products, "SPARSE", spoiled)
    forward, dx, dvalues = measure(PLAIN)
    assert dx["refused"].startswith("wrong by 0.1 of the result")
    assert "ms" not in dx
    assert forward["ms"] == dvalues["ms"] == 2
    assert "REFUSED: wrong by 0.1" in list(_gpu_suite.lines([dx]))[0]  # noqa: RUF015


def test_nan_is_wrong():
    assert _gpu_kernels.wrong(np.array([np.nan, 1.0]), np.ones(2)).startswith("wrong by nan")


def test_what_does_not_compile_costs_its_own_product_only(monkeypatch):
    def broken(*_, **__):
        raise ValueError("no such layout\nand much more")

    monkeypatch.setattr(_products, "SPARSE", dict(_products.SPARSE, dvalues=broken))
    forward, _, dvalues = measure(PLAIN)
    assert forward["ms"] == 2
    assert dvalues["refused"] == "ValueError: no such layout"


def test_weights_of_few_tokens_rotate_through_more_than_a_cache():
    case = GpuCase(block=(32, 32), density=0.03, tokens=64, shape=(2048, 2048))
    p = _gpu_suite.bsjax.BlockPattern.from_mask(np.eye(64, dtype=bool), 32)
    inputs = _gpu_suite.draws(case, 0)
    found = _gpu_suite.arguments(case, p, inputs, 0)
    assert len(found) == 16
    assert len({id(values) for _, _, values, _ in found}) == 16
    assert not np.array_equal(found[0][2], found[1][2])


def test_long_calls_are_timed_by_the_wall_and_short_ones_by_their_kernels(monkeypatch):
    monkeypatch.setattr(_gpu_kernels, "device_seconds", lambda run, calls: [1e-6] * calls)
    for wall, want in ((1e-3, "wall"), (2e-5, "kernels")):
        monkeypatch.setattr(_gpu_kernels, "queued_seconds", lambda run, calls, wall=wall: wall)
        times = measured({"a": lambda i: i, "b": lambda i: i}, rounds=3)
        assert times["a"].clock == times["b"].clock == want
        assert np.median(times["a"].seconds) == (1e-6 if want == "kernels" else wall)
        assert (times["a"].wall == wall).all()
        assert times["a"].kernels is not None


def test_without_a_profiler_there_is_the_wall(monkeypatch):
    monkeypatch.setattr(_gpu_kernels, "queued_seconds", lambda run, calls: 2e-5)
    times = measured({"a": lambda i: i}, rounds=3)["a"]
    assert times.clock == "wall"
    assert times.kernels is None
    assert times.why_no_kernels == "JAX has no profiler of kernels here"


def test_rounds_rotate_and_are_as_long_as_wanted(monkeypatch):
    asked = []

    def queued(run, calls):
        asked.append((run(0), calls))
        return 1e-3

    monkeypatch.setattr(_gpu_kernels, "queued_seconds", queued)
    measured({"a": lambda _: "a", "b": lambda _: "b"}, rounds=4, round_seconds=0.01)
    assert asked[4:] == [(name, 10) for name in "abbaabba"]
    assert _gpu_clock._calls(lambda _: 0, 1e9) == _gpu_clock.MOST


def test_kernels_of_several_calls_are_told_apart(monkeypatch):
    monkeypatch.setattr(_gpu_kernels, "kernel_seconds", lambda run: [1.0, 2.0, 1.0, 5.0])
    assert _gpu_kernels.device_seconds(lambda i: i, 2) == [3, 6]
    assert _gpu_kernels.device_seconds(lambda i: i, 3) == "4 kernels in 3 calls"


def test_peers_that_are_missing_are_skipped_and_others_are_measured():
    programs = Programs()
    for peer in peers.PEERS:
        found = list(peers.measure(peer, PLAIN, programs))
        assert [one["product"] for one in found] == list(PRODUCTS)
        json.dumps(found, allow_nan=False)
        if peer.startswith("jax"):
            assert [bool(one["skipped"]) for one in found] == [False, False, True]
            assert found[0]["program"] == "BCSR"
            assert found[0]["ratio"] > 0
        else:
            assert all(one["skipped"] for one in found)


def numpy_forms(problem, spoil=1.0):
    """A package of our own: products of the dense weight."""
    p, mask = problem.p, np.asarray(problem.p.mask())
    (r, c), (br, bc) = p.grid, p.block
    w = np.zeros((r, c, br, bc), np.float32)
    w[np.asarray(p.row), np.asarray(p.col)] = problem.values
    w = w.transpose(0, 2, 1, 3).reshape(p.shape)

    def dvalues():
        full = (problem.x.T @ problem.dy).reshape(r, br, c, bc).transpose(0, 2, 1, 3)
        return full[mask]  # by rows

    sparse = {
        "forward": {"right": lambda: problem.x @ w, "wrong": lambda: spoil * (problem.x @ w)},
        "dvalues": {"right": dvalues, "broken": lambda: 1 / 0},
    }
    dense = dict.fromkeys(PRODUCTS, lambda: problem.x @ problem.w)
    return peers.Forms(sparse, dense, lambda _: None, np.asarray)


def test_the_fastest_right_form_of_a_peer_counts():
    def forms(problem):
        return numpy_forms(problem, spoil=2.0)

    forward, dx, dvalues = peers.measure("torch BSR", PLAIN, Programs(), forms_of=forms)
    assert (forward["program"], dvalues["program"]) == ("right", "right")
    assert forward["reasons"] == ["wrong: wrong by 1 of the result"]
    assert dvalues["reasons"] == ["broken: ZeroDivisionError: division by zero"]
    assert dx["skipped"] == "it has no such product"


@pytest.mark.parametrize("transpose", [False, True])
def test_single_elements_of_stored_blocks(transpose):
    from scipy.sparse import csr_array

    problem, _ = peers._problem(PLAIN, Programs(), 0)
    dense = np.zeros((8, 4, 16, 32), np.float32)
    dense[np.asarray(problem.p.row), np.asarray(problem.p.col)] = problem.values
    dense = dense.transpose(0, 2, 1, 3).reshape(128, 128)
    start, column, data = _gpu_peers.elements(problem, transpose)
    found = csr_array((data, column, start), shape=(128, 128)).toarray()
    np.testing.assert_array_equal(found, dense.T if transpose else dense)
