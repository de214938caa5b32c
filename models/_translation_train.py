"""How a translation model is trained, measured, and kept."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from models._average import evaluated, moved, share
from models._buckets import Batch, Batches
from models._parallel_text import PAD
from models._translation import Translator
from models._translation_size import Size


class Training(NamedTuple):
    """How a model learns, but for the text."""

    steps: int
    learning_rate: float  # its highest value
    schedule: str  # how it falls: "cosine" or "inverse_sqrt"
    warmup: float  # share of the steps in which it rises
    smoothing: float  # of labels
    clip: float  # the largest norm of a gradient
    average: float  # decay of the averaged parameters
    accumulate: int  # parts of a batch whose gradients are added


def schedule(kind: str, warmup: float, steps: int) -> Callable[[Any], Any]:
    """Shares of the highest rate: a line up to 1 in `w` steps, then along a cosine to a fiftieth,
    or as `sqrt(w / t)` (Vaswani et al. 2017)."""
    rise = max(1, round(warmup * steps))
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(0, 1, rise, max(steps, rise + 1), 1 / 50)
    return lambda t: jnp.minimum(
        jnp.asarray(t, jnp.float32) / rise,
        jnp.sqrt(rise / jnp.maximum(jnp.asarray(t, jnp.float32), 1.0)),
    )


@functools.cache  # runs of a kind must be made of the same functions, or each compiles
def adam(training: Training) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with the b2 and epsilon of Vaswani et al. 2017."""
    rate = schedule(training.schedule, training.warmup, training.steps)
    return optax.chain(
        optax.clip_by_global_norm(training.clip),
        optax.scale_by_adam(b2=0.98, eps=1e-9),
        optax.scale_by_learning_rate(lambda t: training.learning_rate * rate(t)),
    )


def losses(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """`-(1 - smoothing) log p[label] - smoothing / v sum_i log p[i]` for `logits[..., v]`, and 0
    where the label is PAD. Szegedy et al. 2016, "Rethinking the Inception Architecture"."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing) * own
    if smoothing:
        loss = loss - smoothing * log_p.mean(axis=-1)
    return jnp.where(labels != PAD, loss, 0.0)


def total(model: Translator, batch: Batch, smoothing: float) -> jax.Array:
    """The sum of the losses of a batch."""
    source, lengths, target = map(jnp.asarray, batch)
    return losses(model(source, lengths, target[:, :-1]), target[:, 1:], smoothing).sum()


@nnx.jit(donate_argnames=("model", "optimizer", "average"), static_argnames=("training",))
def train_step(
    model: Translator, optimizer: nnx.Optimizer, average: Any, batch: Batch, *, training: Training
) -> tuple[jax.Array, Any]:
    """(loss, average) of a step down the gradient of the mean loss of all labels of the batch."""
    count = (batch.target[:, 1:] != PAD).sum().astype(jnp.float32)

    def loss(model: Translator, part: Batch) -> jax.Array:
        return total(model, part, training.smoothing) / count

    value, gradient = accumulated(loss, model, batch, training.accumulate)
    optimizer.update(model, gradient)
    now = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return value, moved(average, now, share(training.average, optimizer.step[...]))


def accumulated(
    loss: Callable[[Translator, Batch], jax.Array], model: Translator, batch: Batch, parts: int
) -> tuple[jax.Array, Any]:
    """The sums of the loss and of its gradient over parts of the rows, one after another."""
    if parts == 1:
        return nnx.value_and_grad(loss)(model, batch)
    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def one(carry: Any, part: Batch) -> tuple[Any, None]:
        value, gradient, rest = carry

        def of(params: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, params, rest, copy=True)  # variables of this trace
            return loss(model, part), nnx.state(model, nnx.Not(nnx.Param))

        (more, rest), other = jax.value_and_grad(of, has_aux=True)(params)
        return (value + more, jax.tree.map(jnp.add, gradient, other), rest), None

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, params), rest
    (value, gradient, rest), _ = lax.scan(one, start, split)
    nnx.update(model, rest)
    return value, gradient


@dataclasses.dataclass
class Run:
    """A model in training: its optimizer and its averaged parameters."""

    model: Translator
    optimizer: nnx.Optimizer
    average: dict[str, Any]
    training: Training

    @classmethod
    def start(cls, size: Size, training: Training, seed: int) -> Self:
        model = Translator(size, seed)
        model.train()
        average = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        optimizer = nnx.Optimizer(model, adam(training), wrt=nnx.Param)
        return cls(model, optimizer, average, training)

    def step(self, batch: Batch) -> jax.Array:
        """One step; returns the mean loss before it, with smoothed labels."""
        loss, self.average = train_step(
            self.model, self.optimizer, self.average, batch, training=self.training
        )
        return loss

    def averaged(self) -> Translator:
        """A model to translate with, of the averaged parameters."""
        return evaluated(self.model, self.average)

    def tree(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        of = {"model": nnx.state(self.model), "optimizer": nnx.state(self.optimizer)}
        return of | {"average": self.average}

    def update(self, tree: dict[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        nnx.update(self.model, tree["model"])
        nnx.update(self.optimizer, tree["optimizer"])
        self.average = tree["average"]


@nnx.jit
def _sums(model: Translator, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return total(model, batch, 0.0), (batch.target[:, 1:] != PAD).sum()


def heldout_loss(model: Translator, batches: Batches) -> float:
    """Nats per token of all targets, without smoothing."""
    sums = [list(map(float, _sums(model, batch))) for _, batch in batches.once()]
    loss, count = np.sum(sums, axis=0)
    return float(loss / count)


def translations(
    translate: Callable[[np.ndarray, np.ndarray], list[list[int]]], batches: Batches
) -> list[Sequence[int]]:
    """The translation of every source, in the order of the text."""
    found: dict[int, list[int]] = {}
    for chosen, batch in batches.once():
        rows = translate(batch.source, batch.lengths)[: len(chosen)]
        found |= dict(zip(chosen.tolist(), rows, strict=True))
    return [found[i] for i in range(len(found))]
