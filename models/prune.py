"""A dense decoder is pruned to blocks: what it loses, and what some fine-tuning brings back.

    python -m models.prune                                   # trains a small decoder first
    python -m models.prune --model out/transformer-checkpoint
    python -m models.prune --model FOLDER/model.safetensors --tokens FILE.npy --learning_rate 1e-4

Of each linear layer, the blocks of the largest l2 norm stay, bitwise as they were, and it becomes a
`bsjax.nnx.BlockLinear`; with `--criteria gradient` those stay without which the loss would change
most. Beside it stands a model that keeps as many blocks of each layer, drawn at random. Reported
are the losses on held-out text of each, right after pruning and after `--steps` steps of
fine-tuning, of the dense model and of one that took as many more steps, and the time of a forward
pass. Pruned models are saved; `--model` takes them again, to prune them further.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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
from models._language import heldout_bits
from models._prune_report import CRITERIA, DENSE, GIVEN, GRADIENT, MAGNITUDE, RANDOM, show, title
from models._report import interleaved
from models._runs import Runs, whereabouts
from models._steps import adam, mean_bits, train_step
from models._train import Progress, finite, output_folder, parameter_count

ABOUT = "Prunes a dense decoder to block-sparse form, and reports its losses before and after."
HEADS = 4
WARMUP = 0.1  # share of the steps in which the rate rises


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
    heads: int | None = option(
        None, f"of a GPT-2 without config.json, or of the model trained here (default: {HEADS})",
        least=1,
    )  # fmt: skip
    epsilon: float = option(_gpt2.EPSILON, "of the norms of a GPT-2 without config.json", above=0)
    train_steps: int = option(300, "of the model trained here", least=1)
    train_learning_rate: float = option(4e-3, "of the model trained here", above=0)
    width: int = option(256, "of the model trained here", least=8)
    layers: int = option(2, "of the model trained here", least=1)


class Row(NamedTuple):
    """What is known of one model. Losses are bits per byte, or nats per token."""

    method: str
    density: float
    stored: float  # the share of weights in the pruned layers
    parameters: int
    loss: float
    tuned: float | None  # the loss after fine-tuning


# --------------------------------------------------------------------------------- the training


@nnx.jit
def gradient(model: Any, data: jax.Array) -> nnx.State:
    return nnx.grad(mean_bits)(model, data)


def fit(
    config: Config, model: Any, text: texts.Text, *, rate: float, steps: int, first: int, name: str
) -> None:
    """Trains a model in place, on the batches from number `first` on."""
    optimizer = nnx.Optimizer(model, adam(rate, WARMUP, steps, config.weight_decay), wrt=nnx.Param)
    sizes = {"seed": config.seed, "size": config.batch, "length": config.length}
    with Progress(steps, tokens=config.batch * config.length, doing=name) as progress:
        for step in range(steps):
            data = jnp.asarray(texts.batch(text.train, first + step, **sizes))
            loss = finite(name, train_step(model, optimizer, data))
            progress.update(step + 1, f"{loss:.2f} bits")


def own(config: Config, text: texts.Text) -> Decoder:
    """A small dense decoder of bytes, trained on the text."""
    heads = config.heads or HEADS
    cli.check_multiple("width", config.width, "2 x --heads", 2 * heads)
    flags = {"layers": config.layers, "heads": heads, "length": config.length, "seed": config.seed}
    decoder = _decoders.start(flags, config.width)._replace(
        trained_on=text.digest, batches=config.train_steps
    )
    pruning.weights(decoder.model, config.block)  # whether blocks fit, before it is trained
    rate, steps = config.train_learning_rate, config.train_steps
    fit(config, decoder.model, text, rate=rate, steps=steps, first=0, name="training dense")
    return decoder


# --------------------------------------------------------------------------------- the pruning


class Bench(NamedTuple):
    """What every model is measured with."""

    config: Config
    text: texts.Text
    unit: str  # "byte" or "token"
    first: int  # the number of the first batch that no model has seen

    def loss(self, model: Any) -> float:
        """On held-out text: bits per byte, or nats per token."""
        c = self.config
        # windows at a time: logits over many tokens take more memory than anything else
        size = 4 * c.batch if self.unit == "byte" else c.batch
        sizes = {"count": c.heldout, "length": c.length, "size": size}
        found = heldout_bits(model, self.text.heldout, **sizes)
        return found if self.unit == "byte" else found * math.log(2)

    def gradients(self, model: Any) -> Iterator[nnx.State]:
        """Of the loss of a few batches of training text, one by one."""
        c = self.config
        for i in range(c.score_batches):
            sizes = {"seed": c.seed, "size": c.batch, "length": c.length}
            data = jnp.asarray(texts.batch(self.text.train, self.first + i, **sizes))
            yield gradient(model, data)

    def row(self, method: str, density: float, stored: float, model: Any) -> Row:
        """The losses of a model, which is fine-tuned in place."""
        c, before = self.config, self.loss(model)
        tuned = None
        if c.steps:
            name = f"fine-tuning {title(method, density)}"
            fit(
                c, model, self.text,
                rate=c.learning_rate, steps=c.steps, first=self.first, name=name,
            )  # fmt: skip
            tuned = self.loss(model)
        return Row(method, density, stored, parameter_count(model), before, tuned)


def prune_all(bench: Bench, decoder: Decoder, add: Any) -> tuple[list[Row], dict[str, Any]]:
    """A row for each model, and the pruned models by their titles, fine-tuned."""
    config, dense = bench.config, decoder.model
    found = pruning.weights(dense, config.block)
    stored = pruning.share({name: one.stored for name, one in found.items()}, found)
    base = DENSE if stored == 1 else GIVEN
    rows = [bench.row(base, stored, stored, pruning.clone(dense))]
    add(rows[0])
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
            rows.append(bench.row(method, density, stored, model))
            add(rows[-1])
            kept[title(method, density)] = model
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
    if decoder is None:
        decoder = own(config, text)
        if config.save:
            _decoders.save(config.out / "prune-dense.safetensors", decoder)
    elif decoder.trained_on not in (None, text.digest):
        print("The model was trained on another text, which may hold what is held out here.")
    runs = Runs(config.out / "prune.jsonl", resume=False)
    where = whereabouts(cli.shell_command("models.prune", config))
    where |= {name: version(name) for name in ("flax", "safetensors")}
    about = {
        name: getattr(config, name)
        for name in ("block", "scope", "balance", "steps", "learning_rate", "weight_decay",
                     "batch", "length", "heldout", "seed")
    }  # fmt: skip
    about |= {"model": decoder.about, "text": text.digest, "loss": f"per {unit}"}

    def add(row: Row) -> None:
        facts = row._asdict()
        settings = {name: facts.pop(name) for name in ("method", "density")}
        runs.add(settings | about, facts, where)

    rows, models = prune_all(Bench(config, text, unit, decoder.batches), decoder, add)
    if config.save:
        now = decoder._replace(batches=decoder.batches + config.steps)
        now = now._replace(trained_on=text.digest) if config.steps else decoder
        for name, model in models.items():
            path = config.out / f"prune-{name.replace(' ', '-')}.safetensors"
            _decoders.save(path, now._replace(model=model))
    first_of = config.criteria[0]  # the others have as many blocks in all, and take as long
    timed = {name: model for name, model in models.items() if name.startswith(first_of)}
    print("Timing forward passes, the models in turn ...", flush=True)
    seconds = times(config, text, {rows[0].method: decoder.model, **timed})
    settings = {"timing": f"forward pass of {config.batch} x {config.length}", **about}
    runs.add(settings, {name: list(all_) for name, all_ in seconds.items()}, where)
    show(config, unit, rows, seconds, models)
    print(f"Models, numbers and pictures are in {config.out} ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
