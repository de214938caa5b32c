"""An MLP trained by one of several methods: its products and compiled programs.

A program trains all seeds at once on data that stays on the device, and runs from one step to
another without Python in between. Only what decides its shapes is static: the method and the width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import bsjax
from models import baselines
from models._images import CLASSES
from models._mlp_methods import MEPROP, POLICIES, Method, Training, taken

type Parameters = Sequence[tuple[jax.Array, jax.Array]]  # w[k, m] and b[m] of each layer


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


def start(
    method: Method, training: Training, keys: jax.Array, sizes: Sequence[tuple[int, int]]
) -> Any:
    """Parameters, their average, moments and feedback matrices, for each of the keys."""
    parameters = _initial(tuple(sizes), keys)
    averaged = _initial(tuple(sizes), keys) if training.average else ()  # buffers of its own
    return parameters, averaged, *_moments(method, training, tuple(sizes), keys, parameters)


@functools.partial(jax.jit, static_argnums=0)  # once for a width, whatever the method
def _initial(sizes: Any, keys: jax.Array) -> Parameters:
    return jax.vmap(lambda key: initial(key, sizes))(keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _moments(
    method: Method, training: Training, sizes: Any, keys: jax.Array, parameters: Parameters
) -> Any:
    """And the feedback matrices."""
    widths = [m for _, m in sizes[:-1]] if method.kind == "direct feedback" else []

    def one(key: jax.Array, parameters: Parameters) -> Any:
        own = jax.random.fold_in(key, 3)
        feedback = baselines.feedback_matrices(own, CLASSES, widths)
        return optimizer(method, training, own).init(parameters), feedback

    return jax.vmap(one)(keys, parameters)


class Programs(NamedTuple):
    """Compiled for all seeds at once.

    train: `(state, keys, x, y, first, last, of) -> state, mean loss[seed]` of the steps `first` to
      `last`, which lie within one epoch, `of` so many there will be. The old state is gone.
    left_on: `(parameters, keys, x, y) -> share[seed]` of right answers with sampling left on; None
      where the forward pass is exact.
    """

    train: Callable[..., Any]
    left_on: Callable[..., Any] | None


def _each_seed(train: Callable[..., Any]) -> Callable[..., Any]:
    """Side by side, or one after the other on a CPU, which multiplies stacks of matrices slowly."""

    def run(state: Any, keys: jax.Array, *data: jax.Array) -> Any:
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda one: train(*one, *data), (state, keys))
        return jax.vmap(lambda *one: train(*one, *data))(state, keys)

    return run


def compile_programs(
    method: Method,
    training: Training,
    width: int,
    keys: jax.Array,
    data: Sequence[jax.Array],
    held: Sequence[jax.Array],
) -> Programs:
    """What trains with a method, for images and labels of the shapes of `data` and `held`.

    `start` and `share_right` are compiled as well, so that nobody waits for them.
    """
    sizes = tuple(training.sizes(data[0].shape[1], width))
    state = jax.eval_shape(lambda keys: start(method, training, keys, sizes), keys)
    _initial.lower(sizes, keys).compile()
    _moments.lower(method, training, sizes, keys, state[0]).compile()
    run = jax.jit(_each_seed(functools.partial(_train, method, training)), donate_argnums=0)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.default_matmul_precision("highest"):  # as sampled products are
        train = run.lower(state, keys, *data, step, step, step).compile()
        share_right.lower(Method(), training.batch, state[0], keys, *held).compile()
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
        parameters, averaged, moments, feedback, total = carry
        index = lax.dynamic_slice_in_dim(order, i % per_epoch * batch, batch)
        own = jax.random.fold_in(to_steps, i)
        loss, gradient = loss_and_gradient(method, parameters, feedback, own, x[index], y[index])
        updates, moments = tx.update(gradient, moments, parameters)
        done = i.astype(jnp.float32) / of.astype(jnp.float32)
        rate = training.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        parameters = jax.tree.map(lambda p, u: p - rate * u, parameters, updates)
        if training.average:
            # the plain mean of the first steps: their initial value has no share in it
            share = jnp.maximum(1 - training.average, 1 / (i.astype(jnp.float32) + 1))
            averaged = optax.incremental_update(parameters, averaged, share)
        return parameters, averaged, moments, feedback, total + loss

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
