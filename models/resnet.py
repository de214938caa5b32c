"""A residual network with block-sparse convolutions, alone or beside a dense one of half the depth.

    python -m models.resnet --help
    python -m models.resnet --double-depth --density 0.5              # on scikit-learn's digits
    python -m models.resnet --double-depth --density 0.5 --data CIFAR --measure test --seeds 3 \
        --dtype bfloat16                                              # the full comparison: a GPU

Twice as many blocks in each stage, about half of the weights in each convolution: as many
parameters, as many operations, and all hyper-parameters as they were. Kingma 2017 says that this
makes a network for CIFAR-10 more accurate; after Gray, Radford and Kingma 2017, "GPU Kernels for
Block-Sparse Weights".
"""

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models import _cli as cli
from models import _resnet_plan as plan
from models._augment import WAYS, Augmentation, Data
from models._cli import Mistake, option
from models._resnet_bench import Job, settings, step_times, train
from models._resnet_plan import Size
from models._resnet_report import report
from models._resnet_train import Training
from models._runs import Runs, whereabouts
from models._train import output_folder

ABOUT = "Trains a block-sparse residual network, alone or beside a dense one of half the depth."
OUT = Path(__file__).parent.parent / "out"
DIGITS = {"network": "wrn-16-2", "block": 8, "epochs": 20, "batch": 64, "crop": 1, "cutout": 3}
CIFAR = {"network": "wrn-16-4", "block": 16, "epochs": 200, "batch": 128, "crop": 4, "cutout": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    data: tuple[Path, ...] = option(
        (), "folder, archive or files of CIFAR-10 (plain, .gz, .xz); default: scikit-learn's digits"
    )
    out: Path = option(OUT, "folder for pictures, results and checkpoints")  # noqa: RUF009
    resume: bool = option(False, "go on where a run with the same --out stopped")
    measure: str = option(
        "validation",
        "images to measure on: of the training set (to choose values of flags), or the test set",
        choices=("validation", "test"),
        same=True,
    )
    images: int = option(0, "to train on, the first; 0: all", least=0, same=True)
    measured: int = option(0, "to measure on, the first; 0: all", least=0, same=True)
    network: str = option("", f"{plan.NAMES}; default: wrn-16-4, of digits wrn-16-2", same=True)
    double_depth: bool = option(
        False, "train the dense network, and one twice as deep at --density", same=True
    )
    match: bool = option(
        True, "with --double_depth: lower densities until both have as many weights", same=True
    )
    density: tuple[float, ...] = option(
        (0.5,), "stored share of the weights, of all stages or of each", above=0, most=1, same=True
    )
    block: int = option(0, "side of a block of channels; 0: 16, of digits 8", least=0, same=True)
    pattern: tuple[str, ...] = option(
        ("balanced",), "which blocks, in all stages or in each", choices=plan.PATTERNS, same=True
    )
    rewired: float = option(0.2, "share of links, of watts_strogatz", least=0, most=1, same=True)
    fraction: float = option(
        1.0,
        "with --density 1: share of the channels that a step samples",
        above=0,
        most=1,
        same=True,
    )
    sampled_block: int = option(1, "channels that are sampled together", least=1, same=True)
    epochs: int = option(0, "passes over the images; 0: 200, of digits 20", least=0, same=True)
    batch: int = option(0, "images per step; 0: 128, of digits 64", least=0, same=True)
    learning_rate: float = option(0.1, "its highest value", above=0, same=True)
    schedule: str = option("cosine", "how it falls", choices=("cosine", "step"), same=True)
    warmup: float = option(0.0, "share of the steps in which it rises", least=0, most=1, same=True)
    drops: tuple[float, ...] = option(
        (0.3, 0.6, 0.8), "of schedule step: shares of the steps", least=0, most=1, same=True
    )
    factor: float = option(0.2, "of schedule step: what a drop multiplies by", above=0, same=True)
    momentum: float = option(0.9, "Nesterov's", least=0, most=0.999, same=True)
    weight_decay: float = option(5e-4, "of kernels, in their gradient", least=0, same=True)
    smoothing: float = option(0.0, "of labels", least=0, most=0.9, same=True)
    average: float = option(
        0.999, "decay of the averaged network; less in the beginning", least=0, most=1, same=True
    )
    statistics: str = option(
        "averaged",
        "of the averaged network's normalisation: averaged too, or of its own on training images",
        choices=("averaged", "re-estimated"),
        same=True,
    )
    statistics_batches: int = option(50, "to re-estimate with", least=1, same=True)
    augment: tuple[str, ...] = option(
        (), "default: crop flip, of digits crop", choices=(*WAYS, "none"), same=True
    )
    crop: int = option(0, "border of a crop; 0: 4, of digits 1", least=0, most=32, same=True)
    cutout: int = option(0, "side of a cut-out; 0: 16, of digits 3", least=0, most=64, same=True)
    dtype: str = option(
        "float32", "to compute in; weights are float32", choices=("float32", "bfloat16"), same=True
    )
    fold: bool = option(False, "fold normalisations into convolutions to measure", same=True)
    seeds: int = option(1, "networks of each kind", least=1)
    seed: int = option(0, "of the first one", least=0, most=2**31 - 1)
    rounds: int = option(
        5, "timed steps of each network, and of a dense one beside it; 0: none", least=0
    )
    measure_every: int = option(1, "epochs between measurements", least=1, same=True)
    checkpoint_every: int = option(1, "epochs between checkpoints", least=1)

    def settled(self) -> "Config":
        """With the values that depend on the data."""
        chosen = CIFAR if self.data else DIGITS
        new = {name: getattr(self, name) or value for name, value in chosen.items()}
        ways = self.augment or (("crop", "flip") if self.data else ("crop",))
        if "none" in ways and len(ways) > 1:
            raise Mistake(f"--augment {' '.join(ways)} is nothing and something: leave out none")
        return dataclasses.replace(self, **new, augment=ways)

    def training(self, steps: int) -> Training:
        own = {name: getattr(self, name) for name in Training._fields if name != "steps"}
        return Training(steps=steps, **own)

    def augmentation(self) -> Augmentation:
        chosen = {way: way in self.augment for way in WAYS}
        return Augmentation(
            crop=self.crop * chosen["crop"],
            flip=chosen["flip"],
            cutout=self.cutout * chosen["cutout"],
        )


def sizes(config: Config) -> dict[str, Size]:
    """What is trained, by name."""
    names = ("block", "rewired", "fraction", "sampled_block", "dtype")
    base = plan.named(config.network)
    base = base._replace(**{name: getattr(config, name) for name in names})
    base = base._replace(patterns=plan.each_stage("--pattern", config.pattern, base))
    sparse = plan.with_density(base, config.density)
    if config.fraction < 1 and (config.double_depth or sparse.densities):
        raise Mistake(
            f"--fraction {config.fraction} samples the channels of dense convolutions: give "
            "--density 1, without --double_depth"
        )
    if config.double_depth:
        deep = plan.deeper(base, config.density, match=config.match)
        return {"dense": base, "twice as deep": deep}
    kind = "block-sparse" if sparse.densities else "dense" if config.fraction == 1 else "sampled"
    return {kind: sparse}


def check(found: dict[str, Size], channels: int) -> None:
    """Raises `Mistake` for what cannot be built."""
    for size in found.values():
        convs = [c for stage in plan.stages_of(size) for block in stage for c in block.convs]
        inputs = {conv.k for conv in convs}
        if size.fraction < 1 and (odd := {k for k in inputs if k % size.sampled_block}):
            raise Mistake(
                f"--sampled_block {size.sampled_block} does not divide {min(odd)} channels: give a "
                "divisor of them"
            )
        if size.densities and not any(conv.stored for conv in convs):
            raise Mistake(
                f"--block {size.block} leaves no convolution with enough blocks of channels to "
                "store a share of them: take a smaller one, or a wider --network"
            )
        plan.costs(size, channels=channels)


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports; the exit code."""
    given = cli.parse(Config, argv, command="python -m models.resnet", about=ABOUT)
    config = given.settled()
    contenders = sizes(config)
    check(contenders, 3 if config.data else 1)
    output_folder(config.out)
    data = Data.of(config)
    print(data.images.about)
    if config.batch > len(data.images.train.y):
        raise Mistake(
            f"--batch {config.batch} is more than the {len(data.images.train.y):,} images: take "
            "fewer"
        )
    checkpoints = config.out / "resnet-checkpoint"
    if not config.resume and checkpoints.exists():  # as `Runs` does with results
        before = checkpoints.with_name(f"{checkpoints.name}-before")
        shutil.rmtree(before, ignore_errors=True)
        checkpoints.replace(before)
    runs = Runs(config.out / "resnet.jsonl", resume=config.resume)
    where = whereabouts(cli.shell_command("models.resnet", given))
    where |= {name: version(name) for name in ("flax", "grain")}
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for seed in range(config.seed, config.seed + config.seeds):
        for name, size in contenders.items():
            job = Job(name, size, seed)
            key = settings(config, job, data.images.digest)
            found = runs.get(key) or train(config, job, data)
            if found is None:
                return cli.stopped("models.resnet", given, f"The checkpoint is in {checkpoints}")
            if not runs.get(key):
                runs.add(key, found, where)
            results[name].append(found)
    seconds = {}
    if config.rounds:
        alone = list(contenders.values())[-1]
        beside = {} if "dense" in contenders else {"dense, not trained": plan.dense(alone)}
        print(f"Timing {config.rounds} steps of each network ...")
        seconds = step_times(config, contenders | beside, data)
    report(config, data.images.about, contenders, results, seconds, where)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
