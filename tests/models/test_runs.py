"""Results as JSON lines, and what is prepared in advance."""

import threading

import pytest

from models import _runs
from models._cli import Mistake


def test_a_line_cut_short_is_run_again_and_others_are_refused(tmp_path):
    path = tmp_path / "mlp.jsonl"
    runs = _runs.Runs(path, resume=True)
    runs.add({"seed": 0}, {"accuracy": 1.0}, {})
    with path.open("a") as file:
        file.write('{"settings": {"se')
    again = _runs.Runs(path, resume=True)
    assert again.get({"seed": 0}) == {"accuracy": 1.0}
    again.add({"seed": 1}, {"accuracy": 0.5}, {})
    assert _runs.Runs(path, resume=True).get({"seed": 1}) == {"accuracy": 0.5}
    path.write_text("nonsense\n")
    with pytest.raises(Mistake, match=r"line 1 of .*mlp.jsonl is no result: remove it, or start"):
        _runs.Runs(path, resume=True)


def test_a_new_start_puts_older_results_aside(tmp_path):
    path = tmp_path / "mlp.jsonl"
    _runs.Runs(path, resume=False).add({"seed": 0}, {"accuracy": 1.0}, {})
    assert _runs.Runs(path, resume=False).get({"seed": 0}) is None
    assert (tmp_path / "mlp-before.jsonl").exists()
    assert not path.exists()


def test_results_come_in_order_and_are_prepared_while_the_caller_is_busy():
    started = [threading.Event() for _ in range(5)]

    def task(i):
        def run():
            started[i].set()
            return i

        return run

    with _runs.in_advance(map(task, range(5)), 2) as results:
        assert next(results) == 0
        assert started[2].wait(10)  # two ahead
        assert not started[3].is_set()
        assert list(results) == [1, 2, 3, 4]


def test_what_fails_in_advance_fails_where_it_is_wanted():
    with _runs.in_advance([lambda: 1, lambda: 1 // 0, lambda: 3], 1) as results:
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
