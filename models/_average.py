"""A moving average of the parameters: what recipes measure beside the last ones."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

FIRST = 9


def share(decay: Any, step: jax.Array) -> jax.Array:
    """The share of the new parameters in their average after so many steps: `1 - decay`, or
    `9 / (9 + step)` as long as that is more, so that an average after few steps is one of the last
    tenth of them."""
    return jnp.maximum(1 - decay, FIRST / (FIRST + step.astype(jnp.float32)))


def moved[T](average: T, now: Any, share: jax.Array) -> T:
    """The average with that share of what is there now."""
    return jax.tree.map(lambda new, old: share * new + (1 - share) * old, now, average)


def evaluated[M: nnx.Module](model: M, parameters: dict[str, Any] | None = None) -> M:
    """A copy that does not train, with other parameters if given."""
    model = nnx.clone(model)
    if parameters is not None:
        state = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.copy, parameters))
        nnx.update(model, state)
    model.eval()
    return model
