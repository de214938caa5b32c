"""What `models.lstm` shows at its end: a table, samples of text, pictures."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bsjax import patterns, plot
from models import _generate as writing
from models import _recurrent as recurrent
from models import _report as report_
from models import _text as texts
from models._average import evaluated
from models._cli import fixed
from models._lstm import Parts, Run, Training, heldout_bits, step_seconds


def report(
    config: Any, training: Training, parts: Parts, runs: Mapping[str, Run], log: Mapping[str, Any]
) -> None:
    """Prints the table and the samples, saves the numbers and the pictures."""
    print("Measuring on held-out text ...", flush=True)
    models = {name: run.averaged() for name, run in runs.items()}
    bits = {name: heldout_bits(model, parts.test) for name, model in models.items()}
    last = {name: heldout_bits(evaluated(run.model), parts.test) for name, run in runs.items()}
    lines = {
        "unigram": texts.unigram_bits(parts.train.data, parts.test.data),
        "lzma": texts.lzma_bits(parts.test.data),
    }
    print("Timing training steps, the models in turn ...", flush=True)
    sizes, data = {n: m.size for n, m in models.items()}, parts.train.window(0)
    seconds = step_seconds(sizes, training, data, config.rounds)
    rows = {
        name: {
            "width": model.size.hidden,
            "parameters": recurrent.parameters(model.size),
            "density": recurrent.density(model.size),
            "bits/byte": bits[name],
            "last weights": last[name],
            "ms/step": 1e3 * float(np.median(seconds[name])),
            "bytes/s": round(config.batch * config.length / float(np.median(seconds[name]))),
        }
        for name, model in models.items()
    }
    if len(rows) > 1:
        sparse, dense = rows
        rows[sparse][f"speed ({dense} = 1)"] = str(report_.ratio(seconds[dense], seconds[sparse]))
        rows[dense][f"speed ({dense} = 1)"] = 1.0
    table = rows | {name: {"bits/byte": value} for name, value in lines.items()}
    window = f"{training.steps:,} steps of {config.batch} x {config.length} bytes"
    report_.print_table(f"{window}; bits/byte on held-out text, averaged weights", table)
    for name, model in models.items():
        sample(config, name, model)
    stem = str(config.out / "lstm")
    numbers = {"flags": fixed(config), "models": table, "curves": dict(log)}
    report_.save_json(f"{stem}.json", numbers)
    losses = {name: one["losses"] for name, one in log.items()}
    report_.save_curves(f"{stem}-losses.png", losses, lines, y="bits per byte")
    if sparse := [model for model in models.values() if not model.size.dense]:
        save_graphs(stem, sparse[0].size, config.seed)
    print(f"Pictures, numbers, models and the last checkpoint are in {config.out}")


def sample(config: Any, name: str, model: recurrent.LanguageModel) -> None:
    """Text by the likeliest bytes, and text at a temperature."""
    if not config.sample_length:
        return
    prompt = config.prompt.encode(errors="surrogateescape")
    ways = {"its likeliest bytes": 0.0}
    ways |= {f"at temperature {config.temperature:g}": config.temperature}
    for way, heat in ways.items():
        key = jax.random.key(config.seed)
        text, _ = writing.generate(model, None, prompt, config.sample_length, heat, key)
        title = f"What the {name} model writes, {way}:"
        report_.print_sample(title, (prompt + text).decode(errors="replace"))


def save_graphs(stem: str, size: recurrent.Size, seed: int) -> None:
    """The patterns of the internal steps and of the gates, and how they mix."""
    found = recurrent.masks(size, seed)
    names = [f"internal step {i + 1}" for i in range(size.depth)] + ["gates"]
    report_.save_patterns(f"{stem}-patterns.png", dict(zip(names, found, strict=True)), columns=3)
    profile = patterns.mixing_profile(found)
    title = f"Blocks that a block has reached, {size.graph}, {len(found[0])} blocks"
    axes = plot.mixing(profile, title=title)
    axes.set_xlabel("internal step; the last are the gates")
    report_.save_figure(f"{stem}-mixing.png", axes.figure)
