"""Beam search against all sequences, against a search that sees whole prefixes, and greedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import _beam as beams
from models._parallel_text import BOS, EOS, PAD
from tests.models.translation_runs import beam_by_hand, every_sequence, lp, unpadded

V, LENGTH, N = 5, 4, 8
LIMITS = np.array([4, 3, 4, 4, 2, 4, 4, 4], np.int32)
EPS = float(np.finfo(np.float32).eps)
# A score is a sum of numbers of one sign: `x - max(x)` and `-log(sum(exp))` of each token. The last
# is some eps / 2 off where it is small; the others are rounded twice for each token, and once or
# twice by the penalty and the quotient.
CLOSE = {"rel": (LENGTH + 2) * EPS, "abs": LENGTH * EPS}


@functools.cache
def table():
    """Logits after every prefix of every source: the prefix is a number in base V."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, V**LENGTH, V), scale=1.5).astype(np.float32)


def step(cache, tokens):
    """The cache is the source and the number of the prefix, and the position."""
    source, prefix, at = cache
    prefix = prefix * V + jnp.where(at == 0, 0, tokens)
    return jnp.asarray(table())[source, prefix], (source, prefix, at + 1)


def log_p(source, prefix):
    """In float64; PAD and BOS are never next."""
    number = functools.reduce(lambda a, token: a * V + token, prefix[1:], 0)
    row = table()[source, number].astype(np.float64)
    row[[PAD, BOS]] = -np.inf
    return row - np.log(np.exp(row).sum())


def start(beam):
    return jnp.repeat(jnp.arange(N), beam), jnp.zeros(N * beam, jnp.int32), jnp.int32(0)


@functools.partial(jax.jit, static_argnums=0)
def searched(beam, alpha):
    return beams.search(
        step, start(beam), N, beam=beam, length=LENGTH, limits=jnp.asarray(LIMITS), alpha=alpha
    )


@jax.jit
def greedy():
    return beams.greedy(step, start(1), N, length=LENGTH, limits=jnp.asarray(LIMITS))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all_sequences(alpha):
    found = searched(32, alpha)  # 1 + 2 + 4 + 8 sequences end within 4 tokens
    for i in range(N):
        every = every_sequence(functools.partial(log_p, i), V, LIMITS[i], alpha)
        assert float(found.scores[i, 0]) == pytest.approx(every[0][0], **CLOSE)
        assert unpadded(found.tokens[i, 0]) == every[0][1]
        scores = {tokens: score for score, tokens in every}
        for row, score in zip(found.tokens[i], found.scores[i], strict=True):
            if np.isfinite(score):
                assert float(score) == pytest.approx(scores.pop(unpadded(row)), **CLOSE)


@pytest.mark.parametrize("alpha", [0.6, 3.0])  # long sequences win: a source that is done stays so
@pytest.mark.parametrize("beam", [1, 2, 3])
def test_it_is_the_search_that_sees_whole_prefixes(beam, alpha):
    found = searched(beam, alpha)
    for i in range(N):
        expected = beam_by_hand(functools.partial(log_p, i), beam, int(LIMITS[i]), alpha)
        count = len(expected)
        assert found.scores[i, :count] == pytest.approx([s for s, _ in expected], **CLOSE)
        assert np.isneginf(found.scores[i, count:]).all()
        assert [unpadded(row) for row in found.tokens[i, :count]] == [t for _, t in expected]


def test_a_beam_of_one_is_greedy_and_greedy_takes_the_likeliest():
    rows = np.asarray(greedy())
    np.testing.assert_array_equal(np.asarray(searched(1, 0.6).tokens)[:, 0], rows)
    for i, row in enumerate(rows):
        prefix = (BOS,)
        for length in range(1, LIMITS[i] + 1):
            p = log_p(i, prefix)
            token = EOS if length == LIMITS[i] else int(p.argmax())
            assert row[length - 1] == token
            prefix = (*prefix, token)
            if token == EOS:
                break
        assert (row[len(prefix) - 1 :] == PAD).all()


def test_the_penalty_is_that_of_the_paper():
    for length in (1, 7):
        assert float(beams.penalty(length, 0.6)) == pytest.approx(lp(length, 0.6), rel=EPS)
    assert float(beams.penalty(1, 0.6)) == 1
    assert float(beams.penalty(7, 0.0)) == 1


def test_what_is_no_token_has_no_probability():
    p = np.exp(beams.log_p(jnp.zeros((2, V))))
    assert (p[:, [PAD, BOS]] == 0).all()
    # the logarithm of three, about one, and its exponential are rounded
    np.testing.assert_allclose(p[:, EOS:], 1 / (V - 2), rtol=2 * EPS)
