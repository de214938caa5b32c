"""A dense decoder is pruned to blocks: what it loses, and what some fine-tuning brings back.

    python -m models.prune                                   # trains a small decoder first
    python -m models.prune --model out/transformer-checkpoint
    python -m models.prune --model FOLDER/model.safetensors --tokens FILE.npy --learning_rate 1e-4

Of each linear layer, the blocks of the largest l2 norm stay, bitwise as they were, and it becomes a
`bsjax.nnx.BlockLinear`; with `--criteria gradient` those stay without which the loss would change
most. Beside it stands a model that keeps as many blocks of each layer, drawn at random. Reported
are the losses on held-out text of each, right after pruning and after `--steps` steps of
fine-tuning, of the dense model and of one that took as many more steps, and the time of a forward
pass. Pruned models are saved; `--model` takes them again, to prune them further. Every model is a
line of `prune.jsonl` as soon as it is done; `--resume` goes on where a run was stopped.
"""

import dataclasses
import functools
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import _bpe, _corpus, _decoders, _gpt2, transformer
from models import _cli as cli
from models import _prune as pruning
from models import _text as texts
from models._cli import Mistake, option
from models._decoders import Decoder
from models._prune_bench import Bench, Row, digest, fit
from models._prune_report import CRITERIA, DENSE, GIVEN, GRADIENT, MAGNITUDE, RANDOM, show, title
from models._report import interleaved
from models._runs import Runs, whereabouts
from models._train import Checkpoints, CtrlC, Stopped, output_folder

ABOUT = "Prunes a dense decoder to block-sparse form, and reports its losses before and after."
HEADS = 4
# what the model trained here depends on, beside its text
TRAINED = ("heads", "width", "layers", "train_steps", "train_learning_rate", "weight_decay",
           "batch", "length", "seed")  # fmt: skip
HASH = "a text with the hash"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    model: Path | None = option(  # noqa: RUF009
        None,
        "a checkpoint of models.transformer, a GPT-2 in safetensors (a file, an index of shards, "
        "or their folder), or a model saved here; default: train a small dense decoder",
    )
    data: tuple[Path, ...] = option(
        (), "files or folders of text (plain, .gz, .xz); default: the Python standard library"
    )
    tokens: tuple[Path, ...] = option(
        (),
        "ids instead of text, .npy or .bin (uint16): a file, or one to train on and one held out",
    )
    tokenizer: Path | None = option(  # noqa: RUF009
        None, "folder with vocab.json and merges.txt; default: that of --model, if it has them"
    )
    out: Path = option(transformer.OUT, "folder for models, results and pictures")  # noqa: RUF009
    resume: bool = option(False, "go on from the results and checkpoints in --out")
    densities: tuple[float, ...] = option(
        (0.75, 0.5, 0.25), "shares of the blocks to keep", above=0, most=1
    )
    block: int = option(32, "side of a block of weights", least=1)
    scope: str = option(
        "layer", "where a share is kept: in each layer, or in all", choices=pruning.SCOPES
    )
    balance: str = option(
        "none",
        "whether block-columns, or block-rows, keep equally many",
        choices=pruning.BALANCES,
    )
    criteria: tuple[str, ...] = option(
        (MAGNITUDE, RANDOM),
        "what blocks are chosen by: their norms, what the loss changes by without them to first "
        "order, or chance",
        choices=CRITERIA,
    )
    score_batches: int = option(16, "batches that --criteria gradient looks at", least=1)
    steps: int = option(50, "of fine-tuning", least=0)
    learning_rate: float = option(1e-3, "of fine-tuning, its highest value", above=0)
    weight_decay: float = option(0.1, "of all weights but biases and gains", least=0)
    batch: int = option(4, "windows per step, and in a timed forward pass", least=1)
    length: int = option(256, "bytes or tokens per window", least=8)
    heldout: int = option(32_768, "held-out bytes or tokens to measure on", least=1)
    rounds: int = option(9, "timed forward passes of each model", least=1)
    seed: int = option(0, "of random blocks, batches, and weights", least=0, most=2**31 - 1)
    save: bool = option(True, "write the models to --out")
    checkpoint_every: int = option(100, "steps between checkpoints", least=1)
    heads: int | None = option(
        None, f"of a GPT-2 without config.json, or of the model trained here (default: {HEADS})",
        least=1,
    )  # fmt: skip
    epsilon: float = option(_gpt2.EPSILON, "of the norms of a GPT-2 without config.json", above=0)
    train_steps: int = option(300, "of the model trained here", least=1)
    train_learning_rate: float = option(4e-3, "of the model trained here", above=0)
    width: int = option(256, "of the model trained here", least=8)
    layers: int = option(2, "of the model trained here", least=1)


def own(config: Config, text: texts.Text, stop: CtrlC) -> Decoder:
    """A small dense decoder of bytes, trained on the text."""
    heads = config.heads or HEADS
    cli.check_multiple("width", config.width, "2 x --heads", 2 * heads)
    flags = {"layers": config.layers, "heads": heads, "length": config.length, "seed": config.seed}
    decoder = _decoders.start(flags, config.width)._replace(
        trained_on=text.digest, batches=config.train_steps
    )
    pruning.weights(decoder.model, config.block)  # whether blocks fit, before it is trained
    about = {f"--{name}": getattr(config, name) for name in TRAINED}
    saved = Checkpoints(config.out / "prune-checkpoint-training", about | {HASH: text.digest})
    how = {"rate": config.train_learning_rate, "steps": config.train_steps, "first": 0}
    fit(config, decoder.model, text, saved, stop, **how, name="training dense")
    return decoder


