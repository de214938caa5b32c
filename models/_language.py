"""What language models of bytes share: `model(data[n, l]) -> logits[n, l, 256]`, causal."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models import _text as texts


def bits(model: Any, data: jax.Array) -> jax.Array:
    """Bits, [n, l], that each byte of `data[n, 1 + l]` costs given the bytes before it."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(data[:, :-1]), data[:, 1:])
    return losses / math.log(2)


def late_bits(model: Any, data: jax.Array) -> jax.Array:
    """Mean bits of the second half of every window: each byte is predicted from half a window of
    others or more."""
    return bits(model, data)[:, data.shape[1] // 2 :].mean()


_late_bits = nnx.jit(late_bits)


def heldout_bits(model: Any, heldout: np.ndarray, *, count: int, length: int, size: int) -> float:
    """Bits per byte of about `count` bytes, from windows spread over all of the held-out text.

    Only the second half of a window counts, so that every byte is predicted from `length / 2`
    bytes or more; `size` windows are measured at a time.
    """
    windows = texts.spread(heldout, max(1, 2 * count // length), length)
    parts = [windows[i : i + size] for i in range(0, len(windows), size)]
    means = [float(_late_bits(model, jnp.asarray(part))) for part in parts]
    return float(np.average(means, weights=[len(part) for part in parts]))


@nnx.jit
def _next_byte(model: Any, window: jax.Array, last: Any, key: Any, temperature: Any) -> jax.Array:
    logits = model(window[None])[0, last]
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, logits.argmax())


def generate(
    model: Any, prompt: str, *, count: int, length: int, temperature: float, seed: int
) -> str:
    """The prompt and `count` bytes that the model writes after it, seeing `length` at most.

    Temperature 0 takes the likeliest byte, 1 draws from the model's probabilities.
    """
    written = list(prompt.encode(errors="surrogateescape")) or [ord("\n")]
    key = jax.random.key(seed)
    for i in range(count):
        seen = written[-length:]
        # filled up to one shape, so that this compiles once; a causal model ignores what follows
        window = jnp.asarray(seen + [0] * (length - len(seen)), jnp.int32)
        last, heat = jnp.int32(len(seen) - 1), jnp.float32(temperature)
        written.append(int(_next_byte(model, window, last, jax.random.fold_in(key, i), heat)))
    return bytes(written).decode(errors="replace")
