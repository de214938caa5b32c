"""What `models.pixelcnn` shows at its end: a table, lines of results, curves, and samples."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bsjax import plot
from models import _report as report_
from models._cli import fixed
from models._pixelcnn import PixelCNN, flops, stored_share
from models._pixelcnn_train import Run, draw, held_out_bits
from models._pixels import Pixels, batch, by_position_bits
from models._runs import Runs, whereabouts
from models._text import lzma_bits
from models._train import parameter_count

BITS = "bits/dim"


def report(
    config: Any, command: str, data: Pixels, runs: Mapping[str, Run], log: Mapping[str, Any]
) -> None:
    """Prints the table, saves the numbers, the lines and the pictures."""
    print("Measuring on held-out images ...", flush=True)
    models = {name: run.model(averaged=True) for name, run in runs.items()}
    measured = functools.partial(held_out_bits, images=data.held, size=config.batch)
    bits = {name: measured(model) for name, model in models.items()}
    last = {name: measured(run.model(averaged=False)) for name, run in runs.items()}
    lines = {
        "each place for itself": by_position_bits(data.train, data.held, data.levels),
        "lzma": lzma_bits(data.held.reshape(-1)),
        "uniform": math.log2(data.levels),
    }
    print("Timing training steps, the models in turn ...", flush=True)
    x = batch(data.train, 0, seed=config.seed, size=config.batch)
    steps = {name: functools.partial(run.copy().step, x) for name, run in runs.items()}
    seconds = report_.interleaved(steps, config.rounds)
    pixels = math.prod(data.train.shape[1:3])
    rows = {
        name: {
            "pairs": 2 * model.size.scales * model.size.blocks,
            "stored": stored_share(model),
            "parameters": parameter_count(model),
            "MFLOP/image": flops(model, pixels) / 1e6,
            BITS: bits[name],
            "last weights": last[name],
            "ms/step": 1e3 * float(np.median(seconds[name])),
        }
        for name, model in models.items()
    }
    table = rows | {name: {BITS: value} for name, value in lines.items()}
    title = f"{config.steps:,} steps of {config.batch} images; {BITS} of {len(data.held):,} others"
    report_.print_table(f"{title}, averaged weights", table)
    saved, where = Runs(config.out / "pixelcnn.jsonl", resume=config.resume), whereabouts(command)
    settings = {**fixed(config), "images": data.digest}
    for name, row in table.items():
        saved.add({**settings, "model": name}, {**row, **log.get(name, {})}, where)
    stem = str(config.out / "pixelcnn")
    save_curves(f"{stem}-curves.png", log, lines["each place for itself"])
    if config.samples:
        print("Drawing images, pixel by pixel ...", flush=True)
        save_samples(f"{stem}-samples.png", config, data, models)
    print(f"Pictures, numbers and the last checkpoint are in {config.out}")


def save_curves(path: str, log: Mapping[str, Any], alone: float) -> None:
    """Training losses by step, and dots for the held-out images."""
    losses = {name: one["losses"] for name, one in log.items()}
    smooth = max(1, min(map(len, losses.values())) // 25)
    title = f"Training loss (mean of {smooth} steps), and held-out images (dots)"
    axes = plot.curves(losses, title=title, y="bits per dimension", smooth=smooth)
    for color, one in zip(plot.LINES, log.values(), strict=False):
        axes.plot(*zip(*one["held"], strict=True), "o", color=color, markersize=4)
    axes.axhline(alone, color=report_.QUIET, linewidth=1, linestyle=(0, (4, 3)))
    report_.label(axes, "each place for itself", alone)
    low = min(min(min(one["losses"]), min(bits for _, bits in one["held"])) for one in log.values())
    axes.set_ylim(0.9 * low, 1.3 * alone)
    report_.save_figure(path, axes.figure)


def save_samples(path: str, config: Any, data: Pixels, models: Mapping[str, PixelCNN]) -> None:
    """A sheet of images from the data, and one from each model."""
    sides = data.train.shape[1:3]
    sheets = {"training images": data.train[: config.samples]}
    key = jax.random.key(config.seed)
    sheets |= {name: draw(model, key, config.samples, sides) for name, model in models.items()}
    report_.save_images(path, sheets, data.train.shape[1:], data.levels - 1)
