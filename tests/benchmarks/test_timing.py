"""The race: pairs on one machine in one mood, the first round thrown away."""

import time

import jax
import numpy as np
import pytest

from benchmarks import _gpu_clock, _timing
from benchmarks._timing import beside, clocked, race, spread


def test_every_run_runs_in_every_round_and_the_first_rotates():
    calls = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    times = race(runs, rounds=4)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    warm_up, rest = calls[:3], calls[3:]
    assert warm_up == [("a", 0), ("b", 0), ("c", 0)]
    by_round = [rest[3 * i : 3 * i + 3] for i in range(4)]
    assert ["".join(name for name, _ in one) for one in by_round] == ["abc", "bca", "cab", "abc"]
    assert [{i for _, i in one} for one in by_round] == [{0}, {1}, {2}, {3}]


def test_a_time_belongs_to_its_run():
    times = race({"slow": lambda _: time.sleep(0.02), "quick": lambda _: None}, rounds=3)
    assert (times["slow"] >= 0.02).all()
    assert spread(times["slow"] / times["quick"]).low > 1


@pytest.mark.parametrize(
    ("budget", "rounds"), [(1e-9, _timing.FEWEST), (1.0, _timing.MOST), (0.1, 10)]
)
def test_the_budget_chooses_the_rounds(monkeypatch, budget, rounds):
    monkeypatch.setattr(_timing, "seconds", lambda run, i: 0.005)
    assert len(race({"a": None, "b": None}, budget=budget)["a"]) == rounds  # pyright: ignore


def test_spread_is_the_median_and_its_quartiles():
    assert spread([9, 1, 2, 3, 4]) == (3, 2, 4)


def test_a_record_holds_medians_and_quartiles_of_pairs():
    dense = np.array([2.0, 4.0, 8.0, 16.0, 32.0])
    found = beside(dense / np.array([9, 1, 2, 3, 4]), dense)
    assert found.pop("rounds") == 5
    assert found.keys() == {
        f"{name}{end}" for name in ("ms", "dense_ms", "ratio") for end in ("", "_low", "_high")
    }
    assert (found["dense_ms_low"], found["dense_ms"], found["dense_ms_high"]) == (4e3, 8e3, 16e3)
    # the median of the quotients, which is not the quotient of the medians
    assert (found["ratio_low"], found["ratio"], found["ratio_high"]) == (1 / 4, 1 / 3, 1 / 2)
    assert found["ms"] == 4e3


@pytest.mark.parametrize("clock", ["wall", "kernels"])
def test_which_clock_it_was_is_known(monkeypatch, clock):
    """On a GPU it is that of all runs, which have as many samples."""
    assert clocked({"a": lambda _: 0}, rounds=2)[0] == "wall"

    def measured(runs, rounds):
        assert rounds == 3
        wall = np.ones(rounds)
        return {
            name: _gpu_clock.Times(clock, np.arange(3.0 + i), wall, None)
            for i, name in enumerate(runs)
        }

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_gpu_clock, "measured", measured)
    found, times = clocked({"a": None, "b": None}, rounds=3)  # pyright: ignore
    assert found == clock
    assert [list(one) for one in times.values()] == [[0, 1, 2]] * 2
