"""What a recipe shows at its end: times, a table, pictures."""

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx
from rich import box
from rich.table import Table

import bsjax.nnx
from bsjax import BlockPattern, plot
from models._train import console

matplotlib.use("Agg")  # pictures are saved, never shown
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

DENSITIES = (0.0625, 0.125, 0.25, 0.5)
QUIET = "#6b6b6b"  # lines to compare with


class Ratio(NamedTuple):
    """The median of ratios, and their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def interleaved[K](runs: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, np.ndarray]:
    """Seconds of each run in each round: A B C A B C ..., after one round that compiles.

    Whatever else the machine does slows all of a round, so ratios are taken round by round.
    """
    seconds: dict[K, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(all_[1:]) for name, all_ in seconds.items()}


def ratio(above: np.ndarray, below: np.ndarray) -> Ratio:
    """`above / below`, round by round."""
    low, median, high = np.percentile(above / below, [25, 50, 75])
    return Ratio(float(median), float(low), float(high))


def layer_times(
    make: Callable[[float | None, nnx.Rngs], nnx.Module], x: jax.Array, rounds: int
) -> dict[float, Ratio]:
    """Time of a layer of some density over that of the dense one, `make(None, rngs)`.

    The forward pass and both gradients, of x and of the weights.
    """
    rngs = nnx.Rngs(0)
    layers = {density: make(density, rngs) for density in (None, *DENSITIES)}
    shape = jax.eval_shape(lambda: layers[None](x)).shape  # pyright: ignore
    # at random: from a constant one the compiler could derive gradients without a product
    x, cotangent = (jax.random.normal(rngs.params(), s, x.dtype) for s in (x.shape, shape))

    @nnx.jit
    def backward(layer: Any, x: jax.Array) -> Any:
        return nnx.value_and_grad(lambda f, x: (f(x) * cotangent).sum(), argnums=(0, 1))(layer, x)

    runs = {name: functools.partial(backward, layer, x) for name, layer in layers.items()}
    seconds = interleaved(runs, rounds)
    return {density: ratio(seconds[density], seconds[None]) for density in DENSITIES}


def patterns_in(model: nnx.Module) -> dict[str, BlockPattern]:
    """The pattern of each block-sparse layer, by its place in the model."""
    return {
        ".".join(map(str, path)): layer.pattern.get_value()
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, bsjax.nnx.BlockLinear)
    }


def stored_share(patterns: Mapping[str, BlockPattern]) -> float:
    """Stored blocks of all patterns over all their blocks."""
    blocks = sum(p.grid[0] * p.grid[1] for p in patterns.values())
    return sum(p.nnz for p in patterns.values()) / blocks


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each row, a column for each key of the first one, nothing where a row lacks it."""
    columns = list(next(iter(rows.values())))
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    for name, row in rows.items():
        made.add_row(name, *(_cell(row.get(column)) for column in columns))
    console().print(made)


def print_sample(title: str, text: str) -> None:
    """Text that a model wrote: whatever bytes it chose, only printable ones reach the terminal."""
    safe = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    out = console()
    out.print(title, style="bold", markup=False)
    out.print(safe, markup=False)


def save_json(path: Path | str, results: Mapping[str, Any]) -> None:
    """The numbers of a run, for scripts."""
    Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def save_curves(
    path: Path | str, losses: Mapping[str, Sequence[float]], lines: Mapping[str, float], *, y: str
) -> None:
    """Training losses by step, with horizontal lines to compare them with."""
    smooth = max(1, min(map(len, losses.values())) // 25)
    axes = plot.curves(losses, title=f"Training loss (mean of {smooth} steps)", y=y, smooth=smooth)
    for height, name in sorted((height, name) for name, height in lines.items()):
        axes.axhline(height, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        label(axes, name, height)
    axes.set_ylim(0, 1.4 * max(*lines.values(), *(values[-1] for values in losses.values())))
    save_figure(path, axes.figure)


def save_patterns(path: Path | str, patterns: Mapping[str, Any], columns: int) -> None:
    """A sheet of patterns."""
    save_figure(path, plot.patterns(patterns, columns=columns))


def save_speed(path: Path | str, title: str, speed: Mapping[float, Ratio]) -> None:
    """Time over dense time against density, with quartiles, and the lines of both extremes."""
    densities, ratios = list(speed), list(speed.values())
    measured = {"measured": (densities, [r.median for r in ratios])}
    axes = plot.curves(measured, title=title, x="stored share of blocks", y="time over dense time")
    axes.get_lines()[0].set_marker("o")
    color, low, high = (
        axes.get_lines()[0].get_color(),
        [r.low for r in ratios],
        [r.high for r in ratios],
    )
    axes.fill_between(densities, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    label(axes, "dense", 1)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (1, 2)), label="density")
    axes.legend(frameon=False, fontsize=9)
    axes.set(xlim=(0, 1.1 * max(densities)), ylim=(0, 1.1 * max(1, *high)))
    save_figure(path, axes.figure)


def save_lines(
    path: Path | str,
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    *,
    title: str,
    x: str,
    y: str,
    ticks: Sequence[float] = (),
) -> None:
    """Lines through the means of `(x, values)`, with the values as dots; x is logarithmic, and
    labelled at `ticks`, if given."""
    means = {
        n: ([at for at, _ in line], [np.mean(v) for _, v in line]) for n, line in lines.items()
    }
    axes = plot.curves(means, title=title, x=x, y=y)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if not ticks else FixedLocator(ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    for drawn, line in zip(axes.get_lines(), lines.values(), strict=True):
        for at, values in line:
            axes.plot([at] * len(values), values, ".", color=drawn.get_color(), markersize=5)
    save_figure(path, axes.figure)


def save_images(
    path: Path | str, sets: Mapping[str, np.ndarray], shape: tuple[int, int, int], white: int
) -> None:
    """Sheets of images side by side, with their names; a set is `[n, rows * columns * channels]`,
    or has the three, which are `shape`, as axes."""
    figure, axes_of = pyplot.subplots(1, len(sets), figsize=(4 * len(sets), 4.3), squeeze=False)
    for axes, (name, some) in zip(axes_of[0], sets.items(), strict=True):
        # a line behind the last ones too: every image has as much room
        shown = np.pad(sheet(some.reshape(-1, *shape)), ((0, 1), (0, 1), (0, 0)))
        shown = np.minimum(shown / white, 1)
        axes.imshow(shown.squeeze(-1) if shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        axes.set_title(name)
        axes.axis("off")
    figure.tight_layout()
    save_figure(path, figure)


def sheet(images: np.ndarray) -> np.ndarray:
    """`images[n, h, w, c]` side by side, a pixel apart, as near to a square as n allows."""
    across = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / across)
    spare = np.zeros((rows * across - len(images), *images.shape[1:]), images.dtype)
    images = np.pad(np.concatenate([images, spare]), ((0, 0), (0, 1), (0, 1), (0, 0)))
    h, w, c = images.shape[1:]
    grid = images.reshape(rows, across, h, w, c).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * h, across * w, c)[:-1, :-1]


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.3f}" if value < 10 else f"{value:,.0f}"
        case _:
            return str(value)


def label(axes: Any, name: str, height: float) -> None:
    """Names a horizontal line, at its right end."""
    axes.annotate(
        name,
        (1, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=QUIET,
    )


def save_figure(path: Path | str, figure: Any) -> None:
    """A picture, which is closed then."""
    figure.savefig(path, dpi=160)
    pyplot.close(figure)
