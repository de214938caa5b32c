"""Is a wide sparse LSTM better than a dense one with as many parameters? Runs that answer it.

    python -m models.small_world --help
    python -m models.small_world --depths 1 2 3 4 5 6      # and by internal depth

Two language models of bytes, those of `models.lstm`, with equal total parameters (embedding, input
maps, norms and readout included): a small-world LSTM, and a dense one with the same internal depth
and layer norm. Both learn the same bytes in the same order. With the first seed each is trained at
all learning rates; the one with the lowest bits per byte of validation text is that of the other
seeds. What is reported is held-out text. Every run is a line of `small-world.jsonl` as soon as it
is done; `--resume` skips what is there.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models import _cli as cli
from models import _recurrent as recurrent
from models import _streams as texts
from models._average import evaluated
from models._cli import Mistake, option
from models._lstm import Parts, Run, Training, heldout_bits, step_seconds
from models._recurrent import DENSE, PARAMETERS, SPARSE, Size
from models._runs import Runs, binned, whereabouts
from models._small_world_report import Found, report
from models._train import CtrlC, Progress, Stopped, output_folder

ABOUT = "Compares wide sparse LSTMs with dense ones of equal parameters, over seeds and depths."
OUT = Path(__file__).parent.parent / "out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the runs depend on. Every field is a flag."""

    data: tuple[Path, ...] = option(
        (), "files or folders to learn (plain, .gz, .xz); default: the Python standard library"
    )
    out: Path = option(OUT, "folder for results and pictures")  # noqa: RUF009
    resume: bool = option(False, "train only what the results in --out lack")
    learning_rates: tuple[float, ...] = option(
        (1e-3, 2e-3, 4e-3), "highest values to choose from", above=0
    )
    seeds: int = option(3, "runs of each model at its learning rate", least=1)
    depths: tuple[int, ...] = option((), "internal depths to compare too, with one seed", least=1)
    equal_time: bool = option(
        False, "train the slower model once more per seed, in the time of the faster one"
    )
    parameters: int = option(3_000_000, "of each model, at most", least=1)
    bytes: int = option(2_000_000, "of text to train on, its first; 0: all", least=0)
    epochs: int = option(1, "passes over these bytes", least=1, same=True)
    valid: float = option(0.05, "share of the text to choose by", above=0, most=0.4, same=True)
    test: float = option(0.05, "share of the text to report", above=0, most=0.4, same=True)
    heldout_bytes: int = option(65_536, "of each of these two to measure on", least=2, same=True)
    batch: int = option(32, "streams of text side by side", least=1, same=True)
    length: int = option(64, "bytes that a gradient goes back", least=1, same=True)
    embedding: int = option(64, "features of a byte", least=1)
    depth: int = option(5, "internal steps of a time step", least=1)
    block: int = option(32, "side of a block of weights", least=1)
    graph: str = option("barabasi_albert", "which blocks are stored", choices=tuple(PARAMETERS))
    links: int = option(2, "links of a new block, or to each side of a ring", least=1)
    rewired: float = option(0.2, "share of rewired links of a ring", least=0, most=1)
    in_stride: int = option(2, "every so many features of the sparse state see x", least=1)
    out_stride: int = option(2, "every so many are seen by the readout", least=1)
    dtype: str = option("float32", "to compute in", choices=("float32", "bfloat16"))
    warmup: float = option(0.1, "share of the steps in which it rises", least=0, most=1, same=True)
    clip: float = option(1.0, "the largest norm of a gradient", above=0, same=True)
    average: float = option(
        0.999, "decay of the averaged parameters; less in the beginning", least=0, most=1, same=True
    )
    rounds: int = option(5, "timed steps of each model, in turn", least=1, same=True)
    commit: str = option("", "what was checked out, where git cannot tell")

    def sizes(self, depth: int) -> dict[str, Size]:
        """Both models, with equal parameters."""
        own: Any = {name: getattr(self, name) for name in Size._fields if hasattr(self, name)}
        sparse = recurrent.widest(Size(0, **own | {"depth": depth}), self.parameters)
        return {SPARSE: sparse, DENSE: recurrent.matching_dense(sparse)}

    def training(self, learning_rate: float, steps: int) -> Training:
        return Training(
            steps, self.batch, learning_rate, self.warmup, self.clip, average=self.average
        )


POINTS = 10  # measurements of validation text in a run


class Task(NamedTuple):
    """A run."""

    kind: str
    size: Size
    learning_rate: float
    seed: int
    steps: int


