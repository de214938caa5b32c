"""What the runs of `models.small_world` say: a table, and three pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bsjax import plot
from models import _report as shared
from models import _text as texts
from models._recurrent import DENSE, SPARSE, Size
from models._report import pyplot


class Found(NamedTuple):
    """All results, by kind of model."""

    sizes: Mapping[str, Size]
    scores: Mapping[str, Mapping[float, float | None]]  # bits of validation text by learning rate
    rates: Mapping[str, float]  # the one chosen
    seeds: Mapping[str, Sequence[Mapping[str, Any]]]  # runs at that rate
    seconds: Mapping[str, np.ndarray]  # of training steps, round by round
    depths: Mapping[int, Mapping[str, Mapping[str, Any]]]
    in_time: tuple[str, int, Sequence[Mapping[str, Any]]] | None  # the slower one, its steps, runs


def report(config: Any, parts: Any, found: Found, where: Any) -> None:
    """Prints the tables and the difference, saves the numbers and the pictures."""
    equal = at_equal_time(found)
    rows = {kind: _row(kind, found, equal) for kind in found.sizes}
    unigram = texts.unigram_bits(parts.train.data, parts.test.data)
    title = f"{len(parts.train.data):,} bytes, {config.epochs} times; bits/byte of held-out text, "
    title += "averaged weights; equal time: of validation text when the faster model has ended"
    shared.print_table(title, rows | {"unigram": {"bits/byte": unigram}})
    if any(_edge(found, kind) for kind in found.sizes):
        print("* the best of the learning rates is their smallest or largest: give more of them")
    gaps = {"in one pass over the same bytes": difference(found.seeds, "test")}
    time = min(_whole(found).values())
    gaps[f"of validation text after {time:,.0f} s of training"] = difference(
        {kind: [{"test": value} for value in of] for kind, of in equal.items()}, "test"
    )
    if found.in_time:
        slow, steps, runs = found.in_time
        of_seeds = dict(found.seeds) | {slow: runs}
        gaps[f"with {steps:,} steps of the {slow} model, as long as the other takes"] = difference(
            of_seeds, "test"
        )
    for name, gap in gaps.items():
        print(f"{name}: {_in_words(gap)}")
    if found.depths:
        print_depths(found.depths)
    stem = str(config.out / "small-world")
    numbers = {"where": where, "models": rows, "small-world minus dense, by seed": gaps}
    numbers["learning rates"] = {
        kind: {f"{rate:g}": bits for rate, bits in of_rate.items()}
        for kind, of_rate in found.scores.items()
    }
    numbers["depths"] = {
        depth: {kind: _short(one) for kind, one in kinds.items()}
        for depth, kinds in found.depths.items()
    }
    shared.save_json(f"{stem}.json", numbers)
    save_curves(f"{stem}-curves.png", config, found)
    save_seeds(f"{stem}-seeds.png", found)
    if len(found.depths) > 1:
        save_depths(f"{stem}-depths.png", found.depths)
    print(f"Results and pictures are in {config.out}")


def at_equal_time(found: Found) -> dict[str, list[float]]:
    """Bits per byte of validation text, by seed, when the faster model has ended.

    The clock of a run is the number of its steps times the median seconds of a step, measured with
    the models in turn. Between two measurements of validation text the bits are interpolated. The
    slower model is then in the middle of its learning rate's schedule, which is against it.
    """
    ends, medians = min(_whole(found).values()), _medians(found)
    values: dict[str, list[float]] = {}
    for kind, runs in found.seeds.items():
        values[kind] = []
        for run in runs:
            if run["valid"] is None:
                values[kind].append(float("nan"))
                continue
            steps, bits = zip(*run["valid curve"], strict=True)
            values[kind].append(float(np.interp(ends / medians[kind], steps, bits)))
    return values


def difference(seeds: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> list[float | None]:
    """The sparse model's bits minus the dense one's, by seed; None where one diverged."""
    pairs = zip(seeds[SPARSE], seeds[DENSE], strict=True)
    gaps = [None if None in (a[key], b[key]) else a[key] - b[key] for a, b in pairs]
    return [None if gap is None or not np.isfinite(gap) else float(gap) for gap in gaps]


def _in_words(gaps: Sequence[float | None]) -> str:
    known = [gap for gap in gaps if gap is not None]
    if not known:
        return "a model diverged with every seed"
    lower = sum(gap < 0 for gap in known)
    by_seed = ", ".join(f"{gap:+.4f}" for gap in known)
    return (
        f"small-world minus dense {np.mean(known):+.4f} bits/byte ({by_seed}); the small-world "
        f"model is better with {lower} of {len(known)} seeds"
    )


def _medians(found: Found) -> dict[str, float]:
    return {kind: float(np.median(seconds)) for kind, seconds in found.seconds.items()}


def _whole(found: Found) -> dict[str, float]:
    """Seconds that all steps of a model take."""
    steps = {
        kind: max((run["loss curve"][-1][0] for run in runs if run["loss curve"]), default=0)
        for kind, runs in found.seeds.items()
    }
    return {kind: steps[kind] * seconds for kind, seconds in _medians(found).items()}


def _edge(found: Found, kind: str) -> bool:
    rates = found.scores[kind]
    return len(rates) > 1 and found.rates[kind] in (min(rates), max(rates))


def _row(kind: str, found: Found, equal: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    size, runs = found.sizes[kind], found.seeds[kind]
    bits = [run["test"] for run in runs if run["test"] is not None]
    last = [run["test, last weights"] for run in runs if run["test"] is not None]
    at_end = [value for value in equal[kind] if np.isfinite(value)]
    return {
        "width": size.hidden,
        "parameters": runs[0]["parameters"],
        "density": runs[0]["density"],
        "rate": f"{found.rates[kind]:g}{'*' if _edge(found, kind) else ''}",
        "bits/byte": float(np.mean(bits)) if bits else None,
        "+-": (max(bits) - min(bits)) / 2 if len(bits) > 1 else None,
        "last weights": float(np.mean(last)) if last else None,
        "equal time": float(np.mean(at_end)) if at_end else None,
        "ms/step": 1e3 * _medians(found)[kind],
        "dense = 1": shared.ratio(found.seconds[kind], found.seconds[DENSE]).median,
    }


def _short(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if not name.endswith("curve")}


def print_depths(depths: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> None:
    """Width and bits of both kinds by depth."""
    rows = {}
    for depth, kinds in depths.items():
        row = {}
        for kind, one in kinds.items():
            of = "" if kind == SPARSE else f"{kind} "
            row[f"{of}width"], row[f"{of}parameters"] = one["width"], one["parameters"]
            row[f"{of}bits/byte"] = "diverged" if one["test"] is None else one["test"]
        rows[f"depth {depth}"] = row
    shared.print_table("Internal depth at equal parameters, one seed; held-out bits/byte", rows)


def save_curves(path: str, config: Any, found: Found) -> None:
    """Loss of each kind, mean over seeds, by bytes and by seconds."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    by_bytes, by_time = {}, {}
    for kind, runs in found.seeds.items():
        curves = [run["loss curve"] for run in runs if run["valid"] is not None]
        if not curves:
            continue
        steps = np.array([step for step, _ in curves[0]])
        losses = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
        by_bytes[kind] = (steps * config.batch * config.length / 1e6, losses)
        by_time[kind] = (steps * _medians(found)[kind], losses)
    if by_bytes:
        label = "bits per byte of text not seen before" if config.epochs == 1 else "bits per byte"
        plot.curves(by_bytes, axes[0], "By bytes", x="MB of text", y=label)
        plot.curves(by_time, axes[1], "By time", x="seconds of training steps", y="")
        least = min(float(losses.min()) for _, losses in by_bytes.values())
        axes[0].set_ylim(0.95 * least, 2 * least)
    shared.save_figure(path, figure)


