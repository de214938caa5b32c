"""What `models.resnet` shows at its end: a table, the difference by seed, pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsjax import plot
from models import _report as shared
from models import _resnet_plan as plan
from models._cli import fixed
from models._report import pyplot
from models._resnet_plan import Size

type Results = Mapping[str, Sequence[Mapping[str, Any]]]  # of every seed, by name


def report(
    config: Any,
    data: str,
    sizes: Mapping[str, Size],
    results: Results,
    seconds: Mapping[str, np.ndarray],
    where: Mapping[str, Any],
) -> None:
    """Prints the table and the difference, saves the numbers and the pictures. `seconds` are those
    of training steps, in rounds."""
    rows = {name: row(found) for name, found in results.items()}
    names = list(rows)
    print(f"{data}.")
    title = (
        f"{config.network}, {config.epochs} epochs in batches of {config.batch}; percent right, "
    )
    title += f"averaged weights: mean of {config.seeds} seed(s), and deviation"
    shared.print_table(title, rows)
    for name, found in results.items():
        stored = ", ".join(f"{100 * share:.1f}%" for share in found[0]["stored"])
        print(f"{name}: convolutions of the stages store {stored} of their weights")
    said = compare(results, names[0], names[1]) if len(names) == 2 else {}
    said |= speeds(seconds)
    if said:
        print("\n".join(said.values()))
    stem = str(config.out / "resnet")
    numbers = {"where": where, "data": data, "flags": fixed(config), "models": rows}
    numbers |= {"said": said, "results": {name: list(found) for name, found in results.items()}}
    numbers |= {"seconds of steps": {name: list(each) for name, each in seconds.items()}}
    shared.save_json(f"{stem}.json", numbers)
    save_curves(f"{stem}-curves.png", results)
    if found := sheet(sizes, config.seed):
        shared.save_patterns(f"{stem}-patterns.png", found, columns=min(4, len(found)))
    print(f"Results and pictures are in {config.out}")


def row(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of the table."""
    right, last = ([100 * one[f"accuracy{which}"] for one in found] for which in WEIGHTS)
    return {
        "depth": found[0]["depth"],
        "parameters": found[0]["parameters"],
        "MFLOPs": found[0]["flops"] / 1e6,
        "% right": f"{np.mean(right):.2f}",
        "+-": f"{np.std(right, ddof=1):.2f}" if len(right) > 1 else None,
        "last": f"{np.mean(last):.2f}",
        "loss": float(np.mean([one["loss"] for one in found])),
        "seconds": float(np.mean([one["seconds"] for one in found])),
    }


def speeds(seconds: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What a training step takes, in words."""
    said = {
        f"step, {name}": f"{name}: {1000 * np.median(own):,.0f} ms for a training step"
        for name, own in seconds.items()
    }
    dense = next((name for name in seconds if name.startswith("dense")), "")
    for name in seconds.keys() - {dense}:
        said[f"step, {name}"] += f", {shared.ratio(seconds[dense], seconds[name])} as fast as dense"
    return said


WEIGHTS = ("", ", last weights")


def compare(results: Results, one: str, other: str) -> dict[str, str]:
    """What the second network has more than the first, in words."""
    first, second = results[one][0], results[other][0]
    ratios = {name: second[name] / first[name] - 1 for name in ("parameters", "flops")}
    size = f"{other}: {100 * ratios['parameters']:+.2f}% parameters and "
    size += f"{100 * ratios['flops']:+.2f}% operations, compared with {one}"
    pairs = zip(results[one], results[other], strict=True)
    gaps = [100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs]
    by_seed = ", ".join(f"{gap:+.2f}" for gap in gaps)
    more = sum(gap > 0 for gap in gaps)
    accuracy = f"{np.mean(gaps):+.2f} points ({by_seed}); it is better with {more} of {len(gaps)}"
    return {"size": size, "accuracy": f"{accuracy} seed(s)"}


def save_curves(path: str, results: Results) -> None:
    """Training loss, and what is wrong on images not trained on: mean over seeds, by epoch."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    losses, wrong = {}, {}
    for name, found in results.items():
        every = np.array([one["training losses"] for one in found])
        losses[name] = (np.arange(1, every.shape[1] + 1), every.mean(0))
        measured = np.array([one["measured"] for one in found])  # [seeds, times, 2]
        wrong[name] = (measured[0, :, 0], 100 * (1 - measured[:, :, 1].mean(0)))
    plot.curves(losses, axes[0], "Training loss", x="epoch", y="mean of the epoch")
    plot.curves(wrong, axes[1], "Images not trained on", x="epoch", y="% wrong, averaged weights")
    for one, lines in zip(axes, (losses, wrong), strict=True):
        # what the networks begin with would press everything else to the ground
        halfway = max(float(values[len(values) // 2]) for _, values in lines.values())
        highest = max(float(values.max()) for _, values in lines.values())
        one.set_ylim(0, min(4 * halfway, 1.05 * highest) or 1)
    shared.save_figure(path, figure)


def sheet(sizes: Mapping[str, Size], seed: int) -> dict[str, np.ndarray]:
    """The first two patterns of every stage that has some."""
    found = {}
    for name, size in sizes.items():
        made = plan.masks(size, seed)
        for i, stage in enumerate(plan.stages_of(size)):
            convs = [c for block in stage for c in block.convs if c.stored is not None]
            of_stage = [next(made) for _ in convs]
            for j, mask in enumerate(of_stage[:2]):
                found[f"{name}, stage {i + 1}, {'first' if not j else 'second'}"] = mask
    return found