@dataclasses.dataclass
class Bench:
    """Trains what is asked for, unless it is known already."""

    config: Config
    parts: Parts
    runs: Runs
    where: Any
    about: Any

    @property
    def steps(self) -> int:
        return self.config.epochs * self.parts.train.windows

    def train(self, tasks: Sequence[Task], stop: CtrlC, title: str) -> list[dict[str, Any]]:
        """The results of runs, in order. Raises `Stopped` after Ctrl-C."""
        left = [
            task for task in dict.fromkeys(tasks) if self.runs.get(self._settings(task)) is None
        ]
        if there := len(set(tasks)) - len(left):
            print(f"{title}: {there} of {len(set(tasks))} runs are in {self.runs.path} already.")
        total, tokens = sum(task.steps for task in left), self.config.batch * self.config.length
        done, progress = 0, Progress(total, tokens=tokens, unit="bytes")
        if left:
            with progress:
                for number, task in enumerate(left, 1):
                    name = f"{title} {number}/{len(left)}: {task.kind}, {task.learning_rate:g}"
                    note = f"{name}, seed {task.seed}"
                    found = self._trained(task, stop, progress, done, note)
                    self.runs.add(self._settings(task), found, self.where)
                    done += task.steps
        return [self.runs.get(self._settings(task)) or {} for task in tasks]

    def times(self, sizes: dict[str, Size]) -> dict[str, list[float]]:
        """Seconds of training steps of both models, in turn."""
        settings = {"timing": {name: size._asdict() for name, size in sizes.items()}}
        settings |= {**self.about, "device": self.where["device"]}
        if (found := self.runs.get(settings)) is None:
            print("Timing training steps, the models in turn ...", flush=True)
            training = self.config.training(1e-3, self.steps)
            data = self.parts.train.window(0)
            seconds = step_seconds(sizes, training, data, self.config.rounds)
            found = {name: all_.tolist() for name, all_ in seconds.items()}
            self.runs.add(settings, found, self.where)
        return found

    def _settings(self, task: Task) -> dict[str, Any]:
        return {**task._asdict(), "size": task.size._asdict(), **self.about}

    def _trained(
        self, task: Task, stop: CtrlC, progress: Progress, before: int, note: str
    ) -> dict[str, Any]:
        """One run: losses, validation on the way and in the end, held-out text in the end; all are
        None from where it diverged."""
        start, windows = time.perf_counter(), self.parts.train.windows
        run = Run.start(task.size, self.config.training(task.learning_rate, task.steps), task.seed)
        marks = {round(task.steps * (i + 1) / POINTS) for i in range(POINTS)}
        losses, valid = [], []
        for step in range(task.steps):
            if step % windows == 0:
                run.rewind()
            losses.append(float(run.step(*self.parts.train.window(step % windows))))
            progress.update(before + step + 1, f"{note}, {losses[-1]:.3f} bits/byte")
            if stop.asked:
                raise Stopped
            if not math.isfinite(losses[-1]):
                break
            if step + 1 in marks:
                valid.append([step + 1, heldout_bits(run.averaged(), self.parts.valid)])
        whole = bool(losses) and math.isfinite(losses[-1]) and len(losses) == task.steps
        return {
            "parameters": recurrent.parameters(task.size),
            "density": recurrent.density(task.size),
            "valid": valid[-1][1] if whole else None,
            "test": heldout_bits(run.averaged(), self.parts.test) if whole else None,
            "test, last weights": (
                heldout_bits(evaluated(run.model), self.parts.test) if whole else None
            ),
            "valid curve": valid,
            "loss curve": binned(losses),
            "seconds": time.perf_counter() - start,
        }


def experiment(bench: Bench, stop: CtrlC) -> Found:
    """All runs, in an order in which the first ones tell most."""
    config, steps, sizes = bench.config, bench.steps, bench.config.sizes(bench.config.depth)
    grid = [
        Task(kind, size, rate, 0, steps)
        for rate in config.learning_rates
        for kind, size in sizes.items()
    ]
    results = bench.train(grid, stop, "learning rates")
    scores: dict[str, dict[float, float | None]] = {kind: {} for kind in sizes}
    for task, found in zip(grid, results, strict=True):
        scores[task.kind][task.learning_rate] = found["valid"]
    rates = {kind: best(kind, of_rate) for kind, of_rate in scores.items()}
    tasks = [
        Task(kind, size, rates[kind], seed, steps)
        for seed in range(config.seeds)
        for kind, size in sizes.items()
    ]
    results = bench.train(tasks, stop, "seeds")
    seeds = {
        kind: [found for task, found in zip(tasks, results, strict=True) if task.kind == kind]
        for kind in sizes
    }
    seconds = {kind: np.asarray(all_) for kind, all_ in bench.times(sizes).items()}
    medians = {kind: float(np.median(all_)) for kind, all_ in seconds.items()}
    in_time = None
    if config.equal_time:
        slow = max(medians, key=medians.__getitem__)
        fewer = round(steps * min(medians.values()) / medians[slow])
        again = [Task(slow, sizes[slow], rates[slow], s, fewer) for s in range(config.seeds)]
        in_time = slow, fewer, bench.train(again, stop, "equal time")
    by_depth = {}
    for depth in config.depths:
        of_depth = config.sizes(depth)
        tasks = [Task(kind, size, rates[kind], 0, steps) for kind, size in of_depth.items()]
        found = bench.train(tasks, stop, f"depth {depth}")
        by_depth[depth] = {
            kind: one | {"width": of_depth[kind].hidden}
            for kind, one in zip(of_depth, found, strict=True)
        }
    return Found(sizes, scores, rates, seeds, seconds, by_depth, in_time)


def best(kind: str, scores: dict[float, float | None]) -> float:
    """The learning rate with the lowest bits of validation text."""
    finite = {rate: bits for rate, bits in scores.items() if bits is not None}
    if not finite:
        raise Mistake(f"the {kind} model diverged at every rate: give lower --learning_rates")
    return min(finite, key=finite.__getitem__)


def main(argv: list[str] | None = None) -> int:
    """Trains, measures and reports; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.small_world", about=ABOUT)
    output_folder(config.out)
    held = {"valid": config.valid, "test": config.test}
    spool = config.out / "small-world-text.bytes"
    text = texts.load(config.data, spool, most=config.bytes or None, **held)
    print(text.about)
    parts = Parts(config, text)
    runs = Runs(config.out / "small-world.jsonl", resume=config.resume)
    about = {**cli.fixed(config), "a text with the hash": text.digest}
    where = whereabouts(cli.shell_command("models.small_world", config)) | {"flax": version("flax")}
    where |= {"commit": config.commit} if config.commit else {}
    try:
        with CtrlC() as stop:
            found = experiment(Bench(config, parts, runs, where, about), stop)
    except Stopped:
        return cli.stopped("models.small_world", config, f"Results are in {runs.path}")
    report(config, parts, found, where)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
