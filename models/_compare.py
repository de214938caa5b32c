"""How two models of bytes, trained on the same data, are compared: one is sparse.

`config` is that of a recipe; the fields read here mean the same in each of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import _report as report
from models import _text as texts
from models._cli import fixed
from models._language import generate, heldout_bits
from models._runs import binned


class Material(NamedTuple):
    """What models are measured on."""

    unit: str  # what bits are counted per
    name: str
    measure: Callable[[Any], float]  # of a model, its bits per unit
    lines: Callable[[], dict[str, float]]  # of what is no model
    show: Callable[[str, Any, str], None]  # (name, model, stem of files): what a model makes


def of_text(config: Any, text: texts.Text, write: Callable[..., str] = generate) -> Material:
    """Held-out text, and a sample that `write` generates."""

    def measure(model: Any) -> float:
        sizes = {"count": config.heldout_bytes, "length": config.length, "size": 4 * config.batch}
        return heldout_bits(model, text.heldout, **sizes)

    def lines() -> dict[str, float]:
        return {
            "unigram": texts.unigram_bits(text.train, text.heldout),
            "lzma": texts.lzma_bits(text.heldout),
        }

    def show(name: str, model: Any, stem: str) -> None:
        drawn = {"count": config.sample_length, "temperature": config.temperature}
        drawn |= {"length": config.length, "seed": config.seed}
        report.print_sample(f"What the {name} model writes:", write(model, config.prompt, **drawn))

    return Material("byte", "text", measure, lines, show)


def compare(
    recipe: str,
    config: Any,
    data: Material,
    losses: Mapping[str, Sequence[float]],
    trained: Mapping[str, nnx.Module],
    contenders: Mapping[str, Mapping[str, Any]],
    layer: Callable[[float | None, nnx.Rngs], nnx.Module],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Prints the table and a sample, saves the numbers and the pictures; `keep` gets the table, the
    seconds of each round, and the losses.

    The first model of `trained` is the sparse one. `contenders` are the same models, afresh, and
    last the dense one of the sparse one's width: what the table says of each, and as `step` a
    function that takes a training step.
    """
    sparse, wide = next(iter(trained)), list(contenders)[-1]
    bits = f"bits/{data.unit}"
    print(f"Measuring on held-out {data.name} ...", flush=True)
    heldout = {name: data.measure(model) for name, model in trained.items()}
    lines = data.lines()
    print("Timing training steps, the models in turn ...", flush=True)
    seconds = report.interleaved({n: c["step"] for n, c in contenders.items()}, config.rounds)
    patterns = report.patterns_in(trained[sparse])
    rows = {
        name: {
            **{key: fact for key, fact in facts.items() if key != "step"},
            "stored": report.stored_share(patterns) if name == sparse and patterns else 1.0,
            bits: heldout.get(name, "not trained"),
            "ms/step": 1e3 * float(np.median(seconds[name])),
            f"speed ({wide} = 1)": report.ratio(seconds[wide], seconds[name]),
        }
        for name, facts in contenders.items()
    }
    rows |= {name: {bits: value} for name, value in lines.items()}
    clocks = {name: list(all_) for name, all_ in seconds.items()}
    learned = {name: binned(all_) for name, all_ in losses.items()}
    keep({"models": rows, "seconds": clocks, "loss curves": learned})
    window = config.batch * config.length
    title = f"{config.steps:,} steps of {window:,} bytes; {bits} on held-out {data.name}"
    report.print_table(title, rows)
    stem = str(config.out / recipe)
    data.show(sparse, trained[sparse], stem)

    report.save_json(f"{stem}.json", {"flags": fixed(config), "models": rows})
    report.save_curves(f"{stem}-losses.png", losses, lines, y=f"bits per {data.unit}")
    if patterns:
        print("Timing one layer at several densities ...", flush=True)
        speed = report.layer_times(layer, jnp.zeros((window, config.width)), config.rounds)
        report.save_patterns(f"{stem}-patterns.png", patterns, columns=4)
        title = f"One layer, {window:,} tokens, forward and backward"
        report.save_speed(f"{stem}-speed.png", title, speed)
    print(f"Pictures, numbers and the last checkpoint are in {config.out}")
