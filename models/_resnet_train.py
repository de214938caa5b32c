"""How a residual network is trained, averaged and measured.

A state is a pytree of arrays, and a training step is one compiled program that takes the memory of
the state over. Networks of a size, whatever their seeds, patterns and images, share it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models._augment import Moments
from models._average import moved, share
from models._images import Split
from models._resnet import ResNet, fold
from models._resnet_plan import Size
from models._train import is_matrix

type Graph = nnx.GraphDef[ResNet]


class Training(NamedTuple):
    """How a network learns."""

    steps: int
    learning_rate: float  # its highest value
    schedule: str = "cosine"  # or "step"
    warmup: float = 0.0  # share of the steps in which it rises
    drops: tuple[float, ...] = (0.3, 0.6, 0.8)  # shares of the steps after which a "step" falls
    factor: float = 0.2  # to what share of its value
    momentum: float = 0.9
    weight_decay: float = 0.0  # of kernels, added to their gradient
    smoothing: float = 0.0
    average: float = 0.0  # decay of the averaged network


class State(NamedTuple):
    """All that changes in training. `average` holds parameters and statistics."""

    parameters: nnx.State
    statistics: nnx.State  # running means and variances
    rest: nnx.State  # patterns, and streams of random numbers
    optimizer: Any
    average: tuple[nnx.State, nnx.State]
    step: jax.Array


def learning_rate(training: Training, step: Any) -> jax.Array:
    """`peak * rise * fall` at a step, the first of which is 0.

    `rise` goes from zero in the first `warmup` of the steps; `fall` is half of a cosine from one to
    zero over the rest of them (Loshchilov and Hutter 2017), or `factor ** d` after d `drops`.
    """
    steps, step = training.steps, jnp.asarray(step, jnp.float32)
    warm = training.warmup * steps
    rise = jnp.minimum(1, (step + 1) / max(warm, 1))
    if training.schedule == "cosine":
        share = jnp.clip((step - warm) / max(steps - warm, 1), 0, 1)
        fall = (1 + jnp.cos(jnp.pi * share)) / 2
    else:
        fall = jnp.float32(1)
        for drop in training.drops:
            fall = jnp.where(step >= drop * steps, training.factor * fall, fall)
    return training.learning_rate * rise * fall


@functools.cache
def sgd(training: Training) -> optax.GradientTransformation:
    """Nesterov's momentum (as Sutskever et al. 2013 have it), weight decay as a part of the
    gradient, but of neither gains, nor offsets, nor biases."""
    kernels = functools.partial(jax.tree_util.tree_map_with_path, lambda at, _: is_matrix(at))
    return optax.chain(
        optax.add_decayed_weights(training.weight_decay, mask=kernels),
        optax.trace(training.momentum, nesterov=True),
        optax.scale_by_learning_rate(functools.partial(learning_rate, training)),
    )


def cross_entropy(logits: jax.Array, y: jax.Array, smoothing: float) -> jax.Array:
    """Of each row, with the targets `(1 - smoothing) onehot(y) + smoothing / classes`.

    Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision".
    """
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, y[:, None], 1)[:, 0]
    return -(1 - smoothing) * own - smoothing * logs.mean(1)


def start(size: Size, training: Training, channels: int, classes: int, seed: int) -> Any:
    """(graph, state) of a network before its first step."""
    model = ResNet(size, channels, classes, seed)
    model.train()
    graph, parameters, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    optimizer = sgd(training).init(parameters)
    average = jax.tree.map(jnp.copy, (parameters, statistics))  # what a step takes is gone
    return graph, State(parameters, statistics, rest, optimizer, average, jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("graph", "training"), donate_argnames="state")
def train_step(
    graph: Graph, training: Training, state: State, moments: Moments, x: jax.Array, y: jax.Array
) -> tuple[State, jax.Array]:
    """The state after a step on bytes `x[n, h, w, c]` with labels `y[n]`, and the loss before it.
    The averaged network has averaged statistics too."""

    def loss(parameters: nnx.State) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, parameters, state.statistics, state.rest, copy=True)
        logits = model(_normalised(moments, x))
        _, _, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        return cross_entropy(logits, y, training.smoothing).mean(), (statistics, rest)

    (value, (statistics, rest)), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    updates, optimizer = sgd(training).update(gradient, state.optimizer, state.parameters)
    parameters: Any = optax.apply_updates(state.parameters, updates)
    step = state.step + 1
    average = moved(state.average, (parameters, statistics), share(training.average, step))
    return State(parameters, statistics, rest, optimizer, average, step), value


# -------------------------------------------------------------------------------------- measuring


@functools.partial(jax.jit, static_argnames="graph")
def _count(
    graph: Graph, state: nnx.State, moments: Moments, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(right, sum of losses) of the images whose label is not negative."""
    logits = nnx.merge(graph, state, copy=True)(_normalised(moments, x))
    right = (logits.argmax(1) == y).sum()
    return right, jnp.where(y >= 0, cross_entropy(logits, jnp.maximum(y, 0), 0), 0).sum()


