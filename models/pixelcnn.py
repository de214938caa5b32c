"""A PixelCNN++ of block-sparse convolutions predicts images beside a dense one, half as deep.

    python -m models.pixelcnn --help
    python -m models.pixelcnn --data FOLDER_OR_ARCHIVE_OF_CIFAR_10 --measure test

Both have the same width. The sparse one has `--deeper` times as many gated residual blocks, each
with 1 / `--deeper` of the connections, so that both have as many weights and do as many FLOPs. This
is what Gray, Radford and Kingma did (2017, "GPU Kernels for Block-Sparse Weights"): 2.90 bits per
dimension of CIFAR-10 rather than 2.92. The model is `_pixelcnn.py`, what it says of a pixel
`_logistic.py`, and how it learns `_pixelcnn_train.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from models import _cli as cli
from models import _pixels as pixels
from models._cli import Mistake, option
from models._pixelcnn import PATTERNS, Size
from models._pixelcnn_report import report
from models._pixelcnn_train import Run, Training, held_out_bits
from models._pixels import Pixels
from models._train import Checkpoints, CtrlC, Progress, finite, output_folder

ABOUT = "Trains a deep block-sparse PixelCNN++ beside a dense one of equal size, half as deep."
COMMAND = "models.pixelcnn"
OUT = Path(__file__).parent.parent / "out"
# by the side of an image
DEFAULTS = {
    "small": {"filters": 32, "blocks": 2, "scales": 1, "mixtures": 5, "batch": 16, "block": 8},
    "MNIST": {"filters": 64, "blocks": 2, "scales": 3, "mixtures": 10, "batch": 32, "block": 16},
    "color": {"filters": 192, "blocks": 5, "scales": 3, "mixtures": 10, "batch": 16, "block": 32},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    data: Path | None = option(  # noqa: RUF009
        None,
        "folder with MNIST's four IDX files, or CIFAR-10 (a folder, an archive or a batch); "
        "default: scikit-learn's digits",
    )
    out: Path = option(OUT, "folder for pictures, numbers and checkpoints")  # noqa: RUF009
    resume: bool = option(False, "go on from the last checkpoint in --out")
    measure: str = option(
        "validation",
        "images to measure on: of the training set (to choose values of flags), or the test set",
        choices=("validation", "test"),
        same=True,
    )
    steps: int = option(600, "training steps of each model", least=1, same=True)
    batch: int = option(0, "images per step; 0: 16, of MNIST 32", least=0, same=True)
    filters: int = option(
        0, "features of a stream; 0: 32, of MNIST 64, of CIFAR-10 192", least=0, same=True
    )
    blocks: int = option(
        0,
        "pairs of gated blocks of the dense model at each scale, up and down; 0: 2, of CIFAR-10 5",
        least=0,
        same=True,
    )
    scales: int = option(
        0,
        "sizes of the image that are looked at, each half of the one before; 0: 1, or 3 with "
        "--data",
        least=0,
        most=8,
        same=True,
    )
    mixtures: int = option(0, "logistics for a pixel; 0: 5, or 10 with --data", least=0, same=True)
    deeper: int = option(
        2, "times as many blocks in the sparse model, of so much less density", least=2, same=True
    )
    pattern: str = option(
        "block_diagonal",
        "of the sparse model, shuffled groups or anything",
        choices=PATTERNS,
        same=True,
    )
    block: int = option(
        0, "channels of a block; 0: 8, of MNIST 16, of CIFAR-10 32", least=0, same=True
    )
    dropout: float = option(0.2, "inside gated blocks", least=0, most=0.9, same=True)
    learning_rate: float = option(2e-3, "its highest value", above=0, same=True)
    warmup: float = option(0.05, "share of the steps in which it rises", least=0, most=1, same=True)
    rate_left: float = option(
        0.1, "share of the rate in the end; it falls exponentially", above=0, most=1, same=True
    )
    clip: float = option(1.0, "the largest norm of a gradient", above=0, same=True)
    average: float = option(
        0.999, "decay of the averaged parameters; less in the beginning", least=0, most=1, same=True
    )
    seed: int = option(
        0, "of weights, patterns, batches and dropout", least=0, most=2**31 - 1, same=True
    )
    checkpoint_every: int = option(100, "steps between checkpoints", least=1)
    measure_every: int = option(100, "steps between measurements on held-out images", least=1)
    held_images: int = option(
        1000, "so many held-out images are measured on while training; in the end, all", least=1
    )
    rounds: int = option(5, "timed steps of each model", least=1)
    samples: int = option(16, "images drawn from each model in the end", least=0)

    def settled(self, data: Pixels) -> "Config":
        """With the values that depend on the data."""
        color = data.train.shape[-1] > 1
        kind = "color" if color else "small" if data.levels < pixels.BYTES else "MNIST"
        chosen = DEFAULTS[kind]
        return dataclasses.replace(
            self, **{name: getattr(self, name) or value for name, value in chosen.items()}
        )

    def training(self) -> Training:
        return Training(**{name: getattr(self, name) for name in Training._fields})


def sizes(config: Config, data: Pixels) -> dict[str, Size]:
    """What is trained, by name."""
    shared = ("filters", "scales", "mixtures", "dropout", "block", "pattern")
    own: dict[str, Any] = {name: getattr(config, name) for name in shared}
    own |= {"channels": data.train.shape[-1], "levels": data.levels}
    return {
        "dense": Size(blocks=config.blocks, density=1.0, **own),
        "block-sparse": Size(
            blocks=config.blocks * config.deeper, density=1 / config.deeper, **own
        ),
    }


def check(config: Config, data: Pixels) -> None:
    """Raises `Mistake` for flags that do not fit each other or the images."""
    count, *sides, _ = data.train.shape
    if config.batch > count:
        raise Mistake(f"--batch {config.batch} is more than the {count:,} images: take fewer")
    cli.check_multiple("filters", config.filters, "--block", config.block)
    groups = config.filters // config.block
    if config.pattern == "block_diagonal" and groups % config.deeper:
        raise Mistake(
            f"--deeper {config.deeper} groups do not divide the {groups} blocks of {config.block} "
            f"channels in --filters {config.filters}: take another --block, or --pattern balanced"
        )
    if config.pattern == "balanced" and groups * 2 < config.deeper:
        raise Mistake(
            f"--deeper {config.deeper} stores less than one of the {2 * groups} blocks in a "
            "column: take a smaller --block"
        )
    unit = 2 ** (config.scales - 1)
    if any(side % unit for side in sides):
        most = 1 + min((side & -side).bit_length() - 1 for side in sides)
        raise Mistake(
            f"--scales {config.scales} halves images of {sides[0]} x {sides[1]} "
            f"{config.scales - 1} times, which does not come out even: take at most {most}"
        )


def train(config: Config, data: Pixels, runs: dict[str, Run], saved: Checkpoints) -> Any:
    """All models step by step on the same images; what is known of each, or None after Ctrl-C.

    That is, by name: `losses`, of every step, and `held`, pairs of a step and the bits per
    dimension of held-out images with the averaged parameters.
    """
    first, log = 0, {name: {"losses": [], "held": []} for name in runs}
    if config.resume:
        tree = {name: (run.state, run.rest) for name, run in runs.items()}
        first, tree, log = saved.restore(tree)
        for name, run in runs.items():
            run.state, run.rest = tree[name]
        print(f"Going on from step {first}.")
    held = data.held[: config.held_images]
    progress = Progress(config.steps, start=first, tokens=config.batch, unit="images")
    with CtrlC() as stop, progress:
        for step in range(first, config.steps):
            done = step + 1
            x = pixels.batch(data.train, step, seed=config.seed, size=config.batch)
            for name, run in runs.items():
                log[name]["losses"].append(finite(name, run.step(x)))
                if done % config.measure_every == 0 or done == config.steps:
                    bits = held_out_bits(run.model(averaged=True), held, config.batch)
                    log[name]["held"].append([done, bits])
            now = ", ".join(f"{name} {log[name]['losses'][-1]:.3f}" for name in runs)
            progress.update(done, f"{now} bits/dim")
            if stop.asked or done % config.checkpoint_every == 0 or done == config.steps:
                tree = {name: (run.state, run.rest) for name, run in runs.items()}
                saved.save(done, tree, log)
            if stop.asked:
                break
    saved.close()
    return None if stop.asked else log


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports; the exit code."""
    given = cli.parse(Config, argv, command=f"python -m {COMMAND}", about=ABOUT)
    output_folder(given.out)
    data = pixels.load(given.data, test=given.measure == "test")
    print(data.about)
    config = given.settled(data)
    check(config, data)
    training = config.training()
    runs = {name: Run.start(size, training) for name, size in sizes(config, data).items()}
    about = {**cli.fixed(config), "images with the hash": data.digest}
    saved = Checkpoints(config.out / "pixelcnn-checkpoint", about)
    log = train(config, data, runs, saved)
    if log is None:
        return cli.stopped(COMMAND, given, f"The checkpoint is in {saved.folder}")
    report(config, cli.shell_command(COMMAND, given), data, runs, log)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
