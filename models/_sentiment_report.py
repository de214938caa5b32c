"""What `models.sentiment` shows at its end: a table, the numbers, and pictures of one unit."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from bsjax import plot
from models import _report as shared
from models._encode import AFTER, BEFORE, frame
from models._probe import CHOOSE, Round, Unit
from models._report import QUIET, pyplot
from models._reviews import Labelled

NEGATIVE, POSITIVE = plot.LINES[1], plot.LINES[0]
KINDS = {"last": "tanh(c) after the last byte", "mean": "mean tanh(c)"}
COLUMNS = 80  # characters in a line of the heat-map
LAST_DRAWN = 0x24F  # of Unicode: what every monospaced font has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """How often a method was right about a set, over the test texts of all rounds."""

    accuracy: float
    error: float  # standard error of so many texts
    deviation: float | None  # over rounds
    details: Mapping[str, Any]

    @classmethod
    def of(
        cls, shares: Sequence[float], counts: Sequence[int], details: Mapping[str, Any]
    ) -> "Cell":
        """Of the right shares in rounds with so many test texts."""
        mean = float(np.average(shares, weights=counts))
        error = float(np.sqrt(mean * (1 - mean) / sum(counts)))
        spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else None
        return cls(accuracy=mean, error=error, deviation=spread, details=details)

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ({100 * self.error:.1f})"


def report(
    out: Path,
    sets: Sequence[Labelled],
    rounds: Sequence[Sequence[Round]],
    rows: Mapping[str, Mapping[str, Cell]],
    *,
    about: Mapping[str, Any],
    grids: Mapping[str, Sequence[float]],
    units: Sequence[tuple[Unit, np.ndarray]],
    kind: str,
    traces: Sequence[tuple[str, np.ndarray]],
) -> None:
    """Prints the table, and saves `sentiment.json`, `sentiment-unit.png`, `sentiment-heatmap.png`.

    `units` are, for each set, the unit of the first model in states of that `kind`, and its value
    for each text; `traces`
    are texts with the first set's unit after each byte of theirs, framed.
    """
    protocols = {one.name: protocol(one, its) for one, its in zip(sets, rounds, strict=True)}
    title = "Right on test texts in percent (standard error)"
    models = about["models"]
    cells = {}
    for name, row in rows.items():
        model = models.get(name.partition(",")[0])
        columns = {column: str(cell) for column, cell in row.items()}
        cells[name] = {**columns, "parameters": model and model["parameters"]}
    shared.print_table(title, cells)
    for name, how in protocols.items():
        print(f"{name}: {how}")
    for line in edges(rows, grids):
        print(line)
    results = {
        name: {column: dataclasses.asdict(cell) for column, cell in row.items()}
        for name, row in rows.items()
    }
    data = {
        one.name: {"texts": len(one.texts), "digest": one.digest, "protocol": protocols[one.name]}
        for one in sets
    }
    drawn = {
        one.name: {"state": kind, **unit._asdict()}
        for one, (unit, _) in zip(sets, units, strict=True)
    }
    everything = {**about, "data": data, "results": results, "units drawn": drawn}
    shared.save_json(out / "sentiment.json", everything)
    histograms(out / "sentiment-unit.png", sets, rounds, units, kind)
    if traces:
        heatmap(out / "sentiment-heatmap.png", units[0][0], traces)
    print(f"Pictures and numbers are in {out}")


def protocol(one: Labelled, rounds: Sequence[Round]) -> str:
    """On what everything was fitted, chosen and measured, in words."""
    fit, choose, _, test = (len(part) for part in rounds[0])
    if one.parts:
        return (
            f"fitted to train ({fit:,}), penalty chosen on dev ({choose:,}), unit and threshold on "
            f"both, measured on test ({test:,})"
        )
    return (
        f"{len(rounds)}-fold cross-validation of {len(one.texts):,} texts; in each fold the "
        f"penalty chosen on {CHOOSE:.0%} of the training part, unit and threshold on all of that"
    )


def edges(rows: Mapping[str, Mapping[str, Cell]], grids: Mapping[str, Sequence[float]]) -> list:
    """A warning for each set where most rounds chose the first or the last penalty of the grid."""
    found = []
    for name, row in rows.items():
        for column, cell in row.items():
            chosen = cell.details.get("penalties")
            if not chosen:
                continue
            flag = "trigram_penalties" if name == "byte trigrams" else "penalties"
            grid = grids["byte trigrams" if name == "byte trigrams" else "state"]
            for end in {min(grid), max(grid)}:
                if len(grid) > 1 and 2 * chosen.count(end) > len(chosen):
                    found.append(
                        f"{name} on {column}: {end:g} was chosen, the end of --{flag}: the best "
                        "may lie beyond it"
                    )
    return found


def histograms(
    path: Path,
    sets: Sequence[Labelled],
    rounds: Sequence[Sequence[Round]],
    units: Sequence[tuple[Unit, np.ndarray]],
    kind: str,
) -> None:
    """The most predictive unit after texts of either label: those of the test, or all texts where
    rounds had different ones; the threshold is that of the rounds."""
    columns = min(3, len(sets))
    high = -(-len(sets) // columns)
    figure, axes = pyplot.subplots(
        high, columns, figsize=(4.6 * columns, 3.4 * high), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(sets) :]:
        ax.set_axis_off()
    for ax, one, its, (unit, values) in zip(axes.flat, sets, rounds, units, strict=False):
        which = its[0].test if one.parts else np.arange(len(values))
        values, labels = values[which], one.labels[which]
        bins = np.linspace(values.min(), values.max() + 1e-6, 41)
        for label, color in enumerate((NEGATIVE, POSITIVE)):
            ax.hist(values[labels == label], bins, color=color, alpha=0.55, label=f"label {label}")
        ax.axvline(unit.threshold, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        what = "test texts" if one.parts else "all texts"
        ax.set_title(f"{one.name}, unit {unit.unit}, {what}", loc="left", fontsize=10)
        ax.set(xlabel=KINDS[kind], ylabel="texts")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
    shared.save_figure(path, figure)


def heatmap(path: Path, unit: Unit, traces: Sequence[tuple[str, np.ndarray]]) -> None:
    """Texts whose characters are coloured by the unit after their last byte: blue where it says 1,
    orange where it says 0, white at its threshold."""
    sheets = []
    for text, values in traces:
        lines, last = _lines(text)
        leaning = (values[last] - unit.threshold) * (1 if unit.up else -1)
        grid = np.full((len(lines), COLUMNS), np.nan)
        grid[[len(line) > np.arange(COLUMNS) for line in lines]] = leaning
        sheets.append((lines, grid))
    most = max(float(np.nanmax(np.abs(grid))) for _, grid in sheets) or 1.0
    colors = LinearSegmentedColormap.from_list("leaning", [NEGATIVE, "white", POSITIVE])
    figure, axes = pyplot.subplots(
        len(sheets),
        1,
        figsize=(0.125 * COLUMNS, 0.9 + sum(0.3 * len(grid) + 0.3 for _, grid in sheets)),
        height_ratios=[len(grid) for _, grid in sheets],
        layout="constrained",
        squeeze=False,
    )
    for ax, (lines, grid) in zip(axes[:, 0], sheets, strict=True):
        image = ax.imshow(grid, cmap=colors, vmin=-most, vmax=most, aspect="auto")
        style = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 8}
        for y, line in enumerate(lines):
            for x, letter in enumerate(line):
                ink = "white" if abs(grid[y, x]) > 0.7 * most else plot.INK
                ax.text(x, y, _drawable(letter), color=ink, parse_math=False, **style)
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=axes[:, 0], location="bottom", fraction=0.05, aspect=60)
    bar.set_label(f"unit {unit.unit}, towards label 1, from its threshold", fontsize=9)
    shared.save_figure(path, figure)


def _lines(text: str) -> tuple[list[str], np.ndarray]:
    """The characters of a framed text but for its frame, in lines, and where the last byte of each
    is."""
    line = frame(text).removeprefix(BEFORE).removesuffix(AFTER).decode()
    ends = np.cumsum([len(letter.encode()) for letter in line])
    lines = textwrap.wrap(line, COLUMNS, drop_whitespace=False, break_on_hyphens=False)
    return lines, len(BEFORE) + ends - 1


def _drawable(letter: str) -> str:
    return letter if ord(letter) <= LAST_DRAWN and letter.isprintable() else "\u25a1"
