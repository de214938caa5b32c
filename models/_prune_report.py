"""What pruning shows at its end: a table, and pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models import _report as report

DENSE = "dense"
MAGNITUDE, GRADIENT, RANDOM = CRITERIA = ("magnitude", "gradient", "random")
GIVEN = "as given"  # in the place of dense, of a model that has been pruned before
SHOWN = 8  # patterns in the picture


def title(method: str, density: float) -> str:
    """What a model is called."""
    return f"{method} {density:g}" if method in CRITERIA else method


def show(
    config: Any,
    unit: str,
    rows: Sequence[Any],
    seconds: Mapping[str, np.ndarray],
    models: Mapping[str, Any],
) -> None:
    """Prints the table and saves the pictures. The first row is the model that was pruned;
    `seconds` are those of this one and of the pruned ones, by their titles."""
    name = "bits/byte" if unit == "byte" else "nats/token"
    table, base = {}, rows[0].method
    for row in rows:
        name_of_row = title(row.method, row.density)
        cells = {"stored": row.stored, "parameters": row.parameters, name: row.loss}
        if unit == "token":
            cells["perplexity"] = math.exp(row.loss)
        if row.tuned is not None:
            cells[f"{name}, {config.steps} steps more"] = row.tuned
            if unit == "token":
                cells["perplexity, then"] = math.exp(row.tuned)
        if (timed := seconds.get(name_of_row)) is not None:
            cells["ms"] = 1e3 * float(np.median(timed))
            cells[f"speed ({base} = 1)"] = report.ratio(seconds[base], timed)
        table[name_of_row] = cells
    window = config.batch * config.length
    report.print_table(f"Held-out {name}; forward passes of {window:,} {unit}s", table)
    stem, densities = str(config.out / "prune"), sorted(set(config.densities))
    if len(densities) > 1:
        report.save_lines(
            f"{stem}.png",
            _lines(rows, densities, config.steps),
            title=f"Held-out loss, blocks of {config.block}",
            x="stored share of blocks",
            y=name.replace("/", " per "),
            ticks=densities,
        )
    fewest = models[title(config.criteria[0], densities[0])]
    patterns = dict(list(report.patterns_in(fewest).items())[:SHOWN])
    report.save_patterns(f"{stem}-patterns.png", patterns, columns=4)


def _lines(
    rows: Sequence[Any], densities: Sequence[float], steps: int
) -> dict[str, list[tuple[float, list[float]]]]:
    """Loss against density, pruned and fine-tuned, and the dense model's for comparison."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row in sorted(rows, key=lambda row: row.density):
        found = {row.method: row.loss}
        if row.tuned is not None:
            found[f"{row.method}, {steps} steps more"] = row.tuned
        for name, loss in found.items():
            at = densities if row is rows[0] else [row.density]
            lines.setdefault(name, []).extend((density, [loss]) for density in at)
    return lines
