"""Texts as states of a recurrent language model of bytes: what it knows after the last byte.

The features are tanh(c) of the cell, as in Radford, Jozefowicz and Sutskever (2017), *Learning to
Generate Reviews and Discovering Sentiment*: c is where an LSTM keeps what it has read, the tanh
bounds it, and h would hide what the output gate happens to close after this byte.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BEFORE, AFTER = b"\n", b" "  # a text begins as a line does, and its last word ends


class Recurrent(Protocol):
    """What is asked of a language model; carries are pytrees of arrays [n, ...]."""

    def initial_carry(self, n: int) -> Any:
        """The state before the first byte of n texts."""
        ...

    def states(self, data: jax.Array, carry: Any) -> tuple[Any, jax.Array]:
        """(the state after `data[n, l]`, c[n, l, features] after each byte)."""
        ...


def frame(text: str) -> bytes:
    """The bytes that stand for a text: one line in UTF-8, with a line break before it and a space
    after it."""
    return BEFORE + " ".join(text.split()).encode(errors="replace") + AFTER


def encode(
    model: Recurrent,
    texts: Sequence[bytes],
    *,
    batch: int = 64,
    chunk: int = 32,
    update: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """tanh(c), float32 [n, features], after the last byte of each text.

    Texts of similar length go side by side, `chunk` bytes at a time with the state carried on, so
    that one program of one shape reads texts of any length, and padding is less than a chunk of
    the shorter ones. After a text has ended its row reads zeros that nothing looks at. `update` is
    told how many bytes were read.
    """
    order = np.argsort([len(text) for text in texts], kind="stable")
    found: np.ndarray | None = None
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        data, lengths = _padded([texts[i] for i in rows], batch, chunk)
        carry = model.initial_carry(batch)
        kept: jax.Array | None = None
        for start in range(0, data.shape[1], chunk):
            part = jnp.asarray(data[:, start : start + chunk])
            carry, last = _read(model, part, carry, jnp.asarray(lengths - 1 - start), kept)
            kept = last
            update(int(np.clip(lengths - start, 0, chunk).sum()))
        if found is None:
            found = np.empty((len(texts), kept.shape[1]), np.float32)
        found[rows] = np.asarray(kept)[: len(rows)]
    if found is None:
        raise ValueError("encode: `texts` is empty: expected at least one text.")
    return found


def trace(model: Recurrent, text: bytes, unit: int, *, chunk: int = 32) -> np.ndarray:
    """tanh(c) of one unit after each byte of `text`, float32 [len(text)]."""
    data, _ = _padded([text], 1, chunk)
    carry, values = model.initial_carry(1), []
    for start in range(0, data.shape[1], chunk):
        carry, features = _features(model, jnp.asarray(data[:, start : start + chunk]), carry)
        values.append(np.asarray(features[0, :, unit]))
    return np.concatenate(values)[: len(text)]


def _padded(texts: Sequence[bytes], batch: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [batch, multiple of chunk] int32, lengths [batch]); rows and ends are zeros."""
    lengths = np.zeros(batch, np.int32)
    lengths[: len(texts)] = [len(text) for text in texts]
    data = np.zeros((batch, -(-lengths.max() // chunk) * chunk), np.int32)
    for row, text in zip(data, texts, strict=False):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return data, lengths


@nnx.jit
def _features(model: Any, data: jax.Array, carry: Any) -> tuple[Any, jax.Array]:
    carry, c = model.states(data, carry)
    return carry, jnp.tanh(c.astype(jnp.float32))


@nnx.jit
def _read(
    model: Any, data: jax.Array, carry: Any, last: jax.Array, kept: jax.Array
) -> tuple[Any, jax.Array]:
    """(the carry, `kept` with the features of the texts whose last byte is in this piece)."""
    carry, features = _features(model, data, carry)
    length = data.shape[1]
    here = (last >= 0) & (last < length)
    at = jnp.clip(last, 0, length - 1)[:, None, None]
    found = jnp.take_along_axis(features, at, axis=1)[:, 0]
    return carry, jnp.where(here[:, None], found, kept)
