"""Text from a recurrent model, byte by byte, in a state that can be saved and gone on with."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models._average import evaluated
from models._cli import Mistake
from models._recurrent import Carry, LanguageModel

DRAWN = -1  # no byte is forced


class State(NamedTuple):
    """Where a text stands: all that its continuation depends on."""

    carry: Carry  # of one stream, after all bytes but the last
    last: jax.Array  # int32, the last byte
    key: jax.Array


def begin(model: LanguageModel, key: jax.Array) -> State:
    """Before any text: as after the end of a line."""
    return State(model.initial_carry(1), jnp.int32(ord("\n")), key)


def generate(
    model: LanguageModel,
    state: State | None,
    prompt: bytes,
    count: int,
    temperature: float = 1.0,
    key: jax.Array | None = None,
) -> tuple[bytes, State]:
    """`count` bytes after `prompt`, and the state to go on from (with an empty prompt).

    `state` is None at the beginning of a text. Temperature 0 takes the likeliest byte, 1 draws from
    the model's probabilities. `key` takes the place of that in the state; without either it is
    `jax.random.key(0)`. One program of one step does everything, whatever the lengths and the
    temperature; text in two pieces is the text in one.
    """
    if state is None:
        state = begin(model, jax.random.key(0) if key is None else key)
    elif key is not None:
        state = state._replace(key=key)
    graph, variables = nnx.split(evaluated(model))
    written = []
    for byte in (*prompt, *[DRAWN] * count):
        state = _step(graph, variables, state, byte, temperature)
        if byte == DRAWN:
            written.append(state.last)
    return bytes(map(int, written)), state


def _step(graph: Any, variables: Any, state: State, byte: int, temperature: float) -> State:
    """Reads the last byte; the next one is `byte`, or drawn."""
    return _compiled(graph, variables, state, jnp.int32(byte), jnp.float32(temperature))


@functools.partial(jax.jit, static_argnums=0)
def _compiled(graph: Any, variables: Any, state: State, byte: jax.Array, temperature: Any) -> Any:
    logits, carry = nnx.merge(graph, variables)(state.last[None, None], state.carry)
    logits, (key, own) = logits[0, 0], jax.random.split(state.key)
    drawn = jax.random.categorical(own, logits / jnp.maximum(temperature, 1e-6))
    drawn = jnp.where(temperature > 0, drawn, logits.argmax()).astype(jnp.int32)
    return State(carry, jnp.where(byte == DRAWN, drawn, byte), key)


def save_state(path: Path, state: State) -> None:
    """Writes a state to a file (`.npz`)."""
    # numbers of 16 bits are exact in float32; NumPy's files do not know bfloat16
    carry = [np.asarray(leaf, np.float32) for leaf in state.carry]
    key = np.asarray(jax.random.key_data(state.key))
    with path.open("wb") as file:
        np.savez(file, c=carry[0], h=carry[1], last=np.asarray(state.last), key=key)


def load_state(path: Path, model: LanguageModel) -> State:
    """The state in a file. Raises `Mistake` if it is none of this model."""
    try:
        with np.load(path) as found:
            arrays = dict(found)
        last, key = jnp.int32(arrays["last"]), jax.random.wrap_key_data(jnp.asarray(arrays["key"]))
        carry = (arrays["c"], arrays["h"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise Mistake(
            f"{path} holds no state of a text ({type(error).__name__}): name another --state, or "
            "remove it to begin anew"
        ) from error
    like = model.initial_carry(1)
    if [a.shape for a in carry] != [a.shape for a in like]:
        raise Mistake(
            f"{path} holds a state of {carry[0].shape[-1]} features, the model has "
            f"{like[0].shape[-1]}: name the --state that this model wrote"
        )
    c, h = (jnp.asarray(a).astype(b.dtype) for a, b in zip(carry, like, strict=True))
    return State((c, h), last, key)
