"""Texts as states: side by side and in pieces as alone and whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from models import _encode as states
from models import _recurrent as recurrent
from tests.helpers import tolerance

TEXTS = [
    states.frame(text) for text in ("a", "", "of seven", "caf\u00e9 " * 4, "to the end of it " * 3)
]
SIZES = {"batch": 3, "chunk": 8}


@pytest.fixture(scope="module")
def model():
    made = recurrent.make(recurrent.Size(hidden=24, embedding=6, block=8, depth=2, links=1), 0)
    made.eval()
    return made


@pytest.fixture(scope="module")
def alone(model):
    """tanh(c) after each byte of each text, one by one, through the step of the cell."""
    found = []
    for text in TEXTS:
        carry, rows = model.initial_carry(1), []
        for byte in text:
            carry, _ = model.rnn.cell(carry, model.embed(jnp.full((1,), byte)))
            rows.append(np.tanh(np.asarray(carry[0][0])))
        found.append(np.array(rows))
    return found


def close(found, expected):
    """Sums of at most 30 terms for each of 60 bytes, forgotten at a constant rate."""
    np.testing.assert_allclose(found, expected, **tolerance(jnp.float32, 30))


def test_a_text_is_framed():
    assert states.frame(" two\n  words\t") == b"\ntwo words "
    assert (
        states.frame("\u00e9\ud800") == b"\n\xc3\xa9? "
    )  # half a character, as from "surrogateescape"
    assert TEXTS[1] == b"\n "


def test_side_by_side_is_one_by_one(model, alone):
    """Lengths 2 to 53, unordered, over several pieces, and a batch that is not full."""
    told = []
    found = states.encode(model, TEXTS, **SIZES, update=told.append)
    assert {kind: x.dtype for kind, x in found.items()} == {"last": "float32", "mean": "float32"}
    close(found["last"], np.stack([rows[-1] for rows in alone]))
    close(found["mean"], np.stack([rows.mean(axis=0) for rows in alone]))
    assert sum(told) == sum(map(len, TEXTS))
    backwards = states.encode(model, TEXTS[::-1], ["last"], **SIZES)
    assert list(backwards) == ["last"]
    close(backwards["last"][::-1], found["last"])


def test_a_text_of_whole_pieces(model):
    """Its last byte is the last of a piece, and nothing follows."""
    text = states.frame("x" * 14)
    assert len(text) == 16
    found = states.encode(model, [text, TEXTS[4]], **SIZES)
    every = np.tanh(np.asarray(model.states(jnp.asarray([list(text)]), None)[0]))
    close(found["last"][0], every[0, -1])
    close(found["mean"][0], every[0].mean(axis=0))


def test_any_length_is_one_program(model, monkeypatch):
    states_of, traced = recurrent.LanguageModel.states, []

    def counting(self, *arguments, **options):
        traced.append(arguments[0].shape)
        return states_of(self, *arguments, **options)

    monkeypatch.setattr(recurrent.LanguageModel, "states", counting)
    for texts in (TEXTS, [*TEXTS, b"1234567" * 9], TEXTS[:1]):
        states.encode(model, texts, batch=2, chunk=6)
        states.trace(model, texts[-1], 5, chunk=6)
    assert traced == [(2, 6), (1, 6)]


@pytest.mark.parametrize("i", [0, 4])
def test_the_trace_of_a_unit(model, alone, i):
    found = states.trace(model, TEXTS[i], 5, chunk=8)
    assert found.shape == (len(TEXTS[i]),)
    close(found, alone[i][:, 5])


def test_no_texts(model):
    with pytest.raises(ValueError, match="`texts` is empty: expected at least one"):
        states.encode(model, [])
