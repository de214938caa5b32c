"""A Transformer at several widths, dense and with sampled products: what a wider one is worth.

    python -m models.widths --help

Language models of bytes, those of `models.transformer`, at a fixed depth. Beside the dense model of
each width stands one whose linear layers (all but the classifier) compute a sample of their outer
products, forward and backward, while it is trained. Both take the same steps on the same text and
are given the same learning rates to choose from; the choice is made on a part of the training text.
Measured are bits per byte of held-out text, against the width and against the FLOPs that training
spent, those of sampling included. After Jain 2020 (a talk), who varied the width at depth 6.
"""

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import _cli as cli
from models import _flops as flops
from models import _text as texts
from models import transformer
from models._cli import Mistake, option
from models._runs import Runs, in_advance, whereabouts
from models._train import CtrlC, output_folder
from models._widths import Kind, Run, compiled, parameters
from models._widths_report import show

ABOUT = "Trains dense and sampled language models of several widths, and compares their losses."
# "bernoulli" computes the whole product, and nothing would be saved
SAMPLERS = ("uniform", "with_replacement", "systematic", "priority", "top_k", "wta")
SPLIT = 0.05  # the share of the training text, its end, on which learning rates are chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    data: tuple[Path, ...] = option(
        (), "files or folders to learn (plain, .gz, .xz); default: the Python standard library"
    )
    out: Path = option(transformer.OUT, "folder for results and pictures")  # noqa: RUF009
    resume: bool = option(False, "train only what the results in --out lack")
    widths: tuple[int, ...] = option((64, 96, 128), "features of the residual stream", least=1)
    # above 0.9 sampling saves too little, and the whole product is computed instead
    fractions: tuple[float, ...] = option(
        (0.5,), "shares of the outer products that sampled models compute", above=0, most=0.9
    )
    learning_rates: tuple[float, ...] = option(
        (0.003, 0.006, 0.012), "highest values to choose from", above=0
    )
    seeds: int = option(1, "runs of each, of seeds 0, 1, ...", least=1)
    steps: int = option(100, "training steps of each run", least=1, same=True)
    batch: int = option(4, "windows of text per step", least=1, same=True)
    length: int = option(128, "bytes per window", least=8, same=True)
    layers: int = option(6, "layers of every model", least=1, same=True)
    head: int = option(32, "features of an attention head", least=2, same=True)
    block: int = option(8, "neighbours that are sampled together", least=1, same=True)
    sampler: str = option("systematic", "how to sample", choices=SAMPLERS, same=True)
    dtype: str = option(
        "float32", "to compute in; weights are float32", choices=("float32", "bfloat16"), same=True
    )
    warmup: float = option(
        0.1, "share of the steps in which rates rise", least=0, most=1, same=True
    )
    weight_decay: float = option(0.1, "of all weights but biases and gains", least=0, same=True)
    measured: int = option(16_384, "bytes of each text to measure on", least=1, same=True)
    at_once: int = option(1, "runs trained together: GPUs want more, and need the memory", least=1)
    compilers: int = option(1, "programs compiled at a time, while others run", least=1)
    commit: str = option("", "what was checked out, where git cannot tell")


# -------------------------------------------------------------------------------------- the sweep


