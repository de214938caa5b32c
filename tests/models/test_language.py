"""Bits per byte and generated text, of models that are tables: the next byte given the last."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _text as texts
from models._language import bits, generate, heldout_bits


def bigrams(logits):
    model = nnx.Embed(256, 256, rngs=nnx.Rngs(0))
    model.embedding[...] = jnp.asarray(logits, jnp.float32)
    return model


@pytest.fixture(scope="module")
def alphabet():
    """After a comes b, after b comes c, ..."""
    return bigrams(40 * np.roll(np.eye(256), 1, axis=1))


@pytest.fixture(scope="module")
def uniform():
    return bigrams(np.zeros((256, 256)))


def test_bits_of_known_models(alphabet, uniform):
    data = jnp.asarray([[97, 98, 99, 101]])
    np.testing.assert_allclose(bits(uniform, data), [[8, 8, 8]], rtol=1e-6)
    np.testing.assert_allclose(bits(alphabet, data), [[0, 0, 40 / np.log(2)]], atol=1e-4)


@pytest.mark.parametrize("size", [3, 8])
def test_the_late_half_of_every_window_counts_once(size):
    """Also where the windows do not fill the last batch."""
    logits = np.random.default_rng(0).normal(size=(256, 256))
    heldout = np.random.default_rng(1).integers(0, 256, 900, np.uint8)
    costs = np.log2(np.exp(logits).sum(1, keepdims=True)) - logits / np.log(2)
    windows = texts.spread(heldout, 8, 16)
    expected = costs[windows[:, 8:-1], windows[:, 9:]].mean()
    found = heldout_bits(bigrams(logits), heldout, count=64, length=16, size=size)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_model_goes_on_from_the_prompt(alphabet, temperature):
    how = {"length": 3, "temperature": temperature, "seed": 0}
    assert generate(alphabet, "xyabc", count=5, **how) == "xyabcdefgh"
    assert generate(alphabet, "", count=2, **how) == "\n\x0b\x0c"


def test_the_seed_draws_and_temperature_spreads(uniform):
    def drawn(**how):
        return generate(uniform, "a", **{"count": 30, "length": 4, "temperature": 1.0, **how})

    assert drawn(seed=0) == drawn(seed=0) != drawn(seed=1)
    assert len(set(drawn(seed=0))) > 10
    assert len(set(drawn(seed=0, temperature=0.0)[1:])) == 1


def test_only_the_last_bytes_are_seen():
    class First(nnx.Module):
        """Repeats the first byte that it sees."""

        def __call__(self, data):
            return 40 * jax.nn.one_hot(jnp.broadcast_to(data[:, :1], data.shape), 256)

    assert generate(First(), "abc", count=4, length=2, temperature=0.0, seed=0) == "abcbcbc"
