"""Pictures: what is drawn is what was asked for, and nothing else of matplotlib is touched."""

import builtins
import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt

from bsjax import patterns, plot

MASK = patterns.random((6, 9), 0.3)


class Pattern:
    """As much of a BlockPattern as a picture asks for."""

    block = (8, 16)

    def mask(self):
        return MASK


@pytest.fixture(autouse=True)
def closed():
    assert not plt.get_fignums()
    yield
    plt.close("all")


def drawn(axes):
    axes.figure.canvas.draw()
    return axes


def test_pattern_shows_the_mask():
    axes = drawn(plot.pattern(MASK, title="a mask"))
    (image,) = axes.get_images()
    np.testing.assert_array_equal(np.asarray(image.get_array()), MASK)
    assert image.origin == "upper"  # block (0, 0) top left
    stored, empty = (image.cmap(image.norm(v)) for v in (1.0, 0.0))
    assert sum(stored[:3]) < sum(empty[:3])  # dark where stored
    assert axes.get_title() == "a mask"
    assert axes.get_xlabel() == "6 × 9 blocks, 29.6% stored"  # noqa: RUF001
    assert axes.get_box_aspect() == pytest.approx(6 / 9)


def test_pattern_of_blocks_has_the_proportions_of_the_matrix():
    axes = drawn(plot.pattern(Pattern()))
    assert axes.get_xlabel() == "6 × 9 blocks of 8 × 16, 29.6% stored"  # noqa: RUF001
    assert axes.get_box_aspect() == pytest.approx(6 * 8 / (9 * 16))
    assert plot.pattern(np.ones((1, 50), bool)).get_box_aspect() == 0.25  # never a hair


def test_lines_between_blocks_only_where_there_is_room():
    assert len(plot.pattern(MASK).xaxis.get_minorticklocs()) == 8
    assert len(plot.pattern(patterns.banded((40, 40), 1)).xaxis.get_minorticklocs()) == 0


def test_draws_into_the_given_axes():
    figure, (a, b, c) = plt.subplots(1, 3)
    assert plot.pattern(MASK, a) is a
    assert plot.mixing([0.5, 1], b) is b
    assert plot.curves({"loss": [3, 2]}, ax=c) is c
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()


@pytest.mark.parametrize("as_kind", [list, dict])
def test_patterns_is_a_sheet(as_kind):
    names = [f"mask {i}" for i in range(6)]
    figure = plot.patterns(as_kind([(name, MASK) for name in names]))
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == names
    assert [axes.get_xlabel() for axes in figure.axes] == ["29.6%"] * 6
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (2, 4)
    assert plot.patterns([("one", Pattern())]).axes[0].get_gridspec().ncols == 1


def test_mixing():
    profile = patterns.mixing_profile(patterns.strides(27, 3))
    (line, *_) = drawn(plot.mixing(profile)).get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array(profile))
    assert line.axes.get_legend() is None
    named = drawn(plot.mixing({"strides": profile, "band": [0.1, 0.2]}, title="n = 27"))
    assert [text.get_text() for text in named.get_legend().get_texts()] == ["strides", "band"]
    assert named.get_title("left") == "n = 27"
    again = plot.mixing([("strides", np.array(profile))])
    np.testing.assert_allclose(again.get_lines()[0].get_ydata(), 100 * np.array(profile))


def test_curves():
    values = np.random.default_rng(0).normal(size=40)
    lines = {"short": values[:3], "pair": ([2, 4], [1, 2]), "none": []}
    axes = drawn(plot.curves(lines, title="t", x="seconds", y="bits per byte"))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("seconds", "bits per byte")
    short, pair, none = axes.get_lines()
    np.testing.assert_array_equal(short.get_xydata(), np.stack([range(3), values[:3]], axis=1))
    np.testing.assert_array_equal(pair.get_xydata(), [[2, 1], [4, 2]])
    assert len(none.get_xdata()) == 0
    assert len({line.get_color() for line in axes.get_lines()}) == 3


