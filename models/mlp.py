"""An MLP learns digits from sampled products: accuracy against work, for every sampler and policy.

    python -m models.mlp --help
    python -m models.mlp --data FOLDER_WITH_MNIST --measure test

The layers below the classifier compute a sample of the outer products that their matrix products
sum (`bsjax.sampled_matmul`). They are compared with dense ones, with meProp, with noise and with
direct feedback alignment: after equally many steps, and after equally many floating-point
operations, since some methods keep the forward pass exact. Networks are measured exactly, and also
with sampling left on.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import _cli as cli
from models import _images as images
from models import _mlp as net
from models import _mlp_methods as methods
from models._cli import Mistake, option
from models._mlp_methods import Method
from models._mlp_report import report
from models._runs import Runs, in_advance, whereabouts
from models._train import CtrlC, Progress, output_folder

ABOUT = "Trains MLPs on digits with sampled matrix products, and compares them at equal work."
OUT = Path(__file__).parent.parent / "out"
DEFAULT_SAMPLER = "systematic"
PARTS = ("goal", "widths", "policies", "flops", "samplers", "cross", "noise")
DIGITS = {
    "width": 256,
    "widths": (128, 256),
    "fractions": (0.3, 0.5),
    "epochs": 20,
    "batch": 64,
}
MNIST = {
    "width": 2048,
    "widths": (512, 1024, 2048, 4096),
    "fractions": (0.1, 0.3, 0.5),
    "epochs": 20,
    "batch": 128,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the runs depend on. Every field is a flag."""

    data: Path | None = option(  # noqa: RUF009
        None, "folder with MNIST's four IDX files (plain or .gz); default: scikit-learn's digits"
    )
    out: Path = option(OUT, "folder for the picture, the table and the results")  # noqa: RUF009
    resume: bool = option(False, "skip what mlp.jsonl in --out holds already")
    measure: str = option(
        "validation",
        "images to measure on: of the training set (to choose values of flags), or the test set",
        choices=("validation", "test"),
    )
    parts: tuple[str, ...] = option(PARTS[:5] + PARTS[6:], "what to compare", choices=PARTS)
    width: int = option(0, "features of a hidden layer; 0: 256, with --data 2048", least=0)
    widths: tuple[int, ...] = option(
        (), "of the part widths (default: 128 256, with --data 512 1024 2048 4096)", least=1
    )
    layers: int = option(2, "hidden layers", least=1)
    fraction: float = option(0.3, "of the parts goal, widths and noise", above=0, most=1)
    fractions: tuple[float, ...] = option(
        (), "of the other parts (default: 0.3 0.5, with --data 0.1 0.3 0.5)", above=0, most=1
    )
    samplers: tuple[str, ...] = option(methods.SAMPLERS, "compared", choices=methods.SAMPLERS)
    block: int = option(1, "neighbours that are sampled together", least=1)
    epochs: int = option(0, "passes over the data; 0: 20", least=0)
    batch: int = option(0, "images per step; 0: 64, with --data 128", least=0)
    optimizer: str = option("adam", "momentum is Nesterov's, 0.9", choices=("adam", "momentum"))
    learning_rate: float = option(1e-3, "at first; it falls along a cosine", above=0)
    weight_decay: float = option(0.0, "decoupled", least=0)
    average: float = option(
        0.0,
        "measure a moving average of the weights, which keeps so much in a step; 0: the last ones",
        least=0,
        most=1,
    )
    gradient_eta: float = option(1e-6, "variance of gradient noise at the first step", least=0)
    input_deviation: float = option(0.2, "of input noise", least=0)
    weight_deviation: float = option(0.01, "of weight noise", least=0)
    seeds: int = option(3, "networks of each kind", least=1)
    seed: int = option(0, "of the first one", least=0, most=2**31 - 1)

    def settled(self) -> "Config":
        """With the values that depend on the data."""
        chosen = DIGITS if self.data is None else MNIST
        return dataclasses.replace(
            self, **{name: getattr(self, name) or value for name, value in chosen.items()}
        )

    def training(self) -> methods.Training:
        """What all methods share."""
        names = [field.name for field in dataclasses.fields(methods.Training)]
        return methods.Training(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Networks to train, one for each seed."""

    method: Method
    width: int
    steps: int


# ------------------------------------------------------------------------------------- the cases


def sampled(config: Config, policy: str, fraction: float, sampler: str = DEFAULT_SAMPLER) -> Method:
    """A policy of `bsjax.sampled_matmul`."""
    return Method(kind=policy, fraction=fraction, sampler=sampler, block=config.block)


def policies(config: Config, fraction: float) -> list[Method]:
    """The three policies and both forms of meProp."""
    ours = [sampled(config, policy, fraction) for policy in methods.POLICIES]
    return ours + [Method(kind=kind, fraction=fraction) for kind in methods.MEPROP]


def cases(config: Config, part: str, inputs: int, per_epoch: int) -> list[Case]:
    """What a part of the comparison trains; the first case is dense."""
    steps = config.epochs * per_epoch
    dense, goal = Method(), sampled(config, "forward", config.fraction)

    def equal_steps(*others: Method, width: int = config.width) -> list[Case]:
        return [Case(method=method, width=width, steps=steps) for method in (dense, *others)]

    match part:
        case "goal":
            return equal_steps(goal)
        case "widths":
            return [one for width in config.widths for one in equal_steps(goal, width=width)]
        case "policies":
            return equal_steps(*(m for f in config.fractions for m in policies(config, f)))
        case "flops":
            budget = steps * flops(config, goal, config.width, inputs)
            compared = [dense, *(m for f in config.fractions for m in policies(config, f))]
            return [
                Case(
                    method=m,
                    width=config.width,
                    steps=max(1, round(budget / flops(config, m, config.width, inputs))),
                )
                for m in compared
            ]
        case "samplers" | "cross":
            chosen = methods.POLICIES[:1] if part == "samplers" else methods.POLICIES[1:]
            every = [(p, f, s) for p in chosen for s in config.samplers for f in config.fractions]
            return equal_steps(*(sampled(config, p, f, s) for p, f, s in every))
        case _:
            strengths = config.gradient_eta, config.input_deviation, config.weight_deviation
            noises = zip(methods.NOISES, strengths, strict=True)
            noisy = [Method(kind=kind, strength=strength) for kind, strength in noises]
            return equal_steps(goal, *noisy, Method(kind="direct feedback"))


def settings(config: Config, case: Case, digest: str, seed: int) -> dict[str, Any]:
    """All that a result depends on."""
    shared = dataclasses.asdict(config.training())
    own = {**dataclasses.asdict(case.method), "width": case.width, "steps": case.steps}
    return {**own, **shared, "data": digest, "measure": config.measure, "seed": seed}


def check(config: Config, data: images.Images) -> None:
    """Raises `Mistake` for what cannot run."""
    n, inputs = data.train.x.shape
    if config.batch > n:
        raise Mistake(f"--batch {config.batch} is more than the {n:,} images: take fewer")
    widths = {config.width, *(config.widths if "widths" in config.parts else ())}
    for name, length in (("images", inputs), *(("layers", width) for width in sorted(widths))):
        if length % config.block:
            raise Mistake(
                f"--block {config.block} must divide the {length} features of the {name}: take a "
                f"divisor, such as {math.gcd(length, config.block)}"
            )


# ------------------------------------------------------------------------------------ the training


def train(config: Config, wanted: list[Case], data: images.Images, runs: Runs, where: Any) -> bool:
    """Trains what is missing from `runs`, and adds it; False after Ctrl-C."""
    seeds = range(config.seed, config.seed + config.seeds)

    def missing(case: Case) -> bool:
        return not all(runs.get(settings(config, case, data.digest, seed)) for seed in seeds)

    # cases of one program follow each other: it compiles once
    left: dict[tuple[Method, int], list[Case]] = {}
    for case in filter(missing, wanted):
        left.setdefault((case.method, case.width), []).append(case)
    steps = sum(case.steps for cases in left.values() for case in cases)
    if there := len(wanted) - sum(map(len, left.values())):
        print(f"{there} of {len(wanted)} kinds of networks are there already.")
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    learn, held = ([jnp.asarray(a) for a in split] for split in (data.train, data.measured))
    compiling = (
        functools.partial(net.compile_programs, *what, keys, learn, held)
        for what in ((method, config.training(), width) for method, width in left)
    )
    progress = Progress(steps, tokens=config.batch * len(keys), unit="images")
    # few: Python traces one program at a time, and training waits for the first of them
    workers, done = min(3, os.cpu_count() or 1), 0
    with CtrlC() as stop, progress, in_advance(compiling, workers) as compiled:
        for programs, cases in zip(compiled, left.values(), strict=True):
            for case in cases:
                if stop.asked:
                    return False
                began = time.perf_counter()
                for state in epochs(config, case, programs.train, keys, learn):
                    parameters, losses, step = state
                    name = f"{title(case.method)}, {case.width} wide"
                    progress.update(done + step, f"{name}: loss {losses.mean():.4f}")
                    if stop.asked and step < case.steps:
                        return False
                done += case.steps
                seconds = time.perf_counter() - began
                with jax.default_matmul_precision("highest"):
                    exact = net.share_right(Method(), config.batch, parameters, keys, *held)
                found = {"accuracy": np.asarray(exact)}
                if programs.left_on:
                    found["with sampling"] = np.asarray(programs.left_on(parameters, keys, *held))
                cost = case.steps * flops(config, case.method, case.width, learn[0].shape[1])
                for i, seed in enumerate(seeds):
                    result = {name: float(shares[i]) for name, shares in found.items()}
                    result |= {"loss": number(losses[i]), "flops": cost, "seconds of all": seconds}
                    runs.add(settings(config, case, data.digest, seed), result, where)
    return True


def epochs(
    config: Config, case: Case, run: Any, keys: jax.Array, data: list[jax.Array]
) -> Iterator[tuple[Any, np.ndarray, int]]:
    """(parameters, mean loss of each seed in this epoch, steps that are done), epoch by epoch."""
    training, per_epoch = config.training(), data[1].shape[0] // config.batch
    sizes = training.sizes(data[0].shape[1], case.width)
    state = net.start(case.method, training, keys, sizes)
    for first in range(0, case.steps, per_epoch):
        last = min(first + per_epoch, case.steps)
        state, losses = run(state, keys, *data, *map(jnp.int32, (first, last, case.steps)))
        yield state[1] or state[0], np.asarray(losses), last


def number(value: np.ndarray) -> float | None:
    """As JSON has it: None for the loss of a network that diverged, which ends no sweep."""
    return float(value) if np.isfinite(value) else None


def flops(config: Config, method: Method, width: int, inputs: int) -> float:
    """Of one step."""
    return methods.flops(method, config.training().sizes(inputs, width), config.batch)


def title(method: Method) -> str:
    """A method in words."""
    name = method.kind
    if method.sampler not in ("", DEFAULT_SAMPLER):
        name += f", {method.sampler}"
    return name + (f" {method.fraction:g}" if method.fraction < 1 else "")


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports; the exit code."""
    given = cli.parse(Config, argv, command="python -m models.mlp", about=ABOUT)
    config = given.settled()
    output_folder(config.out)
    data = images.load(config.data, test=config.measure == "test")
    print(data.about)
    check(config, data)
    inputs, per_epoch = data.train.x.shape[1], len(data.train.y) // config.batch
    of_part = {part: cases(config, part, inputs, per_epoch) for part in config.parts}
    wanted = list(dict.fromkeys(case for found in of_part.values() for case in found))
    runs = Runs(config.out / "mlp.jsonl", resume=config.resume)
    where = whereabouts(cli.shell_command("models.mlp", given))
    whole = train(config, wanted, data, runs, where)
    seeds, digest = range(config.seed, config.seed + config.seeds), data.digest
    results = {
        case: [one for seed in seeds if (one := runs.get(settings(config, case, digest, seed)))]
        for case in wanted
    }
    ready = {
        part: found
        for part, found in of_part.items()
        if all(len(results[case]) == config.seeds for case in found)
    }
    if ready:
        report(config.out, data.about, ready, results, per_epoch, title)
    if whole:
        return 0
    return cli.stopped("models.mlp", given, f"The results are in {runs.path}")


if __name__ == "__main__":
    cli.run_main(main)
