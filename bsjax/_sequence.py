"""The loop over time that `RNN` of both Flax dialects is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bsjax import ops


def run(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: tuple[Any, Any],
    inputs: Array,
    sliced: Any,
    *,
    project: Callable[[Array], Any] | None,
    time_axis: int,
    feature_axes: int,
    seq_lengths: Any,
    select: bool,
    reverse: bool,
    keep_order: bool,
    unroll: int,
    remat: bool,
) -> tuple[tuple[Any, Any], Any]:
    """`state, (ys, sliced)` after `state, (y, slice) = step(state, (x, slice))` for every step.

    A state is `(carry, rest)`. `project(inputs)` is computed before the loop, for all steps at
    once; `sliced` has time first. With `select` and lengths, the carry is that after the last step
    of each sequence (after none, the first one); `rest` is what all sequences share, and always
    that after the last step of all.
    """
    lengths = (
        None if seq_lengths is None else _checked(seq_lengths, inputs, time_axis, feature_axes)
    )
    if reverse:
        inputs = flip(inputs, lengths, time_axis)
    xs: Any = jnp.moveaxis(inputs, time_axis, 0)
    if project is not None:
        xs = project(xs)
    xs = (xs, sliced)
    if lengths is None or not select:
        state, (ys, sliced) = ops.scan(step, state, xs, unroll=unroll, remat=remat)
    else:

        def selecting(loop: Any, x: Any) -> Any:
            state, kept, time = loop
            state, y = step(state, x)
            kept = jax.tree.map(
                lambda new, old: jnp.where(_expand(lengths == time, new), new, old), state[0], kept
            )
            return (state, kept, time + 1), y

        loop = (state, state[0], jnp.ones((), lengths.dtype))
        loop, (ys, sliced) = ops.scan(selecting, loop, xs, unroll=unroll, remat=remat)
        state = (loop[1], loop[0][1])

    def ordered(y: Array) -> Array:
        y = jnp.moveaxis(y, 0, time_axis)
        return flip(y, lengths, time_axis) if reverse and keep_order else y

    return state, (jax.tree.map(ordered, ys), sliced)


def flip(x: Array, lengths: Array | None, time_axis: int) -> Array:
    """The first `lengths` steps in the opposite order, and so the padding behind them."""
    if lengths is None:
        return jnp.flip(x, time_axis)
    time = x.shape[time_axis]
    # the axes of the batch are those before time, or, if time comes first, those behind it
    steps = jnp.arange(time, dtype=lengths.dtype)
    steps = jnp.expand_dims(steps, [i for i in range(lengths.ndim + 1) if i != time_axis])
    source = (jnp.expand_dims(lengths, time_axis) - 1 - steps) % time
    return jnp.take_along_axis(x, _expand(source, x), time_axis)


def _expand(a: Array, like: Array) -> Array:
    """With axes of size one behind, as many as `like` has more."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))


def _checked(lengths: Any, inputs: Array, time_axis: int, feature_axes: int) -> Int[Array, "*n"]:
    lengths = jnp.asarray(lengths)
    lead = inputs.shape[: inputs.ndim - feature_axes]
    batch = (*lead[:time_axis], *lead[time_axis + 1 :])
    if lengths.shape != batch or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"RNN: `seq_lengths` must be whole numbers of shape {batch}, one for each sequence, "
            f"got {lengths.dtype} of shape {lengths.shape}."
        )
    return lengths