def test_curves_smooth_by_a_trailing_mean():
    values = np.random.default_rng(0).normal(size=40)
    raw, smooth = drawn(plot.curves({"loss": values}, smooth=5)).get_lines()
    expected = [values[max(0, i - 4) : i + 1].mean() for i in range(40)]
    np.testing.assert_array_equal(raw.get_ydata(), values)
    np.testing.assert_allclose(smooth.get_ydata(), expected)
    # one step that failed does not erase what follows, nor does a run shorter than the window
    values[10] = np.nan
    _, smooth = plot.curves({"loss": values}, smooth=5).get_lines()
    np.testing.assert_allclose(smooth.get_ydata()[15:], expected[15:])
    _, smooth = plot.curves({"loss": [4.0, 2.0]}, smooth=5).get_lines()
    np.testing.assert_allclose(smooth.get_ydata(), [4, 3])
    plot.curves({"loss": []}, smooth=5)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: plot.pattern(MASK.astype(int)),
            TypeError,
            "plot.pattern: `p` must be bool, got int64",
        ),
        (
            lambda: plot.pattern([[True]]),
            TypeError,
            "plot.pattern: `p` must be a bool mask or have a `.mask()`, got list",
        ),
        (
            lambda: plot.patterns([("fine", MASK), ("odd", MASK[0])]),
            ValueError,
            "plot.patterns: `odd` must have shape (rows, columns) with at least one of each, got "
            "(9,)",
        ),
        (
            lambda: plot.patterns(MASK),
            TypeError,
            "plot.patterns: `named` must hold one or more things under different names, got "
            "ndarray: pass a dict {name: ...} or a list [(name, ...), ...].",
        ),
        (lambda: plot.patterns([("a", MASK), ("a", MASK)]), TypeError, "different names"),
        (lambda: plot.patterns({}), TypeError, "one or more things"),
        (
            lambda: plot.patterns({"a": MASK}, columns=0),
            ValueError,
            "plot.patterns: `columns` must be a whole number of at least 1, got 0",
        ),
        (lambda: plot.mixing(0.5), TypeError, "plot.mixing: `profiles` must hold one or more"),
        (
            lambda: plot.mixing({"a": ["full"]}),
            ValueError,
            "plot.mixing: `a` must be a sequence of numbers, or a pair (x, y) of equally long "
            "ones, got ['full']: one number for each point.",
        ),
        (
            lambda: plot.curves({"loss": ([1, 2], [1, 2, 3])}),
            ValueError,
            "plot.curves: `loss` must be a sequence of numbers",
        ),
        (lambda: plot.curves({"loss": 3.0}), ValueError, "plot.curves: `loss` must be"),
        (
            lambda: plot.curves({"loss": [1.0]}, smooth=0),
            ValueError,
            "plot.curves: `smooth` must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_errors_leave_no_figure_behind(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()
    assert not plt.get_fignums()


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    message = "bsjax.plot draws with matplotlib, which could not be imported: install bsjax[plot]."
    for draw in (
        lambda: plot.pattern(MASK),
        lambda: plot.patterns({"a": MASK}),
        lambda: plot.mixing([0.5]),
        lambda: plot.curves({"loss": [1.0]}),
    ):
        with pytest.raises(ImportError, match=re.escape(message)):
            draw()


def test_nothing_is_shown_and_no_backend_is_chosen(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    plt.close(plt.figure())  # matplotlib chooses its backend at the first figure: before we watch
    monkeypatch.setattr(plt, "show", refuse)
    monkeypatch.setattr(plt, "switch_backend", refuse)
    monkeypatch.setattr(mpl, "use", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    styles = dict(mpl.rcParams)
    plot.pattern(MASK)
    plot.patterns({"a": MASK})
    plot.mixing([0.5, 1])
    plot.curves({"loss": [1.0]}, smooth=2)
    assert dict(mpl.rcParams) == styles


def test_importing_loads_no_matplotlib():
    code = "import bsjax.plot, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
