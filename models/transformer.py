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
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import bsjax
import bsjax.nnx
from models import _cli as cli
from models import _text as texts
from models._cli import Mistake, option
from models._compare import compare
from models._language import bits
from models._train import Checkpoints, CtrlC, Progress, finite, is_matrix, output_folder

ABOUT = "Trains a wide block-sparse language model beside a narrower dense one of equal size."
OUT = Path(__file__).parent.parent / "out"
ORDER = 4  # bytes that one position sees before any attention
BYTES = 256
NORMAL = nnx.initializers.normal(1.0)
type Linear = Callable[..., nnx.Module]  # (features in, features out, gain=1.0) -> layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a run depends on. Every field is a flag."""

    data: tuple[Path, ...] = option(
        (), "files or folders to learn (plain, .gz, .xz); default: the Python standard library"
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


# ------------------------------------------------------------------------------------ the model


class Size(NamedTuple):
    """What one model is made of."""

    width: int
    hidden: int
    linear: Callable[["Config", nnx.Rngs], Linear]


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: rotary positions, squared ReLU."""

    def __init__(self, config: Config, size: Size, linear: Linear, rngs: nnx.Rngs):
        self.heads = config.heads
        self.before_attention = nnx.RMSNorm(size.width, rngs=rngs)
        self.qkv = linear(size.width, 3 * size.width)
        self.projection = linear(size.width, size.width, gain=(2 * config.layers) ** -0.5)
        self.before_mlp = nnx.RMSNorm(size.width, rngs=rngs)
        self.up = linear(size.width, size.hidden)
        self.down = linear(size.hidden, size.width, gain=(2 * config.layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, length, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).reshape(n, length, 3 * self.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        seen = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.projection(seen.reshape(x.shape))
        return x + self.down(jnp.square(jax.nn.relu(self.up(self.before_mlp(x)))))


class Transformer(nnx.Module):
    """`logits[n, l, 256]` of the byte after each of `data[n, l]`.

    A position is embedded by its byte and the three before it, side by side: at this size attention
    would spend most of the run learning to look one byte back.
    """

    def __init__(self, config: Config, size: Size, rngs: nnx.Rngs):
        linear = size.linear(config, rngs)
        parts = [size.width // ORDER + (i < size.width % ORDER) for i in range(ORDER)]
        self.embeddings = nnx.List(
            [nnx.Embed(BYTES, part, embedding_init=NORMAL, rngs=rngs) for part in parts]
        )
        self.blocks: nnx.List = nnx.List(
            [Block(config, size, linear, rngs) for _ in range(config.layers)]
        )
        self.norm = nnx.RMSNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, BYTES, kernel_init=by_fan_in(0.3), rngs=rngs)

    def __call__(self, data: jax.Array) -> jax.Array:
        length = data.shape[1]
        before = [jnp.pad(data, ((0, 0), (i, 0)))[:, :length] for i in range(ORDER)]
        x = jnp.concatenate([e(b) for e, b in zip(self.embeddings, before, strict=True)], axis=-1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions: pairs of features of `x[n, l, h, d]` turn with l. After Su et al. 2021."""
    _, length, _, features = x.shape
    turns = 10_000.0 ** -(np.arange(0, features, 2) / features)
    angle = (np.arange(length)[:, None] * turns)[None, :, None].astype(np.float32)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


@functools.cache  # two models of a size must be made of the same functions, or both compile
def by_fan_in(gain: float) -> nnx.Initializer:
    """Weights that keep the variance of features, times `gain` squared."""
    return nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")


def dense(config: Config, rngs: nnx.Rngs) -> Linear:
    """Linear layers that store every weight."""

    def linear(k: int, m: int, gain: float = 1.0) -> nnx.Module:
        return nnx.Linear(k, m, kernel_init=by_fan_in(gain), rngs=rngs)

    return linear


def block_sparse(config: Config, rngs: nnx.Rngs) -> Linear:
    """Linear layers that store a share of their blocks, another one in each layer."""
    mask = {"balanced": bsjax.patterns.balanced, "random": bsjax.patterns.random}[config.pattern]
    seeds = itertools.count(1000 * config.seed)

    def linear(k: int, m: int, gain: float = 1.0) -> nnx.Module:
        blocks = mask((k // config.block, m // config.block), config.density, seed=next(seeds))
        return bsjax.nnx.BlockLinear(
            k,
            m,
            pattern=blocks,
            block=config.block,
            kernel_init=bsjax.inits.stored_fan_in(gain),
            rngs=rngs,
        )

    return linear


def parameters(config: Config, size: Size) -> int:
    """The number of parameters, counted whole: embeddings, gains and biases too."""
    model = nnx.eval_shape(lambda: Transformer(config, size, nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def wide(config: Config) -> Size:
    """The block-sparse model."""
    return Size(config.width, 4 * config.width, block_sparse)


def narrower(config: Config, sparse: Size) -> Size:
    """The dense model with as many parameters as the sparse one."""
    wanted = parameters(config, sparse)
    step = 2 * config.heads  # rotary positions turn pairs of features
    size = Size(step, 4 * step, dense)
    while size.width < sparse.width:
        wider = Size(size.width + step, 4 * (size.width + step), dense)
        if parameters(config, wider) > wanted:
            break
        size = wider
    # what the width leaves over goes into the hidden layers
    spare = wanted - parameters(config, size)
    unit = config.layers * (2 * size.width + 1)
    size = size._replace(hidden=max(1, size.hidden + round(spare / unit)))
    if abs(parameters(config, size) / wanted - 1) > 0.02:
        raise Mistake(
            f"no dense model with {config.heads} heads has as few as {wanted:,} parameters: give a "
            "larger --density or --width, or fewer --heads"
        )
    return size


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


@functools.cache
def adam(peak: float, warmup: float, steps: int, decay: float) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019); its rate rises, then falls along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0, peak, round(warmup * steps), steps, peak / 50)
    matrices = functools.partial(jax.tree_util.tree_map_with_path, lambda at, _: is_matrix(at))
    adamw = optax.adamw(rate, b2=0.99, weight_decay=decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: Transformer, optimizer: nnx.Optimizer, data: jax.Array) -> jax.Array:
    """One step down the gradient; returns the mean loss before it, in bits per byte."""
    loss, gradient = nnx.value_and_grad(lambda model: bits(model, data).mean())(model)
    optimizer.update(model, gradient)
    return loss


def batch(config: Config, text: texts.Text, step: int) -> jax.Array:
    """The text of one step, [batch, length + 1]."""
    seed, size, length = config.seed, config.batch, config.length
    return jnp.asarray(texts.batch(text.train, step, seed=seed, size=size, length=length))


def train(config: Config, text: texts.Text, runs: dict[str, Run], saved: Checkpoints) -> Any:
    """All models step by step; returns the losses of each, or None after Ctrl-C."""
    first, losses = 0, {name: [] for name in runs}
    if config.resume:
        first, states, losses = saved.restore({name: nnx.state(run) for name, run in runs.items()})
        for name, run in runs.items():
            nnx.update(run, states[name])
        print(f"Going on from step {first}.")
    progress = Progress(config.steps, start=first, tokens=config.batch * config.length)
    with CtrlC() as stop, progress:
        for step in range(first, config.steps):
            data, done = batch(config, text, step), step + 1
            for name, run in runs.items():
                losses[name].append(finite(name, train_step(*run, data)))
            now = ", ".join(f"{name} {losses[name][-1]:.2f}" for name in runs)
            progress.update(done, f"{now} bits/byte")
            if stop.asked or done % config.checkpoint_every == 0 or done == config.steps:
                saved.save(done, {name: nnx.state(run) for name, run in runs.items()}, losses)
            if stop.asked:
                break
    saved.close()
    return None if stop.asked else losses


def contenders(config: Config, text: texts.Text, sizes: dict[str, Size]) -> dict[str, dict]:
    """What to say and to time of each model, and of the dense one that is as wide."""
    sizes = {**sizes, f"dense, {config.width} wide": wide(config)._replace(linear=dense)}
    data = batch(config, text, 0)
    return {
        name: {
            "width": size.width,
            "parameters": parameters(config, size),
            "step": functools.partial(train_step, *Run.start(config, size), data),
        }
        for name, size in sizes.items()
    }


def layer(config: Config, density: float | None, rngs: nnx.Rngs) -> nnx.Module:
    """The first layer of an MLP, dense if the density is None."""
    config = dataclasses.replace(config, density=density or 1.0)
    linear = block_sparse if density else dense
    return linear(config, rngs)(config.width, 4 * config.width)


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports; the exit code."""
    config = cli.parse(Config, argv, command="python -m models.transformer", about=ABOUT)
    for name, unit in (("2 x --heads", 2 * config.heads), ("--block", config.block)):
        cli.check_multiple("width", config.width, name, unit)
    blocks = config.width // config.block
    if config.density * blocks**2 < 1:
        raise Mistake(
            f"--density {config.density} stores less than one of the {blocks} x {blocks} blocks of "
            f"a layer: give at least {1 / blocks**2:.4f}, or a smaller --block"
        )
    output_folder(config.out)
    text = texts.load(config.data, config.length + 1)
    print(text.about)
    sizes = {"block-sparse": wide(config), "dense": narrower(config, wide(config))}
    runs = {name: Run.start(config, size) for name, size in sizes.items()}
    about = {**cli.fixed(config), "a text with the hash": text.digest}
    saved = Checkpoints(config.out / "transformer-checkpoint", about)
    losses = train(config, text, runs, saved)
    if losses is None:
        again = cli.shell_command("models.transformer", dataclasses.replace(config, resume=True))
        print(f"Stopped. The checkpoint is in {saved.folder}; go on with\n  {again}")
        return cli.INTERRUPTED
    compare(
        "transformer",
        config,
        text,
        losses,
        trained={name: run.model for name, run in runs.items()},
        contenders=contenders(config, text, sizes),
        layer=functools.partial(layer, config),
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