def windows(config: Config, data: np.ndarray) -> jax.Array:
    """Batches of windows spread over a text, [batches, batch, length + 1]: as large as those of
    training, since a sample is drawn by the norms of a batch."""
    count = math.ceil(2 * config.measured / (config.length * config.batch)) * config.batch
    found = texts.spread(data, count, config.length)
    if len(found) < config.batch:
        raise Mistake(
            f"{len(data)} bytes to measure on are too few for {config.batch} windows of "
            f"{config.length + 1}: give more text with --data, or a smaller --length or --batch"
        )
    whole = found[: len(found) // config.batch * config.batch]
    return jnp.asarray(whole.reshape(-1, config.batch, config.length + 1))


def arrays(config: Config, text: texts.Text) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is trained on, chosen on, and reported, on the device."""
    cut = len(text.train) - max(config.length + 1, round(SPLIT * len(text.train)))
    if cut < config.length + 1:
        raise Mistake(
            f"{len(text.train)} bytes of training text are fewer than two windows of "
            f"{config.length + 1}: give more text with --data, or a smaller --length"
        )
    train, validation = text.train[:cut], text.train[cut:]
    return jnp.asarray(train), windows(config, validation), windows(config, text.heldout)


def kinds(config: Config) -> list[Kind]:
    """What is trained: the narrow ones first, the dense model of each width first."""
    return [Kind(w, f) for w in config.widths for f in (None, *config.fractions)]


def sweep(
    config: Config, data: Sequence[jax.Array], left: Mapping[Kind, Sequence[Run]]
) -> Iterator[tuple[Kind, Run, dict[str, Any]]]:
    """Trains what is left; the results of each run as they come."""
    tasks = [functools.partial(compiled, config, kind, data) for kind in left]
    with in_advance(tasks, config.compilers) as programs:
        for (kind, runs), call in zip(left.items(), programs, strict=True):
            for some in itertools.batched(runs, config.at_once):
                for run, found in zip(some, trained(config, call, some, data), strict=True):
                    yield kind, run, found


def trained(config: Config, call: Any, runs: Sequence[Run], data: Any) -> Iterator[dict[str, Any]]:
    """The results of runs that one call trains together."""
    start = time.perf_counter()
    # too few runs are filled up with the last one, since the program takes `at_once`
    full = [*runs, *[runs[-1]] * (config.at_once - len(runs))]
    rates, seeds = zip(*full, strict=True)
    result = call(jnp.asarray(rates, jnp.float32), jnp.asarray(seeds, jnp.int32), *data)
    result = jax.tree.map(np.asarray, result)
    seconds = (time.perf_counter() - start) / len(full)
    for i in range(len(runs)):
        values = {name: float(value[i]) for name, value in result._asdict().items()}
        values = {name: v if math.isfinite(v) else None for name, v in values.items()}
        yield values | {"seconds": seconds}


def spent(config: Config, kind: Kind) -> flops.Flops:
    """FLOPs of one training step."""
    shape = {"tokens": config.batch * config.length, "length": config.length}
    shape |= {"layers": config.layers, "block": config.block}
    return flops.training_step(**shape, **kind._asdict())


def check(config: Config) -> None:
    """Raises `Mistake` for flags that do not fit each other."""
    cli.check_multiple("head", config.head, "the pairs of features that positions turn", 2)
    for width in config.widths:
        cli.check_multiple("widths", width, "--head", config.head)
        cli.check_multiple("widths", width, "--block", config.block)


def main(argv: list[str] | None = None) -> int:
    """Trains, measures and reports; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.widths", about=ABOUT)
    check(config)
    output_folder(config.out)
    text = texts.load(config.data, config.length + 1)
    print(text.about)
    data, runs = arrays(config, text), Runs(config.out / "widths.jsonl", resume=config.resume)
    grid = itertools.product(config.learning_rates, range(config.seeds))
    wanted = list(itertools.product(kinds(config), itertools.starmap(Run, grid)))
    about = {**cli.fixed(config), "a text with the hash": text.digest}
    settings = {pair: {**about, **pair[0]._asdict(), **pair[1]._asdict()} for pair in wanted}
    left: dict[Kind, list[Run]] = collections.defaultdict(list)
    for kind, run in wanted:
        if runs.get(settings[kind, run]) is None:
            left[kind].append(run)
    total = sum(map(len, left.values()))
    if total < len(wanted):
        print(f"{len(wanted) - total} of {len(wanted)} runs are in {runs.path} already.")
    where = whereabouts(cli.shell_command("models.widths", config)) | {"flax": version("flax")}
    where |= {"commit": config.commit} if config.commit else {}
    with CtrlC() as stop:
        for number, (kind, run, found) in enumerate(sweep(config, data, left), 1):
            step = spent(config, kind)
            costs = {"parameters": parameters(config, kind), "flops": config.steps * step.total}
            found = costs | {"flops_per_step": step._asdict()} | found
            runs.add(settings[kind, run], found, where)
            print(
                f"{number}/{total} {kind.width}, {kind.name}, rate {run.learning_rate:g}, seed "
                f"{run.seed}: {found['validation'] or math.nan:.3f} bits/byte to choose by, "
                f"{found['seconds']:.1f} s",
                flush=True,
            )
            if stop.asked:
                break
    if stop.asked:
        return cli.stopped("models.widths", config, f"Results are in {runs.path}")
    results = {pair: runs.get(settings[pair]) or {} for pair in wanted}
    tokens = config.batch * config.length
    title = f"{config.layers} layers, {config.steps:,} steps of {tokens:,} bytes"
    show(config.out, title, results, text)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