def save_seeds(path: str, found: Found) -> None:
    """Held-out bits of every seed: a line joins the two models of a seed."""
    figure, axes = pyplot.subplots(figsize=(4.8, 4), layout="constrained")
    lines = {
        f"seed {seed}": ([0.0, 1.0], [dense["test"], sparse["test"]])
        for seed, (sparse, dense) in enumerate(
            zip(found.seeds[SPARSE], found.seeds[DENSE], strict=True)
        )
        if None not in (sparse["test"], dense["test"])
    }
    if lines:
        plot.curves(lines, axes, "Held-out text, equal parameters", x="", y="bits per byte")
        for line in axes.get_lines():
            line.set_marker("o")
    names = [f"{kind}, {found.sizes[kind].hidden} wide" for kind in (DENSE, SPARSE)]
    axes.set_xticks([0, 1], names)
    axes.set_xlim(-0.4, 1.4)
    shared.save_figure(path, figure)


def save_depths(path: str, depths: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> None:
    """Held-out bits against the internal depth."""
    lines = {}
    for kind in (DENSE, SPARSE):
        points = [(d, of[kind]["test"]) for d, of in depths.items() if of[kind]["test"] is not None]
        if points:
            lines[kind] = tuple(zip(*sorted(points), strict=True))
    if not lines:
        return
    title = "Internal depth at equal parameters"
    axes = plot.curves(lines, title=title, x="internal depth", y="bits per byte, held-out")
    for line in axes.get_lines():
        line.set_marker("o")
    axes.legend(frameon=False, fontsize=9)
    axes.set_xticks(sorted(depths))
    shared.save_figure(path, axes.figure)
