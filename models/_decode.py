"""Bytes from a decoder with a cache of keys and values: each costs one position, of which attention
reads the blocks that it sees. For models whose layers have a `BlockAttention`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models._decoder import Transformer


class Reader:
    """Reads up to `length` bytes of `rows` sequences, some at a time, and draws what follows."""

    def __init__(self, model: Transformer, rows: int, length: int, temperature: float, seed: int):
        self.model, self.rows, self.length = nnx.clone(model), rows, length
        self.temperature, self.key = jnp.float32(temperature), jax.random.key(seed)
        self.drawn = 0
        self.forget()

    def forget(self) -> None:
        """Begins a new sequence."""
        self.model.init_cache(self.rows, self.length)
        self.read = 0

    def __call__(self, data: np.ndarray) -> np.ndarray:
        """The byte after `data[rows, t]`, which follows what was read before."""
        key = jax.random.fold_in(self.key, self.drawn)
        self.read, self.drawn = self.read + data.shape[1], self.drawn + 1
        return np.asarray(_next(self.model, jnp.asarray(data, jnp.int32), key, self.temperature))


@nnx.jit
def _next(model: Transformer, data: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    return _drawn(model(data, decode=True)[:, -1], key, temperature)


def generate(
    model: Any, prompt: str, *, count: int, length: int, temperature: float, seed: int
) -> str:
    """The prompt and `count` bytes that the model writes after it.

    As `models._language.generate`, but a full cache, of `length` bytes, is begun anew with the last
    half of them: a byte is drawn given half a window of others or more.
    """
    written = list(prompt.encode(errors="surrogateescape")) or [ord("\n")]
    reader, half = Reader(model, 1, length, temperature, seed), max(1, length // 2)
    unread = written if len(written) <= length else written[-half:]
    for _ in range(count):
        if reader.read + len(unread) > length:
            reader.forget()
            unread = written[-half:]
        unread = [int(reader(np.array([unread]))[0])]
        written += unread
    return bytes(written).decode(errors="replace")


def images(model: Any, count: int, size: int, temperature: float, seed: int) -> np.ndarray:
    """`count` images of `size` bytes each, uint8 `[count, size]`, from nothing but the model."""
    made = np.zeros((count, 1 + size), np.int32)  # what stands before an image is a zero
    cached = model.blocks[0].attention is not None
    reader = Reader(model, count, size, temperature, seed) if cached else None
    for i in range(size):
        if reader is not None:
            made[:, i + 1] = reader(made[:, i : i + 1])
        else:  # a causal model ignores what follows
            key = jax.random.fold_in(jax.random.key(seed), i)
            data, heat = jnp.asarray(made[:, :-1]), jnp.float32(temperature)
            made[:, i + 1] = _at(model, data, jnp.int32(i), key, heat)
    return made[:, 1:].astype(np.uint8)


@nnx.jit
def _at(model: Transformer, data: jax.Array, i: Any, key: Any, temperature: Any) -> jax.Array:
    return _drawn(model(data)[:, i], key, temperature)


def _drawn(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, logits.argmax(-1))
