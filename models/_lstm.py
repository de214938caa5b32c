"""How a recurrent language model is trained and measured, its state carried over."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models._average import evaluated, moved, share
from models._recurrent import Carry, LanguageModel, Size, make
from models._report import interleaved
from models._streams import Splits, Streams


class Parts:
    """The text of a recipe, as streams."""

    def __init__(self, config: Any, text: Splits) -> None:
        shape, most = (config.batch, config.length), config.heldout_bytes + 1
        self.train = Streams(text.train, *shape).check("training")
        self.valid = Streams(text.valid[:most], *shape).check("validation")
        self.test = Streams(text.test[:most], *shape).check("held-out")


class Training(NamedTuple):
    """How a model learns, but for the text."""

    steps: int
    batch: int
    learning_rate: float  # its highest value
    warmup: float  # share of the steps in which it rises
    clip: float  # the largest norm of a gradient
    average: float  # decay of the averaged parameters


@functools.cache  # two runs of a kind must be made of the same functions, or both compile
def adam(warmup: float, steps: int, clip: float) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015), whose `update` takes its highest rate, `rate=`: one program serves
    all of them. The rate rises, then falls along a cosine to a fiftieth."""

    def init(params: Any) -> Any:
        del params
        return optax.EmptyState()

    def scale(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        del params
        return jax.tree.map(lambda u: -given["rate"] * u, updates), state

    shape = optax.warmup_cosine_decay_schedule(0, 1, round(warmup * steps), steps, 1 / 50)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b2=0.999),
        optax.scale_by_schedule(shape),
        optax.GradientTransformationExtraArgs(init, scale),
    )


@dataclasses.dataclass
class Run:
    """A model in training: its optimizer, its averaged parameters, and the state of its streams."""

    model: LanguageModel
    optimizer: nnx.Optimizer
    average: dict[str, Any]
    carry: Carry
    training: Training

    def __post_init__(self) -> None:
        # the structure of both is looked at once, which saves half of what Python does in a step
        self._step = nnx.cached_partial(train_step, self.model, self.optimizer)

    @classmethod
    def start(cls, size: Size, training: Training, seed: int) -> Self:
        model = make(size, seed)
        model.train()
        tx = adam(training.warmup, training.steps, training.clip)
        average = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        average = jax.tree.map(jnp.copy, average)  # the parameters are donated
        carry = model.initial_carry(training.batch)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        return cls(model, optimizer, average, carry, training)

    def step(self, window: np.ndarray, count: int) -> jax.Array:
        """One step down the gradient; returns the mean loss before it, in bits per byte."""
        data = jnp.asarray(window), jnp.int32(count)
        how = jnp.float32(self.training.learning_rate), jnp.float32(self.training.average)
        loss, self.average, self.carry = self._step(self.average, self.carry, *data, *how)
        return loss

    def rewind(self) -> None:
        """The streams begin anew."""
        self.carry = jax.tree.map(jnp.zeros_like, self.carry)

    def averaged(self) -> LanguageModel:
        """A model to evaluate, with the averaged parameters."""
        return evaluated(self.model, self.average)

    def tree(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        of = {"model": nnx.state(self.model), "optimizer": nnx.state(self.optimizer)}
        return of | {"average": self.average, "carry": self.carry}

    def update(self, tree: dict[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        nnx.update(self.model, tree["model"])
        nnx.update(self.optimizer, tree["optimizer"])
        self.average, self.carry = tree["average"], tree["carry"]


def costs(model: LanguageModel, carry: Carry, window: jax.Array) -> tuple[jax.Array, Carry]:
    """(bits [n, l] that each byte of `window[n, 1 + l]` but the first costs, carry)."""
    logits, carry = model(window[:, :-1], carry)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
    return losses / math.log(2), carry


@nnx.jit(donate_argnames=("model", "optimizer", "average", "carry"))
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    average: dict[str, Any],
    carry: Carry,
    window: jax.Array,
    count: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
) -> tuple[jax.Array, dict[str, Any], Carry]:
    """(loss, average, carry) after a step on the first `count` bytes of each row of the window.

    The gradient ends where the window begins: truncated backpropagation through time.
    """

    def loss(model: LanguageModel) -> tuple[jax.Array, Carry]:
        bits, after = costs(model, carry, window)
        bits = jnp.where(jnp.arange(bits.shape[1])[None] < count, bits, 0)
        return bits.sum() / (bits.shape[0] * count).astype(jnp.float32), after

    (value, carry), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradient, rate=rate)
    now = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return value, moved(average, now, share(decay, optimizer.step[...])), carry


def step_seconds(
    sizes: Mapping[str, Size], training: Training, data: tuple[np.ndarray, int], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of training steps of fresh models, in turn, round by round."""
    runs = {name: Run.start(size, training, 0) for name, size in sizes.items()}
    steps = {name: functools.partial(run.step, *data) for name, run in runs.items()}
    return interleaved(steps, rounds)


_costs = nnx.jit(costs)


def heldout_bits(model: LanguageModel, streams: Streams) -> float:
    """Bits per byte of all streams, the state carried over from window to window.

    Each stream but the first begins with a state that the window before it left, which is the end
    of another stream: every byte is predicted from all that is before it, or from much.
    """
    carry, total = model.initial_carry(streams.batch), 0.0
    for step in range(-1, streams.windows):
        window, count = streams.window(step)
        bits, carry = _costs(model, carry, jnp.asarray(window))
        if step < 0:  # nothing is before the first stream
            carry = jax.tree.map(lambda leaf: leaf.at[0].set(0), carry)
        else:
            total += float(np.asarray(bits)[:, :count].sum(dtype=np.float64))
    return total / (streams.batch * streams.span)
