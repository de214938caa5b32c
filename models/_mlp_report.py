"""What `models.mlp` shows at its end: tables, one picture of all comparisons, and the numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bsjax import plot
from models import _report as shared
from models._report import QUIET, pyplot

TITLES = {
    "goal": "Sampled products beside dense ones",
    "widths": "Width",
    "policies": "Policies and meProp, equal steps",
    "flops": "Policies and meProp, equal floating-point operations",
    "samplers": "Samplers, policy forward",
    "cross": "Samplers, policies backward and weight",
    "noise": "Other noise, and direct feedback alignment",
}
PANELS = {  # what each curve is named by, and what it is over
    "policies": ("kind", "fraction"),
    "flops": ("kind", "fraction"),
    "samplers": ("sampler", "fraction"),
    "widths": ("kind", "width"),
}


def report(
    out: Path,
    about: str,
    of_part: Mapping[str, Sequence[Any]],
    results: Mapping[Any, Sequence[Mapping[str, float]]],
    per_epoch: int,
    title: Callable[[Any], str],
) -> None:
    """Prints a table for each part, and saves `mlp.json` and `mlp.png`: accuracies in percent, with
    their deviation over seeds in brackets, and "sampled" with sampling left on.

    `results` are those of all seeds of a case, whose accuracies are shares; `of_part` lists the
    cases of each part, a dense one first.
    """
    rows = {}
    for part, cases in of_part.items():
        rows[part] = [_row(case, cases, results, per_epoch, title) for case in cases]
        heading = f"{TITLES[part]}. {about}"
        cells = {_unique(row["name"], row, rows[part]): _cells(row) for row in rows[part]}
        shared.print_table(heading, cells)
    shared.save_json(out / "mlp.json", {"about": about, "parts": rows})
    draw(out / "mlp.png", rows)
    print(f"The picture, the numbers and all runs are in {out}")


def _row(
    case: Any,
    cases: Sequence[Any],
    results: Mapping[Any, Sequence[Mapping[str, float]]],
    per_epoch: int,
    title: Callable[[Any], str],
) -> dict[str, Any]:
    """One line of a table, in points."""
    dense = next(c for c in cases if c.method.kind == "dense" and c.width == case.width)
    found, against = results[case], results[dense]
    exact, reference = (100 * np.array([one["accuracy"] for one in of]) for of in (found, against))
    left_on = [100 * one["with sampling"] for one in found if "with sampling" in one]
    return {
        "name": title(case.method),
        "kind": case.method.kind,
        "sampler": case.method.sampler,
        "fraction": case.method.fraction,
        "width": case.width,
        "epochs": case.steps / per_epoch,
        "flops": found[0]["flops"],
        "flops of dense": against[0]["flops"] * case.steps / dense.steps,
        "accuracy": float(exact.mean()),
        "deviation": float(exact.std(ddof=1)) if len(exact) > 1 else None,
        "with sampling": float(np.mean(left_on)) if left_on else None,
        "below dense": float(reference.mean() - exact.mean()),
    }


def _unique(name: str, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The name, with the width where there are several."""
    several = len({one["width"] for one in rows}) > 1
    return f"{name}, {row['width']} wide" if several else name


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    spread = "" if row["deviation"] is None else f" ({row['deviation']:.2f})"
    sampled = "" if row["with sampling"] is None else f"{row['with sampling']:.2f}"
    return {
        "epochs": f"{row['epochs']:.1f}",
        "TFLOP": f"{row['flops'] / 1e12:.3g}",
        "step, dense 1": f"{row['flops'] / row['flops of dense']:.3f}",
        "accuracy %": f"{row['accuracy']:.2f}{spread}",
        "sampled": sampled,
        "below dense": f"{row['below dense']:.2f}",
    }


def draw(path: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A panel for each part that has curves: accuracy against fraction, or against width."""
    drawn = [part for part in PANELS if part in rows]
    if not drawn:
        return
    columns = min(2, len(drawn))
    high = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        high, columns, figsize=(6.4 * columns, 4.4 * high), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(drawn) :]:
        ax.set_axis_off()
    for ax, part in zip(axes.flat, drawn, strict=False):
        _panel(ax, TITLES[part], rows[part], *PANELS[part])
    shared.save_figure(path, figure)


def _panel(ax: Any, heading: str, rows: Sequence[Mapping[str, Any]], name: str, x: str) -> None:
    """A curve for each `name` over `x`, within the deviation of seeds; over fractions the dense one
    is a line."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        if row["kind"] == "dense" and x == "fraction":
            ax.axhline(row["accuracy"], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
            shared.label(ax, "dense", row["accuracy"])
            continue
        point = (row[x], row["accuracy"], row["deviation"] or 0.0)
        points.setdefault(row[name], []).append(point)
        if row["with sampling"] is not None and x == "width":
            point = (row[x], row["with sampling"], 0.0)
            points.setdefault(f"{row[name]}, sampling left on", []).append(point)
    curves = {one: tuple(zip(*found, strict=True)) for one, found in points.items()}
    named = {one: (at, value) for one, (at, value, _) in curves.items()}
    plot.curves(named, ax, heading, x=x, y="accuracy (%)")
    drawn = ax.get_lines()[-len(curves) :]
    for i, (line, (at, value, deviation)) in enumerate(zip(drawn, curves.values(), strict=True)):
        line.set_marker("o")
        if i >= len(plot.LINES):  # its color is taken
            line.set_linestyle("dashed")
        low, high = (np.array(value) + sign * np.array(deviation) for sign in (-1, 1))
        ax.fill_between(at, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    ax.legend(frameon=False, fontsize=9)  # again, with markers and dashes
    if x == "width":
        widths = sorted({row["width"] for row in rows})
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, map(str, widths))