def measure(model: ResNet, moments: Moments, split: Split, batch: int) -> tuple[float, float]:
    """(share of the labels that are right, mean loss) of a network as `evaluated` makes it."""
    graph, state = nnx.split(model)
    right, loss, n = 0, 0.0, len(split.y)
    for first in range(0, n, batch):
        x, y = (a[first : first + batch] for a in split)
        missing = batch - len(y)
        x = np.pad(x, ((0, missing), (0, 0), (0, 0), (0, 0)))
        y = np.pad(y, (0, missing), constant_values=-1)
        found = _count(graph, state, moments, x, y)
        right, loss = right + int(found[0]), loss + float(found[1])
    return right / n, loss / n


def evaluated(graph: Graph, state: State, *, averaged: bool, folded: bool = False) -> ResNet:
    """The network, or the averaged one, for inference. It lives until the next training step."""
    now = state.average if averaged else (state.parameters, state.statistics)
    model = nnx.merge(graph, *now, state.rest, copy=True)
    model.eval()
    return fold(model)[0] if folded else model


@functools.partial(jax.jit, static_argnames="graph")
def _batch_moments(graph: Graph, state: nnx.State, moments: Moments, x: jax.Array) -> nnx.State:
    model = nnx.merge(graph, state, copy=True)
    model(_normalised(moments, x))
    return nnx.state(model, nnx.BatchStat)


def reestimated(
    graph: Graph, state: State, moments: Moments, batches: Any, count: int, *, averaged: bool
) -> State:
    """With the statistics that these parameters have on the first `count` of some batches.

    Those of all the batches together, `mean(var) + mean(mean^2) - mean(mean)^2`, instead of a
    moving average over earlier parameters: what Izmailov et al. 2018 do for averaged weights.
    """
    parameters = state.average[0] if averaged else state.parameters
    model = nnx.merge(graph, parameters, state.statistics, state.rest, copy=True)
    model.eval()  # nothing is sampled, as when it is measured
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, nnx.BatchNorm):
            norm.use_running_average, norm.momentum = False, 0.0  # it keeps the last batch
    recent, everything = nnx.split(model)
    total = None
    for i in range(count):
        found = _batch_moments(recent, everything, moments, batches[i][0])
        found = _of_norms(lambda mean, var: (mean, var + mean**2), found)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    total = jax.tree.map(lambda a: a / count, total)
    statistics = _of_norms(lambda mean, square: (mean, square - mean**2), total)
    if averaged:
        return state._replace(average=(parameters, statistics))
    return state._replace(statistics=statistics)


def _of_norms(change: Any, statistics: Any) -> nnx.State:
    """New (mean, var) of each normalisation."""
    flat = dict(nnx.to_flat_state(statistics))
    for path in [path for path in flat if path[-1] == "mean"]:
        other = (*path[:-1], "var")
        mean, var = change(flat[path][...], flat[other][...])
        flat[path], flat[other] = flat[path].replace(mean), flat[other].replace(var)
    return nnx.from_flat_state(flat)


def _normalised(moments: Moments, x: jax.Array) -> jax.Array:
    mean, deviation = (jnp.reshape(a, (1, 1, 1, -1)) for a in moments)
    return (x.astype(jnp.float32) - mean) / deviation
