"""Which cases there are, what is wanted of them, and where dense becomes the better choice."""

import numpy as np
import pytest

import bsjax
from benchmarks import _report
from benchmarks._cases import FULL, NEAR, PATTERNS, QUICK, Suite, cases, goal, nearest


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("density", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("grid", [(16, 16), (8, 32), (64, 256)])
def test_a_pattern_is_near_the_density_or_left_out(pattern, density, grid):
    mask = nearest(pattern, grid, density)
    if mask is None:
        assert pattern != "random"
        assert grid != (64, 256) or density < 0.1
    else:
        assert mask.shape == grid
        assert density / NEAR <= mask.mean() <= density * NEAR


def test_a_graph_takes_the_nearest_number_of_links():
    for density in (0.1, 0.25, 0.5):
        mask = nearest("barabasi_albert", (32, 32), density)
        every = [bsjax.patterns.barabasi_albert(32, m).mean() for m in range(1, 32)]
        assert abs(np.log(mask.mean() / density)) == pytest.approx(
            min(abs(np.log(np.array(every) / density)))
        )


def test_the_suites_are_those_of_the_documentation():
    full, quick = list(cases(FULL)), list(cases(QUICK))
    assert {(case.shape, case.tokens) for case in full} == {
        *(((2048, 2048), n) for n in (64, 512, 2048)),
        *(((1024, 4096), n) for n in (64, 2048, 4096)),
    }
    assert {case.block for case in full} == {16, 32, 64, 128}
    assert {case.pattern for case in full if case.tokens == 2048} == set(PATTERNS)
    assert {case.implementations for case in full if case.tokens == 512} == {("auto",)}
    assert any(case.peers for case in full)
    assert len(quick) * 5 < len(full)


def test_goals_hold_where_the_house_set_them():
    square = cases(Suite(shapes=[(2048, 2048)], patterns=["random"]))
    goals = {
        (case.tokens, case.block, case.density, name): goal(case, name)
        for case in square
        for name in ("xla", "auto", "dense")
    }
    assert goals[2048, 128, 0.25, "xla"] == pytest.approx(1.8 * 0.25 + 0.15)
    assert goals[2048, 64, 0.1, "xla"] == pytest.approx(2.8 * 102 / 1024 + 0.2)
    assert goals[2048, 64, 0.5, "auto"] == goals[512, 16, 0.5, "auto"] == 1.08
    assert goals[2048, 64, 0.1, "auto"] == goals[2048, 64, 0.1, "xla"]
    for key in ((64, 64, 0.1, "auto"), (2048, 32, 0.1, "xla"), (2048, 64, 0.1, "dense")):
        assert goals[key] is None


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(0.1, 0.5), (0.3, 1.5)], "0.20"),
        ([(0.3, 1.5), (0.1, 0.5), (0.2, 0.6)], "0.24"),
        ([(0.1, 1.0), (0.3, 1.5)], "< 0.1"),
        ([(0.1, 0.2), (0.5, 0.99)], "> 0.5"),
    ],
)
def test_break_even_lies_between_what_was_measured(points, text):
    assert _report.break_even(points)[1] == text
