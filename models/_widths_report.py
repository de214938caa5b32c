"""What the records of `models.widths` say: a table, and two pictures."""

import collections
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models import _report as report
from models import _text as texts


class Point(NamedTuple):
    """One kind at one width, at its best learning rate."""

    learning_rate: float
    edge: bool  # the best rate was the smallest or largest of several
    flops: int
    parameters: int
    heldout: list[float]  # bits per byte, by seed
    heldout_sampled: list[float]
    seconds: float


def points(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Point]]:
    """Of each kind, dense first, the points by width. The learning rate is the one with the lowest
    mean over seeds of bits on the validation text; rates of which a run diverged are out."""
    runs = collections.defaultdict(dict)
    for record in records:  # later ones replace earlier ones
        kind = record["kind"], record["width"]
        runs[kind][record["learning_rate"], record["seed"]] = record
    made = {kind: _point(list(found.values())) for kind, found in runs.items()}
    names = sorted({name for name, _ in made}, key=lambda name: (name != "dense", name))
    return {name: {w: p for (n, w), p in sorted(made.items()) if n == name and p} for name in names}


def show(folder: Path, title: str, records: Sequence[Mapping[str, Any]], text: texts.Text) -> None:
    """Prints the table, saves the pictures."""
    found = points(records)
    widths = sorted({width for line in found.values() for width in line})
    rows = {
        f"{width}, {name}": _row(point, found["dense"].get(width))
        for width in widths
        for name, line in found.items()
        if (point := line.get(width))
    }
    if not rows:
        print("Every run diverged: give lower --learning_rates")
        return
    rows["unigram"] = {"bits/byte": texts.unigram_bits(text.train, text.heldout)}
    report.print_table(f"{title}; held-out bits/byte, mean and half the range of seeds", rows)
    if any(point.edge for line in found.values() for point in line.values()):
        print("* the best of the learning rates is their smallest or largest: give more of them")
    lines = {
        name: [(w, p.heldout) for w, p in line.items()] for name, line in found.items() if line
    }
    left_on = {
        f"{name}, sampling left on": [(w, p.heldout_sampled) for w, p in line.items()]
        for name, line in found.items()
        if line and name != "dense"
    }
    costs = {
        name: [(p.flops, p.heldout) for p in line.values()] for name, line in found.items() if line
    }
    save = functools.partial(report.save_lines, title=title, y="bits per byte, held-out")
    save(folder / "widths-loss.png", lines | left_on, x="width", ticks=widths)
    x = "FLOPs spent on training, sampling included"
    save(folder / "widths-flops.png", costs, x=x)
    print(f"The pictures are in {folder}")


def _point(runs: Sequence[Mapping[str, Any]]) -> Point | None:
    """The best learning rate; None if all diverged."""
    rates = sorted({run["learning_rate"] for run in runs})
    by_rate = {rate: [run for run in runs if run["learning_rate"] == rate] for rate in rates}
    # a rate that an interrupted sweep has tried with fewer seeds would win or lose by luck
    most = max(map(len, by_rate.values()))
    means = {
        rate: statistics.fmean(run["validation"] for run in found)
        for rate, found in by_rate.items()
        if len(found) == most and all(run["validation"] is not None for run in found)
    }
    if not means:
        return None
    best = min(means, key=means.__getitem__)
    chosen = sorted(by_rate[best], key=lambda run: run["seed"])
    return Point(
        learning_rate=best,
        edge=len(rates) > 1 and best in (rates[0], rates[-1]),
        flops=chosen[0]["flops"],
        parameters=chosen[0]["parameters"],
        heldout=[run["heldout"] for run in chosen],
        heldout_sampled=[run["heldout_sampled"] for run in chosen],
        seconds=statistics.fmean(run["seconds"] for run in chosen),
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
