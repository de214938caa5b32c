"""Pictures of ratios: time over dense against density, in a grid of panels."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

QUIET = "#6b6b6b"


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Points `(density, ratio, low, high)`, or, as a goal, a function of the density."""

    name: str
    color: str
    points: Sequence[tuple[float, float, float, float]] = ()
    goal: Callable[[np.ndarray], np.ndarray] | None = None
    dashed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One picture of the grid."""

    title: str
    lines: Sequence[Line]


def draw(path: Path, grid: Sequence[Sequence[Panel]], title: str) -> None:
    """Writes a PNG. Both axes are logarithmic; the line at 1 is where dense is as fast."""
    rows, columns = len(grid), max(map(len, grid))
    figure = Figure(figsize=(4.2 * columns, 0.6 + 3.1 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for row, panels in zip(axes, grid, strict=True):
        for ax, panel in zip(row, panels, strict=True):
            _draw(ax, panel)
        row[0].set_ylabel("time / dense time", color=QUIET, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("density", color=QUIET, fontsize=9)
    named = {
        name: handle
        for ax in axes.flat
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def _draw(ax, panel: Panel) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.axhline(1, color="#222222", linewidth=1)
    for line in panel.lines:
        if line.goal is not None:
            at = np.geomspace(0.03, 0.5)
            ax.plot(at, line.goal(at), color=line.color, linewidth=5, alpha=0.18, label=line.name)
            continue
        at, ratio, low, high = np.array(sorted(line.points)).T
        style = {"linestyle": (0, (3, 2)), "marker": None} if line.dashed else {"marker": "o"}
        ax.plot(
            at, ratio, color=line.color, linewidth=1.6, markersize=3.5, label=line.name, **style
        )
        ax.fill_between(at, low, high, color=line.color, alpha=0.15, linewidth=0)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis, ticks in (
        (ax.xaxis, [0.03, 0.05, 0.1, 0.25, 0.5]),
        (ax.yaxis, [2.0**i for i in range(-6, 6)]),
    ):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    ax.grid(color="#e4e1da", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["bottom", "left"]].set_color("#bdb8ad")
    ax.tick_params(color="#bdb8ad", labelcolor=QUIET, labelsize=8)
    ax.set_title(panel.title, loc="left", fontsize=9)
