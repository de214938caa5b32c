"""Activations by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

type Activation = str | Callable[[Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def named(op: str, wanted: Activation | None) -> Callable[[Array], Array] | None:
    """The function that `wanted` names, or is."""
    if wanted is None or callable(wanted):
        return wanted
    if not isinstance(wanted, str) or wanted not in ACTIVATIONS:
        names = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(
            f"{op}: `activation` must be a function or one of {names}, got {wanted!r}."
        )
    return ACTIVATIONS[wanted]
