"""A wide block-sparse Transformer learns real text beside a narrower dense one of the same size.

    python -m models.transformer --help

Both are language models of bytes: decoders (Vaswani et al. 2017), normalised before each layer, of
one class. What differs is the width and the function that makes the linear layers; together they
give the same number of parameters. Both take the same steps on the same text. In the end a dense
model of the sparse one's width takes a few steps too, and the clock says what the missing blocks
save.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import _cli as cli
from models import _pictures as pictures
from models import _text as texts
from models._cli import Mistake, option
from models._compare import compare, of_text
from models._decode import generate as decoded
from models._decoder import BYTES as BYTES
from models._decoder import Block as Block
from models._decoder import Size, Transformer, block_sparse, dense, parameters
from models._decoder import rotate as rotate
from models._language import generate
from models._mesh import Team, mesh_of
from models._pictures import Pictures
from models._runs import Runs, whereabouts
from models._sizes import called, full, narrower, wide
from models._sparse_attention import PATTERNS, stored
from models._steps import adam, train_step
from models._train import Checkpoints, CtrlC, Progress, finite, output_folder

ABOUT = "Trains a wide block-sparse language model beside a narrower dense one of equal size."
OUT = Path(__file__).parent.parent / "out"
# what numbers depend on, beside what a run must be resumed with
MEASURED = ("accumulate", "remat", "data_parallel", "tensor_parallel", "heldout_bytes", "rounds")
type Data = texts.Text | Pictures
# "bernoulli" computes the whole product, and nothing would be saved
SAMPLERS = ("uniform", "with_replacement", "systematic", "priority", "top_k", "wta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    data: tuple[Path, ...] = option(
        (), "files or folders to learn (plain, .gz, .xz); default: the Python standard library"
    )
    images: str = option(
        "", 'images to learn instead, byte by byte: "digits", or a folder of MNIST or CIFAR-10'
    )
    out: Path = option(OUT, "folder for pictures, numbers and checkpoints")  # noqa: RUF009
    resume: bool = option(False, "go on from the last checkpoint in --out")
    steps: int = option(300, "training steps of each model", least=1, same=True)
    batch: int = option(4, "windows of text per step", least=1, same=True)
    length: int = option(256, "bytes per window", least=8, same=True)
    width: int = option(512, "width of the sparse model", least=8, same=True)
    layers: int = option(2, "layers of every model", least=1, same=True)
    heads: int = option(4, "attention heads of every model", least=1, same=True)
    block: int = option(32, "side of a block of weights", least=1, same=True)
    density: float = option(0.125, "stored share of the blocks", above=0, most=1, same=True)
    pattern: str = option("balanced", "which blocks", choices=("balanced", "random"), same=True)
    sparse: str = option(
        "all", "layers that are block-sparse", choices=("all", "mlp", "none"), same=True
    )
    gated: bool = option(False, "MLPs with a gate (GLU)", same=True)
    attention: str = option(
        "dense", "what the sparse model's positions see", choices=PATTERNS, same=True
    )
    attention_block: int = option(64, "side of a block of scores", least=1, same=True)
    window: int = option(128, "keys that windows and chunks show", least=1, same=True)
    sinks: int = option(4, "first keys, which all positions see", least=0, same=True)
    stride: int = option(
        0, "of strided and fixed; 0 is 64, and in images a row", least=0, same=True
    )
    summary: int = option(8, "columns that fixed shows of each chunk", least=1, same=True)
    dilation: int = option(4, "of dilated", least=1, same=True)
    random_blocks: int = option(3, "that bigbird draws for each", least=0, same=True)
    top_blocks: int = option(3, "that each query and head chooses", least=1, same=True)
    per_head: bool = option(
        False, "heads take the two parts of strided and fixed in turn", same=True
    )
    sample: float = option(
        0.0,
        "share of the outer products that dense layers compute; 0: all",
        least=0,
        most=1,
        same=True,
    )
    sampler: str = option("systematic", "how to sample", choices=SAMPLERS, same=True)
    sample_block: int = option(1, "neighbours sampled together", least=1, same=True)
    sample_policy: str = option(
        "forward", "what is sampled", choices=("forward", "backward", "weight"), same=True
    )
    dtype: str = option(
        "float32", "to compute in; weights are float32", choices=("float32", "bfloat16"), same=True
    )
    accumulate: int = option(1, "parts of a batch, one after the other", least=1)
    remat: bool = option(False, "compute layers again in the backward pass: saves memory")
    data_parallel: int = option(1, "devices that share a batch", least=1)
    tensor_parallel: int = option(1, "devices that share a model", least=1)
    learning_rate: float = option(4e-3, "its highest value", above=0, same=True)
    warmup: float = option(0.1, "share of the steps in which it rises", least=0, most=1, same=True)
    weight_decay: float = option(0.1, "of all weights but biases and gains", least=0, same=True)
    seed: int = option(0, "of weights, patterns and batches", least=0, most=2**31 - 1, same=True)
    checkpoint_every: int = option(100, "steps between checkpoints", least=1)
    heldout_bytes: int = option(65_536, "of held-out text to measure on", least=1)
    rounds: int = option(5, "timed steps of each model", least=1)
    prompt: str = option("def ", "what the sample of generated text begins with")
    sample_length: int = option(400, "bytes of generated text", least=0)
    temperature: float = option(0.6, "of the sample; 0 takes the likeliest byte", least=0)


# --------------------------------------------------------------------------------- the training


class Run(NamedTuple):
    """A model and its optimizer."""

    model: Transformer
    optimizer: nnx.Optimizer

    @classmethod
    def start(cls, config: Config, size: Size) -> "Run":
        model = Transformer(config, size, nnx.Rngs(config.seed))
        tx = adam(config.learning_rate, config.warmup, config.steps, config.weight_decay)
        return cls(model, nnx.Optimizer(model, tx, wrt=nnx.Param))


def batch(config: Config, text: Data, step: int) -> jax.Array:
    """The text or the images of one step, [batch, length + 1]."""
    seed, size, length = config.seed, config.batch, config.length
    if isinstance(text, Pictures):
        return jnp.asarray(pictures.batch(text, step, seed=seed, size=size))
    return jnp.asarray(texts.batch(text.train, step, seed=seed, size=size, length=length))


def train(
    config: Config,
    text: Data,
    runs: dict[str, Run],
    saved: Checkpoints,
    team: Team | None = None,
) -> Any:
    """All models step by step; returns the losses of each, or None after Ctrl-C."""
    team = team or Team(config, dict.fromkeys(runs))
    first, losses = 0, {name: [] for name in runs}
    if config.resume:
        first, states, losses = saved.restore({name: nnx.state(run) for name, run in runs.items()})
        for name, run in runs.items():
            nnx.update(run, states[name])
        print(f"Going on from step {first}.")
    team.spread(runs)
    progress = Progress(config.steps, start=first, tokens=config.batch * config.length)
    with CtrlC() as stop, progress:
        for step in range(first, config.steps):
            data, done = team.data(batch(config, text, step)), step + 1
            for name, run in runs.items():
                loss = train_step(*run, data, loss=team.losses[name], accumulate=config.accumulate)
                losses[name].append(finite(name, loss))
            now = ", ".join(f"{name} {losses[name][-1]:.2f}" for name in runs)
            progress.update(done, f"{now} bits/byte")
            if stop.asked or done % config.checkpoint_every == 0 or done == config.steps:
                saved.save(done, team.states(runs), losses)
            if stop.asked:
                break
    saved.close()
    team.gather(runs)
    return None if stop.asked else losses


def contenders(config: Config, text: Data, sizes: dict[str, Size]) -> dict[str, dict]:
    """What to say and to time of each model, and of the dense one that is as wide."""
    whole = full(config, config.width, sizes["dense"])
    sizes = sizes if whole == sizes["dense"] else {**sizes, f"dense, {config.width} wide": whole}
    team = Team(config, sizes)
    data = team.data(batch(config, text, 0))

    def facts(name: str, size: Size) -> dict[str, Any]:
        run = Run.start(config, size)
        team.spread({name: run})
        how = {"loss": team.losses[name], "accumulate": config.accumulate}
        found: dict[str, Any] = {"width": size.width, "parameters": parameters(config, size)}
        if config.attention != "dense":
            column = "scores, at most" if config.attention == "top_blocks" else "scores"
            found[column] = stored(config, config.heads) if size.sparse_attention else 1.0
        return {**found, "step": functools.partial(train_step, *run, data, **how)}

    return {name: facts(name, size) for name, size in sizes.items()}


def layer(config: Config, density: float | None, rngs: nnx.Rngs) -> nnx.Module:
    """The first layer of an MLP, dense if the density is None."""
    config = dataclasses.replace(config, density=density or 1.0)
    linear = block_sparse if density else dense
    return linear(config, rngs)(config.width, 4 * config.width)


def check(config: Config) -> None:
    """Raises `Mistake` for flags that do not fit each other."""
    for name, unit in (("2 x --heads", 2 * config.heads), ("--block", config.block)):
        cli.check_multiple("width", config.width, name, unit)
    cli.check_multiple("batch", config.batch, "--accumulate", config.accumulate)
    blocks = config.width // config.block
    if config.density * blocks**2 < 1:
        raise Mistake(
            f"--density {config.density} stores less than one of the {blocks} x {blocks} blocks of "
            f"a layer: give at least {1 / blocks**2:.4f}, or a smaller --block"
        )
    if config.sample and config.sparse == "all":
        raise Mistake(
            "--sample is of dense layers, and all are block-sparse: add --sparse mlp, or none"
        )
    if config.sample:
        cli.check_multiple("width", config.width, "--sample_block", config.sample_block)
    if not called(config):
        raise Mistake("nothing is sparse: give --attention or --sample, or another --sparse")


def load(config: Config) -> tuple[Config, Data]:
    """What is learned, and the flags that follow from it."""
    if not config.images:
        return (
            dataclasses.replace(config, stride=config.stride or 64),
            texts.load(config.data, config.length + 1),
        )
    found = pictures.load(config.images)
    _, columns, channels = found.shape
    row = config.stride or columns * channels
    return dataclasses.replace(config, stride=row, length=found.train.shape[1]), found


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports; the exit code."""
    given = cli.parse(Config, argv, command="python -m models.transformer", about=ABOUT)
    check(given)
    output_folder(given.out)
    if given.data_parallel * given.tensor_parallel > 1:
        mesh_of(given.data_parallel, given.tensor_parallel)  # before JAX first runs
    config, text = load(given)
    print(text.about)
    of_images = isinstance(text, Pictures)
    kept = Runs(config.out / "transformer.jsonl", resume=True)  # a line for each run
    sparse = wide(config, text.shape if of_images else None)
    sizes = {called(config): sparse, "dense": narrower(config, sparse)}
    team = Team(config, sizes)
    runs = {name: Run.start(config, size) for name, size in sizes.items()}
    about = {**cli.fixed(config), "a text with the hash": text.digest}
    saved = Checkpoints(config.out / "transformer-checkpoint", about)
    losses = train(config, text, runs, saved, team)
    if losses is None:
        return cli.stopped("models.transformer", given, f"The checkpoint is in {saved.folder}")
    for run in runs.values():
        run.model.eval()  # what is sampled in training is measured exactly
    about |= {f"--{name}": getattr(config, name) for name in MEASURED}
    where = whereabouts(cli.shell_command("models.transformer", given))
    write = generate if config.attention == "dense" else decoded
    compare(
        "transformer",
        config,
        pictures.material(config, text) if of_images else of_text(config, text, write),
        losses,
        trained={name: run.model for name, run in runs.items()},
        contenders=contenders(config, text, sizes),
        layer=functools.partial(layer, config),
        keep=lambda found: kept.add(about, found, where),
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