def prune_all(bench: Bench) -> tuple[list[Row], dict[str, Any]]:
    """A row for each model, and the pruned models by their titles, fine-tuned."""
    config, dense = bench.config, bench.decoder.model
    found = pruning.weights(dense, config.block)
    stored = pruning.share({name: one.stored for name, one in found.items()}, found)
    base = DENSE if stored == 1 else GIVEN
    rows = [bench.row(base, stored, stored, pruning.clone(dense))[0]]
    scores = {}
    if GRADIENT in config.criteria:
        scores = pruning.saliencies(dense, bench.gradients(dense), config.block)
    kept: dict[str, Any] = {}
    for density in dict.fromkeys(config.densities):
        how = {"scope": config.scope, "balance": config.balance}
        chosen = {MAGNITUDE: pruning.by_magnitude(found, density, **how)}
        if scores:
            chosen[GRADIENT] = pruning.masks(scores, density, **how)
        chosen[RANDOM] = pruning.at_random(
            found, chosen[MAGNITUDE], balance=config.balance, seed=config.seed
        )
        for method in dict.fromkeys(config.criteria):
            model = pruning.pruned(dense, chosen[method], config.block)
            stored = pruning.share(chosen[method], found)
            row, kept[title(method, density)] = bench.row(method, density, stored, model)
            rows.append(row)
    return rows, kept


@nnx.jit
def forward(model: Any, data: jax.Array) -> jax.Array:
    return model(data)


def times(config: Config, text: texts.Text, models: dict[str, Any]) -> dict[str, np.ndarray]:
    """Seconds of forward passes, the models in turn."""
    sizes = {"seed": config.seed, "size": config.batch, "length": config.length}
    data = jnp.asarray(texts.batch(text.train, 0, **sizes)[:, :-1])
    runs = {name: functools.partial(forward, model, data) for name, model in models.items()}
    return interleaved(runs, config.rounds)


def load(config: Config) -> tuple[Decoder | None, texts.Text, str]:
    """The model, unless it is to be trained, and its text."""
    if config.tokens and (config.data or config.tokenizer):
        raise Mistake("--tokens are the text already: leave --data and --tokenizer out")
    decoder, tokenizer = None, config.tokenizer
    if config.model is not None:
        decoder = _decoders.load(config.model, heads=config.heads, epsilon=config.epsilon)
        if decoder.positions is not None and config.length > decoder.positions:
            raise Mistake(
                f"--length {config.length} is more than the {decoder.positions} positions of the "
                f"model: give at most {decoder.positions}"
            )
        folder = config.model if config.model.is_dir() else config.model.parent
        if tokenizer is None and all((folder / name).is_file() for name in _bpe.FILES):
            tokenizer = folder
    text, unit = _corpus.load(
        decoder.vocabulary if decoder else _decoders.BYTES,
        config.length + 1,
        data=config.data,
        tokens=config.tokens,
        tokenizer=tokenizer,
    )
    return decoder, text, unit


def main(argv: list[str] | None = None) -> int:
    """Trains if need be, prunes, measures and reports; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.prune", about=ABOUT)
    output_folder(config.out)
    start = time.perf_counter()
    decoder, text, unit = load(config)
    print(text.about)
    try:
        with CtrlC() as stop:
            found = measured(config, decoder, text, unit, stop)
    except Stopped:
        return cli.stopped("models.prune", config, f"Results and checkpoints are in {config.out}")
    show(config, unit, *found)
    print(f"Models, numbers and pictures are in {config.out} ({time.perf_counter() - start:.0f} s)")
    return 0


def measured(
    config: Config, decoder: Decoder | None, text: texts.Text, unit: str, stop: CtrlC
) -> tuple[list[Row], dict[str, np.ndarray], dict[str, Any]]:
    """A row for each model, the times of those with blocks of the first criterion, and the pruned
    models. Raises `Stopped` after Ctrl-C."""
    runs = Runs(config.out / "prune.jsonl", resume=config.resume)
    if decoder is None:
        decoder = own(config, text, stop)
        if config.save:
            _decoders.save(config.out / "prune-dense.safetensors", decoder)
    elif decoder.trained_on not in (None, text.digest):
        print("The model was trained on another text, which may hold what is held out here.")
    where = whereabouts(cli.shell_command("models.prune", config))
    where |= {name: version(name) for name in ("flax", "safetensors")}
    about = {
        name: getattr(config, name)
        for name in ("block", "scope", "balance", "score_batches", "steps", "learning_rate",
                     "weight_decay", "batch", "length", "heldout", "seed")
    }  # fmt: skip
    about |= {"model": decoder.about, "parameters with the hash": digest(decoder.model)}
    about |= {"batches before": decoder.batches, "text": text.digest, "loss": f"per {unit}"}
    rows, models = prune_all(Bench(config, text, unit, decoder, runs, where, about, stop))
    first_of = config.criteria[0]  # the others have as many blocks in all, and take as long
    timed = {name: model for name, model in models.items() if name.startswith(first_of)}
    print("Timing forward passes, the models in turn ...", flush=True)
    seconds = times(config, text, {rows[0].method: decoder.model, **timed})
    settings = {"timing": f"forward pass of {config.batch} x {config.length}", **about}
    runs.add(settings, {name: list(all_) for name, all_ in seconds.items()}, where)
    return rows, seconds, models


if __name__ == "__main__":
    cli.run_main(main)
