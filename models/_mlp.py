"""An MLP trained by one of several methods: its products, what they cost, and compiled programs.

A program trains all seeds at once on data that stays on the device, and runs from one step to
another without Python in between. Only what decides its shapes is static: the method and the width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import bsjax
from models import baselines
from models._images import CLASSES

POLICIES = ("forward", "backward", "weight")
SAMPLERS = (
    "systematic",
    "uniform",
    "with_replacement",
    "bernoulli",
    "priority",
    "top_k",
    "wta",
)
MEPROP = ("meProp", "meProp by rows")
NOISES = ("gradient noise", "input noise", "weight noise")
type Parameters = Sequence[tuple[jax.Array, jax.Array]]  # w[k, m] and b[m] of each layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How the layers below the classifier are trained; the classifier is always exact.

    `fraction`, `sampler` and `block` belong to a policy of `bsjax.sampled_matmul`, a fraction also
    to meProp; `strength` is the eta of gradient noise, or a deviation.
    """

    kind: str = "dense"
    fraction: float = 1.0
    sampler: str = ""
    block: int = 1
    strength: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What all methods share."""

    layers: int  # hidden ones
    batch: int
    optimizer: str
    learning_rate: float
    weight_decay: float

    def sizes(self, inputs: int, width: int) -> list[tuple[int, int]]:
        """Features in and out of each layer."""
        features = [inputs, *[width] * self.layers, CLASSES]
        return list(itertools.pairwise(features))


# -------------------------------------------------------------------------------------- the costs


def taken(fraction: float, groups: int) -> int:
    """How many of some groups a fraction is."""
    return max(1, round(fraction * groups))


def flops(method: Method, sizes: Sequence[tuple[int, int]], batch: int) -> float:
    """Floating-point operations of one step: all products that are needed, and the norms that
    samples are drawn by.

    A layer has the product forward, dw and, but for the first layer, dx. Of a sampled one the terms
    that count are counted, also where an implementation multiplies the others by zero. Sorting,
    activations and the optimizer are left out: they are the same order for all methods, and small.
    """
    total, n = 0.0, batch
    for i, (k, m) in enumerate(sizes):
        product, first, last = 2.0 * n * k * m, i == 0, i == len(sizes) - 1
        y, dw, dx, scores = 1.0, 1.0, float(not first), 0.0
        if method.fraction < 1 and not last:
            unscored = method.sampler == "uniform"
            if method.kind == "forward":
                y = dw = _share(method, k)
                dx *= y
                scores = 2.0 * (n * k + k * m)
            elif method.kind == "backward":
                dw = _share(method, n)
                scores = 2.0 * (n * k + n * m) + dx * 2 * (n * m + k * m)
                dx *= _share(method, m)
            elif method.kind == "weight":
                dw, scores = _share(method, n), 2.0 * n * k
            else:
                dw = taken(method.fraction, m) / m
                dx, scores = dx * dw, 1.0 * n * m
            scores *= not unscored
        if method.kind == "direct feedback":
            # in the place of dx the error comes down through fixed weights
            dx, scores = 0.0, 0.0 if last else 2.0 * n * sizes[-1][1] * m
        total += product * (y + dw + dx) + scores
    return total


def _share(method: Method, length: int) -> float:
    groups = -(-length // method.block)
    return taken(method.fraction, groups) / groups


# ------------------------------------------------------------------------------------ the network


def initial(key: jax.Array, sizes: Sequence[tuple[int, int]]) -> Parameters:
    """Weights that keep the variance of what a ReLU lets through (He et al. 2015); no biases."""
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(one, (k, m)) * (2 / k) ** 0.5, jnp.zeros(m))
        for one, (k, m) in zip(keys, sizes, strict=True)
    ]


def logits(method: Method, parameters: Parameters, key: Any, x: jax.Array) -> jax.Array:
    """`[n, 10]` of `x[n, k]`; exact if the key is None."""
    for i, (w, b) in enumerate(parameters[:-1]):
        own = None if key is None else jax.random.fold_in(key, i)
        x = jax.nn.relu(product(method, x, w, own) + b[None])
    w, b = parameters[-1]
    return x @ w + b[None]


def product(method: Method, x: jax.Array, w: jax.Array, key: Any) -> jax.Array:
    """`x @ w` as the method trains it."""
    if method.kind in POLICIES:
        how: Any = {"fraction": method.fraction, "policy": method.kind, "block": method.block}
        return bsjax.sampled_matmul(x, w, key=key, sampler=method.sampler, **how)  # pyright: ignore
    if method.kind in MEPROP:
        keep = taken(method.fraction, w.shape[1])
        return baselines.meprop(x, w, keep=keep, unified=method.kind == MEPROP[0])
    return x @ w


def loss_and_gradient(
    method: Method,
    parameters: Parameters,
    feedback: Any,
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
) -> tuple[jax.Array, Any]:
    """The mean cross-entropy, and what the method takes for its gradient."""
    to_noise, to_layers = jax.random.split(key)
    if method.kind == "input noise":
        x = baselines.input_noise(to_noise, x, deviation=method.strength)
    if method.kind == "weight noise":
        parameters = baselines.weight_noise(to_noise, parameters, deviation=method.strength)

    def entropy(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    if method.kind == "direct feedback":
        hidden = [lambda p, h: jax.nn.relu(h @ p[0] + p[1][None])] * (len(parameters) - 1)
        layers = [*hidden, lambda p, h: h @ p[0] + p[1][None]]
        dfa = baselines.direct_feedback_alignment
        return dfa(layers, list(parameters), x, entropy, feedback)
    return jax.value_and_grad(lambda p: entropy(logits(method, p, to_layers, x)))(parameters)


def optimizer(method: Method, training: Training, key: Any) -> optax.GradientTransformation:
    """What the learning rate is multiplied with; the key is that of gradient noise."""
    parts = []
    if method.kind == "gradient noise":
        parts.append(baselines.gradient_noise(key, eta=method.strength))
    adam, momentum = optax.scale_by_adam(), optax.trace(0.9, nesterov=True)
    parts.append(adam if training.optimizer == "adam" else momentum)
    if training.weight_decay:
        parts.append(optax.add_decayed_weights(training.weight_decay))
    return optax.chain(*parts)


# ----------------------------------------------------------------------------------- the programs


def start(method: Method, training: Training, keys: jax.Array, sizes: Sequence[Any]) -> Any:
    """Parameters, moments and feedback matrices, for each of the keys."""
    parameters = _initial(tuple(sizes), keys)
    widths = [m for _, m in sizes[:-1]] if method.kind == "direct feedback" else []

    def rest(key: jax.Array, parameters: Parameters) -> Any:
        own = jax.random.fold_in(key, 3)
        feedback = baselines.feedback_matrices(own, CLASSES, widths)
        return optimizer(method, training, own).init(parameters), feedback

    return parameters, *jax.vmap(rest)(keys, parameters)


@functools.partial(jax.jit, static_argnums=0)  # once for a width, whatever the method
def _initial(sizes: Any, keys: jax.Array) -> Parameters:
    return jax.vmap(lambda key: initial(key, sizes))(keys)


class Programs(NamedTuple):
    """Compiled for all seeds at once.

    train: `(state, keys, x, y, first, last, of) -> state, mean loss[seed]` of the steps `first` to
      `last`, which lie within one epoch, `of` so many there will be. The old state is gone.
    left_on: `(parameters, keys, x, y) -> share[seed]` of right answers with sampling left on; None
      where the forward pass is exact.
    """

    train: Callable[..., Any]
    left_on: Callable[..., Any] | None


def compile_programs(
    method: Method,
    training: Training,
    width: int,
    keys: jax.Array,
    data: Sequence[jax.Array],
    held: Sequence[jax.Array],
) -> Programs:
    """What trains with a method, for images and labels of the shapes of `data` and `held`."""
    sizes = training.sizes(data[0].shape[1], width)
    state = jax.eval_shape(lambda keys: start(method, training, keys, sizes), keys)
    axes = (0, 0, None, None, None, None, None)
    run = jax.jit(jax.vmap(functools.partial(_train, method, training), axes), donate_argnums=0)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.default_matmul_precision("highest"):  # as sampled products are
        train = run.lower(state, keys, *data, step, step, step).compile()
        if method.kind != "forward":
            return Programs(train, None)
        left_on = share_right.lower(method, training.batch, state[0], keys, *held)
        return Programs(train, left_on.compile())


def _train(
    method: Method,
    training: Training,
    state: Any,
    key: jax.Array,
    x: jax.Array,
    y: jax.Array,
    first: jax.Array,
    last: jax.Array,
    of: jax.Array,
) -> tuple[Any, jax.Array]:
    """Steps `first` to `last`, within one epoch, `of` so many; the rate falls along a cosine."""
    tx, batch = optimizer(method, training, key), training.batch  # a state has its own key
    per_epoch = y.shape[0] // batch
    to_order, to_steps = jax.random.split(jax.random.fold_in(key, 1))
    order = jax.random.permutation(jax.random.fold_in(to_order, first // per_epoch), y.shape[0])

    def step(i: jax.Array, carry: Any) -> Any:
        parameters, moments, feedback, total = carry
        index = lax.dynamic_slice_in_dim(order, i % per_epoch * batch, batch)
        own = jax.random.fold_in(to_steps, i)
        loss, gradient = loss_and_gradient(method, parameters, feedback, own, x[index], y[index])
        updates, moments = tx.update(gradient, moments, parameters)
        done = i.astype(jnp.float32) / of.astype(jnp.float32)
        rate = training.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        parameters = jax.tree.map(lambda p, u: p - rate * u, parameters, updates)
        return parameters, moments, feedback, total + loss

    *state, total = lax.fori_loop(first, last, step, (*state, jnp.float32(0)))
    return tuple(state), total / (last - first).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def share_right(
    method: Method, batch: int, parameters: Parameters, keys: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
    """The share of right answers of each seed, with the samples of training in batches of at most
    that size, a new sample for each; a dense method is exact."""
    batch = _divisor(y.shape[0], batch)
    cut = x.reshape(-1, batch, x.shape[1]), y.reshape(-1, batch)

    def one(parameters: Parameters, key: jax.Array) -> jax.Array:
        def right(piece: Any) -> jax.Array:
            i, x, y = piece
            sample = jax.random.fold_in(jax.random.fold_in(key, 2), i)
            return (logits(method, parameters, sample, x).argmax(-1) == y).sum()

        return lax.map(right, (jnp.arange(cut[0].shape[0]), *cut)).sum()

    return jax.vmap(one)(parameters, keys).astype(jnp.float32) / y.shape[0]


def _divisor(n: int, most: int) -> int:
    """The largest size of equal batches, so that none is left over."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)
