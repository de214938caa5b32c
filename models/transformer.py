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
import time
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
from models import _report as report
from models import _text as texts
from models._cli import INTERRUPTED, Mistake, check_multiple, fixed, flags, option, parse, run_main
from models._language import bits, generate, heldout_bits
from models._train import Checkpoints, CtrlC, Progress, output_folder

OUT = Path(__file__).parent.parent / "out"
ORDER = 4  # bytes that one position sees before any attention
BYTES = 256
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
    width: int = option(512, "width of the sparse model", least=1, same=True)
    layers: int = option(2, "layers of every model", least=1, same=True)
    heads: int = option(4, "attention heads of every model", least=1, same=True)
    block: int = option(64, "side of a block of weights", least=1, same=True)
    density: float = option(0.125, "stored share of the blocks", above=0, most=1, same=True)
    pattern: str = option("balanced", "which blocks", choices=("balanced", "random"), same=True)
    learning_rate: float = option(4e-3, "its highest value", above=0, same=True)
    warmup: float = option(0.1, "share of the steps in which it rises", least=0, most=1, same=True)
    weight_decay: float = option(0.1, "of all weights but biases and gains", least=0, same=True)
    seed: int = option(0, "of weights, patterns and batches", least=0, same=True)
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
        normal = nnx.initializers.normal(1.0)
        self.embeddings = nnx.List(
            [nnx.Embed(BYTES, part, embedding_init=normal, rngs=rngs) for part in parts]
        )
        self.blocks = nnx.List([Block(config, size, linear, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(size.width, rngs=rngs)
        small = nnx.initializers.variance_scaling(0.1, "fan_in", "normal")
        self.head = nnx.Linear(size.width, BYTES, kernel_init=small, rngs=rngs)

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
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def dense(config: Config, rngs: nnx.Rngs) -> Linear:
    """Linear layers that store every weight."""

    def linear(k: int, m: int, gain: float = 1.0) -> nnx.Module:
        init = nnx.initializers.variance_scaling(gain**2, "fan_in", "normal")
        return nnx.Linear(k, m, kernel_init=init, rngs=rngs)

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
        peak, rising = config.learning_rate, round(config.warmup * config.steps)
        schedule = optax.warmup_cosine_decay_schedule(0, peak, rising, config.steps, peak / 50)
        decayed = functools.partial(jax.tree.map, lambda parameter: parameter.ndim > 1)
        adam = optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=decayed)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
        return cls(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: Transformer, optimizer: nnx.Optimizer, data: jax.Array) -> jax.Array:
    """One step down the gradient; returns the mean loss before it, in bits per byte."""
    loss, gradient = nnx.value_and_grad(lambda model: bits(model, data).mean())(model)
    optimizer.update(model, gradient)
    return loss


def batch(config: Config, text: texts.Text, step: int) -> jax.Array:
    """The text of one step, [batch, length + 1]."""
    sizes = {"size": config.batch, "length": config.length}
    return jnp.asarray(texts.batch(text.train, step, seed=config.seed, **sizes))


def train(config: Config, text: texts.Text, runs: dict[str, Run], saved: Checkpoints) -> Any:
    """All models step by step; returns the losses of each, or None after Ctrl-C."""
    first, losses = 0, {name: [] for name in runs}
    if config.resume:
        first, states, losses = saved.restore({name: nnx.state(run) for name, run in runs.items()})
        for name, run in runs.items():
            nnx.update(run, states[name])
        print(f"Going on from step {first}.")
    with CtrlC() as stop, Progress("training", config.steps, start=first) as progress:
        for step in range(first, config.steps):
            data, note = batch(config, text, step), []
            for name, run in runs.items():
                start = time.perf_counter()
                losses[name].append(float(train_step(*run, data)))
                speed = config.batch * config.length / (time.perf_counter() - start)
                note.append(f"{name} {losses[name][-1]:.2f} bits/byte {speed:,.0f} tokens/s")
            done = step + 1
            progress.update(done, ", ".join(note))
            if stop.asked or done % config.checkpoint_every == 0 or done == config.steps:
                saved.save(done, {name: nnx.state(run) for name, run in runs.items()}, losses)
            if stop.asked:
                break
    saved.close()
    return None if stop.asked else losses


# ------------------------------------------------------------------------------- the comparison


def compare(config: Config, text: texts.Text, sizes: dict[str, Size], runs: Any, losses: Any):
    """The table, a sample and the pictures."""
    sparse, wide = "block-sparse", f"dense, {config.width} wide"
    sizes = {**sizes, wide: sizes[sparse]._replace(linear=dense)}
    print("Measuring on held-out text ...", flush=True)
    measured = {"count": config.heldout_bytes, "length": config.length, "size": config.batch}
    heldout = {name: heldout_bits(r.model, text.heldout, **measured) for name, r in runs.items()}
    lines = {
        "unigram": texts.unigram_bits(text.train, text.heldout),
        "lzma": texts.lzma_bits(text.heldout),
    }
    print("Timing steps of all three models, in turn ...", flush=True)
    data, fresh = batch(config, text, 0), {n: Run.start(config, size) for n, size in sizes.items()}
    steps = {name: functools.partial(train_step, *run, data) for name, run in fresh.items()}
    seconds = report.interleaved(steps, config.rounds)
    kept = report.patterns_in(runs[sparse].model)
    rows = {
        name: {
            "width": size.width,
            "parameters": parameters(config, size),
            "stored": report.stored_share(kept) if name == sparse else 1.0,
            "bits/byte": heldout.get(name, "not trained"),
            "ms/step": 1e3 * float(np.median(seconds[name])),
            f"speed ({wide} = 1)": report.ratio(seconds[wide], seconds[name]),
        }
        for name, size in sizes.items()
    }
    rows |= {name: {"bits/byte": value} for name, value in lines.items()}
    tokens = config.steps * config.batch * config.length
    title = f"{config.steps:,} steps of {config.batch} x {config.length} bytes: {tokens:,} tokens"
    report.print_table(title, rows)

    drawn = {"count": config.sample_length, "temperature": config.temperature}
    sample = generate(
        runs[sparse].model, config.prompt, length=config.length, seed=config.seed, **drawn
    )
    report.print_sample("A sample of what the block-sparse model writes:", sample)

    print("Timing one layer at several densities ...", flush=True)
    k, m, tokens = config.width, 4 * config.width, config.batch * config.length
    speed = report.layer_times(
        lambda density, rngs: (
            dense(config, rngs)(k, m)
            if density is None
            else block_sparse(dataclasses.replace(config, density=density), rngs)(k, m)
        ),
        jnp.ones((tokens, k)),
        config.rounds,
    )
    title = f"A layer {k} x {m} in blocks of {config.block}, {tokens:,} tokens, with gradients"
    report.save_json(config.out / "transformer.json", {"flags": flags(config), "models": rows})
    report.save_curves(config.out / "transformer-losses.png", losses, lines, y="bits per byte")
    report.save_patterns(config.out / "transformer-patterns.png", kept, columns=4)
    report.save_speed(config.out / "transformer-speed.png", title, speed)


def main(argv: list[str] | None = None) -> int:
    """Trains, compares and reports; the exit code."""
    config = parse(Config, argv, command="python -m models.transformer", about=__doc__ or "")
    for name, unit in (("2 x --heads", 2 * config.heads), ("--block", config.block)):
        check_multiple("width", config.width, name, unit)
    output_folder(config.out)
    text = texts.load(config.data, config.length + 1)
    print(text.about)
    sparse = Size(config.width, 4 * config.width, block_sparse)
    sizes = {"block-sparse": sparse, "dense": narrower(config, sparse)}
    runs = {name: Run.start(config, size) for name, size in sizes.items()}
    saved = Checkpoints(
        config.out / "transformer-checkpoint", {**fixed(config), "data": text.digest}
    )
    losses = train(config, text, runs, saved)
    if losses is None:
        again = flags(dataclasses.replace(config, resume=True))
        print(f"Stopped. The checkpoint is in {saved.folder}; go on with")
        print(f"  python -m models.transformer {again}")
        return INTERRUPTED
    compare(config, text, sizes, runs, losses)
    print(f"Pictures, numbers and the last checkpoint are in {config.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
