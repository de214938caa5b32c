"""How a PixelCNN learns, is measured, and draws images."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from models._average import share
from models._logistic import bits_per_dimension, sample
from models._pixelcnn import PixelCNN, Size


class Training(NamedTuple):
    """How a model learns."""

    steps: int
    learning_rate: float  # its highest value
    warmup: float  # share of the steps in which it rises
    rate_left: float  # share of it in the end
    clip: float  # the largest norm of a gradient
    average: float  # decay of the averaged parameters
    seed: int  # of dropout


class State(NamedTuple):
    """What a step changes."""

    parameters: Any
    average: Any  # of the parameters
    moments: Any
    step: Array


@functools.cache
def adam(training: Training) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) with the decays of PixelCNN++; its rate rises, then falls by the same
    factor in every step."""
    rise = round(training.warmup * training.steps)
    rate = optax.warmup_exponential_decay_schedule(
        0.0 if rise else training.learning_rate,
        training.learning_rate,
        rise,
        max(1, training.steps - rise),
        training.rate_left,
    )
    return optax.chain(
        optax.clip_by_global_norm(training.clip), optax.adam(rate, b1=0.95, b2=0.9995)
    )


@functools.partial(jax.jit, static_argnames=("graph", "training"), donate_argnames=("state",))
def train_step(
    graph: Any, training: Training, state: State, rest: Any, x: Array
) -> tuple[State, Array]:
    """(state, mean loss before the step, in bits per dimension)."""
    key = jax.random.fold_in(jax.random.key(training.seed), state.step)

    def loss(parameters: Any) -> Array:
        model = nnx.merge(graph, parameters, rest)
        return bits_per_dimension(model(x, key), x, model.size.levels).mean()

    value, gradient = jax.value_and_grad(loss)(state.parameters)
    updates, moments = adam(training).update(gradient, state.moments, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    step = state.step + 1
    part = share(training.average, step)
    average = jax.tree.map(lambda new, old: old + part * (new - old), parameters, state.average)
    return State(parameters, average, moments, step), value


@dataclasses.dataclass
class Run:
    """A model in training."""

    graph: Any
    rest: Any  # patterns
    state: State
    training: Training

    @classmethod
    def start(cls, size: Size, training: Training) -> Self:
        model = PixelCNN(size, nnx.Rngs(training.seed), training.seed)
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)
        average = jax.tree.map(jnp.copy, parameters)  # both are donated
        moments = adam(training).init(parameters)
        return cls(graph, rest, State(parameters, average, moments, jnp.int32(0)), training)

    def step(self, x: np.ndarray) -> Array:
        """One step down the gradient; the mean loss before it, in bits per dimension."""
        self.state, loss = train_step(
            self.graph, self.training, self.state, self.rest, jnp.asarray(x, jnp.int32)
        )
        return loss

    def copy(self) -> Self:
        """Of its own memory."""
        return dataclasses.replace(self, state=jax.tree.map(jnp.copy, self.state))

    def model(self, *, averaged: bool) -> PixelCNN:
        """With the averaged parameters, or the last ones."""
        chosen = self.state.average if averaged else self.state.parameters
        return nnx.merge(self.graph, jax.tree.map(jnp.copy, chosen), self.rest)


@nnx.jit
def costs(model: PixelCNN, x: Array) -> Array:
    """Bits per dimension of each image, without dropout."""
    return bits_per_dimension(model(x), x, model.size.levels)


def held_out_bits(model: PixelCNN, images: np.ndarray, size: int) -> float:
    """Bits per dimension of all images, `size` at a time."""
    total = 0.0
    for first in range(0, len(images), size):
        x = images[first : first + size]
        padded = np.concatenate([x, x[:1].repeat(size - len(x), 0)])
        bits = np.asarray(costs(model, jnp.asarray(padded, jnp.int32)))[: len(x)]
        total += float(bits.sum(dtype=np.float64))
    return total / len(images)


def draw(model: PixelCNN, key: Array, count: int, sides: tuple[int, int]) -> np.ndarray:
    """`count` images of the model, pixel by pixel in raster order."""
    return np.asarray(_draw(model, key, count, sides)).astype(np.uint8)


@functools.partial(nnx.jit, static_argnums=(2, 3))
def _draw(model: PixelCNN, key: Array, count: int, sides: tuple[int, int]) -> Array:
    channels, (height, width) = model.size.channels, sides
    graph, state = nnx.split(model)

    def pixel(i: Array, x: Array) -> Array:
        row, column = i // width, i % width
        raw = nnx.merge(graph, state)(x)[:, row, column]
        own = sample(jax.random.fold_in(key, i), raw, channels, model.size.levels)
        return x.at[:, row, column].set(own)

    x = jnp.zeros((count, height, width, channels), jnp.int32)
    return jax.lax.fori_loop(0, math.prod(sides), pixel, x)
