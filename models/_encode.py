"""Texts as states of a recurrent language model of bytes: that after the last byte, or their mean.

The features are tanh(c) of the cell. After the last byte they are those of Radford, Jozefowicz and
Sutskever (2017), *Learning to Generate Reviews and Discovering Sentiment*: c is where an LSTM keeps
what it has read, the tanh bounds it, and h would hide what the output gate happens to close after
this byte. Their mean over all bytes is what a model knows that forgets within a sentence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models._recurrent import LanguageModel

KINDS = ("last", "mean")
BEFORE, AFTER = b"\n", b" "  # a text begins as a line does, and its last word ends


def frame(text: str) -> bytes:
    """The bytes that stand for a text: one line in UTF-8, with a line break before it and a space
    after it."""
    return BEFORE + " ".join(text.split()).encode(errors="replace") + AFTER


def encode(
    model: LanguageModel,
    texts: Sequence[bytes],
    kinds: Sequence[str] = KINDS,
    *,
    batch: int = 64,
    chunk: int = 32,
    update: Callable[[int], None] = lambda count: None,
) -> dict[str, np.ndarray]:
    """tanh(c), float32 [n, features], of each kind: after the "last" byte of each text, and its
    "mean" over all bytes.

    Texts of similar length go side by side, `chunk` bytes at a time with the state carried on, so
    that one program of one shape reads texts of any length. A text that has ended keeps its state;
    what is read for nothing is less than a chunk and the difference to the longest neighbour.
    `update` is told how many bytes were read.
    """
    if not texts:
        raise ValueError("encode: `texts` is empty: expected at least one text.")
    order = np.argsort([len(text) for text in texts], kind="stable")
    found: dict[str, np.ndarray] = {}
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        data, lengths = _padded([texts[i] for i in rows], batch, chunk)
        carry = model.initial_carry(batch)
        total = jnp.zeros(carry[0].shape, jnp.float32)
        for start in range(0, data.shape[1], chunk):
            part, left = data[:, start : start + chunk], np.clip(lengths - start, 0, chunk)
            carry, total = _read(model, jnp.asarray(part), carry, total, jnp.asarray(left))
            jax.block_until_ready(total)  # or progress would run ahead
            update(int(left.sum()))
        known = {
            "last": _features(carry),
            "mean": np.asarray(total) / np.maximum(lengths, 1)[:, None],
        }
        for kind in kinds:
            now = known[kind][: len(rows)]
            found.setdefault(kind, np.empty((len(texts), now.shape[1]), np.float32))[rows] = now
    return found


def trace(model: LanguageModel, text: bytes, unit: int, *, chunk: int = 32) -> np.ndarray:
    """tanh(c) of one unit after each byte of `text`, float32 [len(text)]."""
    data, _ = _padded([text], 1, chunk)
    carry, values = model.initial_carry(1), []
    for start in range(0, data.shape[1], chunk):
        every = _follow(model, jnp.asarray(data[:, start : start + chunk]), carry)
        carry = _end(every)
        values.append(_features(every)[0, :, unit])
    return np.concatenate(values)[: len(text)]


def _padded(texts: Sequence[bytes], batch: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [batch, multiple of chunk] int32, lengths [batch] int32), filled up with zeros."""
    lengths = np.zeros(batch, np.int32)
    lengths[: len(texts)] = [len(text) for text in texts]
    data = np.zeros((batch, -(-lengths.max() // chunk) * chunk), np.int32)
    for row, text in zip(data, texts, strict=False):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return data, lengths


def _features(carry: Any) -> np.ndarray:
    return np.tanh(np.asarray(carry[0], np.float32))


def _end(every: Any) -> Any:
    return jax.tree.map(lambda a: a[:, -1], every)


@nnx.jit
def _read(
    model: LanguageModel, data: jax.Array, carry: Any, total: jax.Array, lengths: jax.Array
) -> tuple[Any, jax.Array]:
    """(the state after the first `lengths[n]` bytes of `data[n, l]`, `total` with tanh(c) after
    each of them added)."""
    every = model.states(data, carry, lengths=lengths)
    read = (jnp.arange(data.shape[1])[None] < lengths[:, None])[..., None]
    seen = jnp.where(read, jnp.tanh(every[0].astype(jnp.float32)), 0)
    return _end(every), total + seen.sum(axis=1)


@nnx.jit
def _follow(model: LanguageModel, data: jax.Array, carry: Any) -> Any:
    return model.states(data, carry)
