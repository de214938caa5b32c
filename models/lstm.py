"""A small-world LSTM learns real text, byte by byte, alone or beside a dense one of equal size.

    python -m models.lstm --help
    python -m models.lstm --match-parameters                      # beside a dense one
    python -m models.lstm --generate 500 --prompt "def " --state story.npz

The recurrent weights are block-sparse graphs, and the state is mixed by them a few times in each
time step, so that it can be several times as wide as a dense one with as many parameters. After
Gray, Radford and Kingma 2017, "GPU Kernels for Block-Sparse Weights". Training walks along
`--batch` streams of the text and carries their states over from window to window.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from models import _cli as cli
from models import _generate as writing
from models import _recurrent as recurrent
from models import _streams as texts
from models._cli import Mistake, option
from models._lstm import Parts, Run, Training, heldout_bits
from models._lstm_report import report
from models._recurrent import DENSE, PARAMETERS, SPARSE, Size
from models._report import print_sample
from models._train import Checkpoints, CtrlC, Progress, finite, output_folder

ABOUT = "Trains a small-world LSTM on text, alone or beside a dense LSTM of equal size."
OUT = Path(__file__).parent.parent / "out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    data: tuple[Path, ...] = option(
        (), "files or folders to learn (plain, .gz, .xz); default: the Python standard library"
    )
    out: Path = option(OUT, "folder for pictures, numbers, models and checkpoints")  # noqa: RUF009
    resume: bool = option(False, "go on from the last checkpoint in --out")
    match_parameters: bool = option(
        False, "train a dense model with as many parameters beside the sparse one", same=True
    )
    bytes: int = option(1_000_000, "of text to train on, its first; 0: all", least=0, same=True)
    epochs: int = option(1, "passes over these bytes", least=1, same=True)
    valid: float = option(
        0.05, "share of the text to choose flags by", above=0, most=0.4, same=True
    )
    test: float = option(0.05, "share of the text to report", above=0, most=0.4, same=True)
    heldout_bytes: int = option(65_536, "of each of these two to measure on", least=2)
    batch: int = option(32, "streams of text side by side", least=1, same=True)
    length: int = option(64, "bytes that a gradient goes back", least=1, same=True)
    hidden: int = option(640, "features of the state", least=1, same=True)
    embedding: int = option(64, "features of a byte", least=1, same=True)
    depth: int = option(5, "internal steps of a time step", least=1, same=True)
    block: int = option(32, "side of a block of weights", least=1, same=True)
    graph: str = option(
        "barabasi_albert",
        "which blocks are stored",
        choices=(*PARAMETERS, "dense"),
        same=True,
    )
    links: int = option(2, "links of a new block, or to each side of a ring", least=1, same=True)
    rewired: float = option(0.2, "share of rewired links of a ring", least=0, most=1, same=True)
    in_stride: int = option(2, "every so many features of the state see x", least=1, same=True)
    out_stride: int = option(2, "every so many are seen by the readout", least=1, same=True)
    shared: bool = option(False, "one pattern for all internal steps", same=True)
    layer_norm: bool = option(True, "normalise after each product", same=True)
    dropout: float = option(0.0, "of the update of the state", least=0, most=0.9, same=True)
    dtype: str = option(
        "float32", "to compute in; weights are float32", choices=("float32", "bfloat16"), same=True
    )
    remat: bool = option(False, "compute again in the backward pass, to save memory", same=True)
    learning_rate: float = option(2e-3, "its highest value", above=0, same=True)
    warmup: float = option(0.1, "share of the steps in which it rises", least=0, most=1, same=True)
    clip: float = option(1.0, "the largest norm of a gradient", above=0, same=True)
    average: float = option(
        0.999, "decay of the averaged parameters; less in the beginning", least=0, most=1, same=True
    )
    seed: int = option(0, "of weights and patterns", least=0, most=2**31 - 1, same=True)
    checkpoint_every: int = option(100, "steps between checkpoints", least=1)
    measure_every: int = option(100, "steps between measurements on validation text", least=1)
    rounds: int = option(5, "timed steps of each model", least=1)
    prompt: str = option("def ", "what generated text begins with")
    sample_length: int = option(300, "bytes of each sample after training", least=0)
    temperature: float = option(0.6, "of generated text; 0 takes the likeliest byte", least=0)
    generate: int = option(0, "do not train: write so many bytes after --prompt", least=0)
    model: Path | None = option(  # noqa: RUF009
        None, "with --generate: folder of the model; default: the one in --out"
    )
    state: Path | None = option(  # noqa: RUF009
        None, "with --generate: file with the state of a text to go on with, written back after it"
    )

    def size(self) -> Size:
        """Of the sparse model."""
        return Size(**{name: getattr(self, name) for name in Size._fields})

    def training(self, steps: int) -> Training:
        own = {name: getattr(self, name) for name in Training._fields if name != "steps"}
        return Training(steps=steps, **own)


def check(config: Config) -> None:
    """Raises `Mistake` for flags that do not fit each other."""
    if config.graph == "dense":
        return
    cli.check_multiple("hidden", config.hidden, "--block", config.block)
    if config.graph == "strides" and config.shared:
        raise Mistake("--shared does not go with --graph strides, whose steps differ: leave it out")
    blocks = config.hidden // config.block
    most = {"barabasi_albert": blocks - 1, "watts_strogatz": (blocks - 1) // 2}
    if config.links > most.get(config.graph, config.links):
        raise Mistake(
            f"--links {config.links} are more than a {config.graph} graph of {blocks} blocks has "
            f"room for: give at most {most[config.graph]}, a larger --hidden or a smaller --block"
        )


def sizes(config: Config) -> dict[str, Size]:
    """What is trained, by name."""
    size = config.size()
    if size.dense:
        return {DENSE: size}
    both = {SPARSE: size}
    return both | {DENSE: recurrent.matching_dense(size)} if config.match_parameters else both


def model_folder(config: Config, name: str) -> Path:
    """Where a trained model is, for `_recurrent.load`."""
    return config.out / f"lstm-{name}"


def train(config: Config, parts: Parts, runs: dict[str, Run], saved: Checkpoints) -> Any:
    """All models step by step; returns what is known of each, or None after Ctrl-C.

    That is, by name: `losses`, of every step, and `valid`, pairs of a step and the bits per byte of
    validation text with the averaged parameters.
    """
    windows = parts.train.windows
    first, last = 0, config.epochs * windows
    log = {name: {"losses": [], "valid": []} for name in runs}
    if config.resume:
        first, trees, log = saved.restore({name: run.tree() for name, run in runs.items()})
        for name, run in runs.items():
            run.update(trees[name])
        print(f"Going on from step {first}.")
    progress = Progress(last, start=first, tokens=config.batch * config.length, unit="bytes")
    with CtrlC() as stop, progress:
        for step in range(first, last):
            (window, count), done = parts.train.window(step % windows), step + 1
            for name, run in runs.items():
                if step % windows == 0:
                    run.rewind()
                log[name]["losses"].append(finite(name, run.step(window, count)))
                if done % config.measure_every == 0 or done == last:
                    bits = heldout_bits(run.averaged(), parts.valid)
                    log[name]["valid"].append([done, bits])
            now = ", ".join(f"{name} {log[name]['losses'][-1]:.2f}" for name in runs)
            progress.update(done, f"{now} bits/byte")
            if stop.asked or done % config.checkpoint_every == 0 or done == last:
                saved.save(done, {name: run.tree() for name, run in runs.items()}, log)
                for name, run in runs.items():
                    about = {"flags": cli.fixed(config), "step": done}
                    recurrent.save(model_folder(config, name), run.averaged(), about)
            if stop.asked:
                break
    saved.close()
    return None if stop.asked else log


def write(config: Config) -> None:
    """Generates text, without training."""
    name = DENSE if config.graph == "dense" else SPARSE
    model = recurrent.load(config.model or model_folder(config, name))
    state = None
    if config.state and config.state.exists():
        state = writing.load_state(config.state, model)
    prompt = config.prompt.encode(errors="surrogateescape")
    key = None if state else jax.random.key(config.seed)
    text, state = writing.generate(model, state, prompt, config.generate, config.temperature, key)
    written = (prompt + text).decode(errors="replace")
    print_sample(f"What a model of {model.size.hidden} features writes:", written)
    if config.state:
        writing.save_state(config.state, state)
        print(f"The state is in {config.state}; the next text goes on from it.")


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports, or generates; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.lstm", about=ABOUT)
    if config.generate:
        write(config)
        return 0
    check(config)
    output_folder(config.out)
    held = {"valid": config.valid, "test": config.test}
    text = texts.load(
        config.data, config.out / "lstm-text.bytes", most=config.bytes or None, **held
    )
    print(text.about)
    parts, contenders = Parts(config, text), sizes(config)
    training = config.training(config.epochs * parts.train.windows)
    runs = {name: Run.start(size, training, config.seed) for name, size in contenders.items()}
    about = {**cli.fixed(config), "a text with the hash": text.digest}
    saved = Checkpoints(config.out / "lstm-checkpoint", about)
    log = train(config, parts, runs, saved)
    if log is None:
        return cli.stopped("models.lstm", config, f"The checkpoint is in {saved.folder}")
    report(config, training, parts, runs, log)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
