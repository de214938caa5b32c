"""A training step: the loss, its gradient, at once or in parts, and AdamW."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models._language import bits
from models._train import is_matrix

type Loss = Callable[[Any, jax.Array], jax.Array]  # (model, data[n, 1 + l]) -> bits per byte


@functools.cache
def adam(peak: float, warmup: float, steps: int, decay: float) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019); its rate rises, then falls along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0, peak, round(warmup * steps), steps, peak / 50)
    matrices = functools.partial(jax.tree_util.tree_map_with_path, lambda at, _: is_matrix(at))
    adamw = optax.adamw(rate, b2=0.99, weight_decay=decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def mean_bits(model: Any, data: jax.Array) -> jax.Array:
    """The mean loss, in bits per byte."""
    return bits(model, data).mean()


@functools.partial(
    nnx.jit, donate_argnames=("model", "optimizer"), static_argnames=("loss", "accumulate")
)
def train_step(
    model: Any,
    optimizer: nnx.Optimizer,
    data: jax.Array,
    *,
    loss: Loss = mean_bits,
    accumulate: int = 1,
) -> jax.Array:
    """One step down the gradient; returns the mean loss before it, in bits per byte.

    The gradient is the mean over `accumulate` parts of the batch, one after the other: that of the
    whole batch, in the memory of a part.
    """
    if accumulate == 1:
        value, gradient = nnx.value_and_grad(loss)(model, data)
    else:
        value, gradient = accumulated(loss, model, data, accumulate)
    optimizer.update(model, gradient)
    return value


def accumulated(loss: Loss, model: Any, data: jax.Array, parts: int) -> tuple[jax.Array, Any]:
    """The loss and its gradient, as the means over equal parts of `data[n, ...]`."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of(params: Any, rest: Any, some: jax.Array) -> Any:
        # a copy: counters of samples change at a trace level other than that they came from
        model = nnx.merge(graph, params, rest, copy=True)
        return loss(model, some), nnx.split(model, nnx.Param, ...)[2]

    def one(carry: Any, some: jax.Array) -> Any:
        total, gradient, rest = carry
        (value, rest), more = jax.value_and_grad(of, has_aux=True)(params, rest, some)
        gradient = jax.tree.map(lambda a, b: a + b / parts, gradient, more)
        return (total + value / parts, gradient, rest), None

    # every `parts`-th example: of those on one device of a mesh, each part has as many
    some = data.reshape(-1, parts, *data.shape[1:]).swapaxes(0, 1)
    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, params), rest
    (value, gradient, rest), _ = jax.lax.scan(one, start, some)
    nnx.update(model, rest)
    return value, gradient
