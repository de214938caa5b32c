"""Pictures of patterns and of what happened: matplotlib, loaded when the first one is drawn.

`pattern`, `mixing` and `curves` draw into `ax`, or into a new figure, and return the Axes;
`patterns` returns a Figure. Nothing is shown or saved: `plot.pattern(p).figure.savefig("p.png")`.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bsjax.patterns import _check as check
from bsjax.patterns._check import Count, MaskLike

if TYPE_CHECKING:  # for readers and type checkers only: matplotlib is an extra
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    type Named = Mapping[str, Any] | Sequence[tuple[str, Any]]
else:
    Axes = Figure = Named = object

EMPTY, STORED, INK, QUIET = "#f4f2ec", "#17456e", "#222222", "#6b6b6b"
TIMES = "\N{MULTIPLICATION SIGN}"
LINES = ("#17456e", "#d1662b", "#3f8f5b", "#8d5a97", "#c2a02e", "#5f6b73")


def pattern(p: MaskLike, ax: Axes | None = None, title: str | None = None) -> Axes:
    """The blocks of a BlockPattern or of a bool mask: dark where stored, block (0, 0) top left.

    Below it the size and the density. Where a mask has more blocks than the picture has pixels,
    a pixel shows how many of its blocks are stored.
    """
    mask = check.mask("plot.pattern", "p", p)
    block = getattr(p, "block", None)
    axes = _axes(ax, (3.6, 3.9))
    _draw(axes, mask, block or (1, 1), title)
    of = f" of {block[0]} {TIMES} {block[1]}" if block else ""
    axes.set_xlabel(f"{mask.shape[0]} {TIMES} {mask.shape[1]} blocks{of}, {_percent(mask)} stored")
    return axes


def patterns(named: Named, *, columns: Count = 4) -> Figure:
    """A sheet of named patterns: `patterns([("banded", mask), ...])`, or a dict of them."""
    sheet = _named("plot.patterns", "named", named)
    masks = [check.mask("plot.patterns", name, p) for name, p in sheet.items()]
    columns = min(check.count("plot.patterns", "columns", columns, 1), len(sheet))
    rows = -(-len(sheet) // columns)
    figure = _matplotlib("pyplot").figure(
        figsize=(2.4 * columns, 2.75 * rows), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # pyright: ignore
    for i, ((name, p), mask) in enumerate(zip(sheet.items(), masks, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw(axes, mask, getattr(p, "block", (1, 1)), name)
        axes.set_xlabel(_percent(mask))
    return figure


def mixing(profiles: Any, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Share of connected pairs after each step: one `mixing_profile(...)`, or named ones."""
    single = isinstance(profiles, list | np.ndarray) and not any(type(v) is tuple for v in profiles)
    shares = _lines("plot.mixing", "profiles", {"": profiles} if single else profiles)
    shares = {name: (step + 1, 100 * share) for name, (step, share) in shares.items()}
    axes = _axes(ax, (5.4, 3.5))
    _plot(axes, shares, marker="o", markersize=4)
    _plain(axes, title, x="step", y="pairs connected (%)")
    axes.axhline(100, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axes.set_ylim(0, 105)
    axes.xaxis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True))
    return axes


def curves(
    named: Named,
    ax: Axes | None = None,
    title: str | None = None,
    *,
    x: str = "step",
    y: str = "loss",
    smooth: Count = 1,
) -> Axes:
    """Named lines, each a sequence of numbers or a pair `(x, y)` of sequences: losses, timings.

    `smooth=w` draws the mean of the last w values, over a pale line of the values themselves.
    """
    window = check.count("plot.curves", "smooth", smooth, 1)
    lines = _lines("plot.curves", "named", named)
    axes = _axes(ax, (5.4, 3.5))
    _plot(axes, lines, window)
    _plain(axes, title, x=x, y=y)
    return axes


def _plot(axes: Any, lines: dict[str, Any], window: int = 1, **style: Any) -> None:
    for i, (name, (at, value)) in enumerate(lines.items()):
        color = LINES[i % len(LINES)]
        if window > 1:
            axes.plot(at, value, color=color, alpha=0.22, linewidth=0.8)
        mean = _trailing_mean(value, window)
        axes.plot(at, mean, color=color, linewidth=1.8, label=name or None, **style)
    if any(lines):
        axes.legend(frameon=False, fontsize=9)


def _draw(axes: Any, mask: np.ndarray, block: tuple[int, int], title: str | None) -> None:
    r, c = mask.shape
    shades = _matplotlib("colors").LinearSegmentedColormap.from_list("blocks", [EMPTY, STORED])
    axes.imshow(mask.astype(np.float32), cmap=shades, vmin=0, vmax=1, aspect="auto")
    # The true proportions of the matrix, but never a hair.
    axes.set_box_aspect(np.clip(r * block[0] / (c * block[1]), 0.25, 4))
    axes.set(xticks=[], yticks=[])
    if max(r, c) <= 32:  # few enough to see each block
        axes.set_xticks(np.arange(1, c) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, r) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    axes.spines[:].set(color="#bdb8ad", linewidth=0.8)
    axes.xaxis.label.set(color=QUIET, fontsize=9)
    axes.set_title(title or "", fontsize=10, color=INK)


def _plain(axes: Any, title: str | None, *, x: str, y: str) -> None:
    axes.grid(axis="y", color="#e4e1da", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#bdb8ad")
    axes.tick_params(color="#bdb8ad", labelcolor=QUIET, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=QUIET, fontsize=9)
    axes.set_title(title or "", loc="left", fontsize=11, color=INK)


def _named(where: str, name: str, value: Any) -> dict[str, Any]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    good = isinstance(pairs, list | tuple) and len(pairs) and all(map(_is_named, pairs))
    if not good or len(dict(pairs)) < len(pairs):
        raise TypeError(
            f"{where}: `{name}` must hold one or more things under different names, got "
            f"{type(value).__name__}: pass a dict {{name: ...}} or a list [(name, ...), ...]."
        )
    return dict(pairs)


def _is_named(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)


def _lines(where: str, name: str, value: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {key: _line(where, key, v) for key, v in _named(where, name, value).items()}


def _line(where: str, name: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
    pair = isinstance(value, tuple) and len(value) == 2 and np.ndim(value[0]) == 1
    try:
        at, height = (np.asarray(v, float) for v in (value if pair else (range(len(value)), value)))
        drawable = at.ndim == 1 and at.shape == height.shape
    except (TypeError, ValueError):
        drawable = False
    if not drawable:
        raise ValueError(
            f"{where}: `{name}` must be a sequence of numbers, or a pair (x, y) of equally long "
            f"ones, got {value!r}: one number for each point."
        )
    return at, height  # pyright: ignore[reportPossiblyUnbound]


def _trailing_mean(value: np.ndarray, window: int) -> np.ndarray:
    if not len(value):
        return value
    total = np.convolve(value, np.ones(window))[: len(value)]
    return total / np.minimum(np.arange(len(value)) + 1, window)


def _percent(mask: np.ndarray) -> str:
    return f"{100 * mask.mean():.3g}%"


def _axes(ax: Any, size: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    return _matplotlib("pyplot").subplots(figsize=size, layout="constrained")[1]


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(
            "bsjax.plot draws with matplotlib, which could not be imported: install bsjax[plot]."
        ) from error
