"""What the records of `models.widths` say: a table, and two pictures."""

import collections
import functools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models import _report as report
from models import _text as texts
from models._widths import Kind, Run


class Point(NamedTuple):
    """One kind at one width, at its best learning rate."""

    learning_rate: float
    edge: bool  # the best rate was the smallest or largest of several
    flops: int
    parameters: int
    heldout: list[float]  # bits per byte, by seed
    heldout_sampled: list[float]
    seconds: float


type Results = Mapping[tuple[Kind, Run], Mapping[str, Any]]


def points(results: Results) -> dict[str, dict[int, Point]]:
    """Of each kind, the points by width. The learning rate is the one with the lowest mean over
    seeds of bits on the text to choose by; rates at which a run diverged are out."""
    made: dict[str, dict[int, Point]] = {}
    for kind in dict.fromkeys(kind for kind, _ in results):
        runs = {run: found for (of, run), found in results.items() if of == kind}
        if point := _point(runs):
            made.setdefault(kind.name, {})[kind.width] = point
    return made


def show(folder: Path, title: str, results: Results, text: texts.Text) -> None:
    """Prints the table, saves the pictures."""
    found = points(results)
    widths = sorted({width for line in found.values() for width in line})
    if not found:
        print("Every run diverged: give lower --learning_rates")
        return
    dense = found.get("dense", {})
    rows = {
        f"{width}, {name}": _row(line[width], dense.get(width))
        for width in widths
        for name, line in found.items()
        if width in line
    }
    rows["unigram"] = {"bits/byte": texts.unigram_bits(text.train, text.heldout)}
    report.print_table(f"{title}; held-out bits/byte, mean and half the range of seeds", rows)
    if any(point.edge for line in found.values() for point in line.values()):
        print("* the best of the learning rates is their smallest or largest: give more of them")
    lines = {name: [(w, p.heldout) for w, p in line.items()] for name, line in found.items()}
    lines |= {
        f"{name}, sampling left on": [(w, p.heldout_sampled) for w, p in line.items()]
        for name, line in found.items()
        if name != "dense"
    }
    costs = {name: [(p.flops, p.heldout) for p in line.values()] for name, line in found.items()}
    save = functools.partial(report.save_lines, title=title, y="bits per byte, held-out")
    save(folder / "widths-loss.png", lines, x="width", ticks=widths)
    save(folder / "widths-flops.png", costs, x="FLOPs spent on training, sampling included")
    print(f"Results and pictures are in {folder}")


def _point(runs: Mapping[Run, Mapping[str, Any]]) -> Point | None:
    """The best learning rate; None if all diverged."""
    by_rate: dict[float, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for run, found in runs.items():
        by_rate[run.learning_rate].append(found)
    means = {
        rate: statistics.fmean(found["validation"] for found in seeds)
        for rate, seeds in by_rate.items()
        if all(found["validation"] is not None for found in seeds)
    }
    if not means:
        return None
    best = min(means, key=means.__getitem__)
    chosen = by_rate[best]
    return Point(
        learning_rate=best,
        edge=len(by_rate) > 1 and best in (min(by_rate), max(by_rate)),
        flops=chosen[0]["flops"],
        parameters=chosen[0]["parameters"],
        heldout=[found["heldout"] for found in chosen],
        heldout_sampled=[found["heldout_sampled"] for found in chosen],
        seconds=statistics.fmean(found["seconds"] for found in chosen),
    )


def _row(point: Point, dense: Point | None) -> dict[str, Any]:
    half = (max(point.heldout) - min(point.heldout)) / 2
    return {
        "parameters": point.parameters,
        "rate": f"{point.learning_rate:g}{'*' if point.edge else ''}",
        "TFLOPs": point.flops / 1e12,
        "of dense": point.flops / dense.flops if dense else None,
        "bits/byte": statistics.fmean(point.heldout),
        "+-": half if len(point.heldout) > 1 else None,
        "sampling on": statistics.fmean(point.heldout_sampled),
        "s/run": point.seconds,
    }
