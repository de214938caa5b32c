"""The network: no pixel sees itself or a later one, and both models are of one size."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import _pixelcnn as net
from models._logistic import numbers
from models._pixelcnn import PixelCNN, Size
from models._pixelcnn_train import costs, draw
from models._train import parameter_count

COLOR = Size(
    channels=3,
    levels=5,
    filters=8,
    blocks=1,
    scales=2,
    mixtures=2,
    dropout=0.5,
    density=0.5,
    block=4,
    pattern="block_diagonal",
)
GREY = COLOR._replace(channels=1, scales=1, density=1.0)


@functools.cache
def ready(size):
    """A model whose residuals matter, and a compiled call."""
    model = PixelCNN(size, nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, net.Gated):
            kernel = getattr(module.second, "values", None) or module.second.kernel
            kernel[...] = kernel[...] / net.LAST_GAIN
    return model, nnx.jit(lambda model, x: model(x))


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        pytest.param(COLOR, (4, 4), id="sparse color"),
        pytest.param(GREY, (3, 5), id="dense grey", marks=pytest.mark.slow),
    ],
)
def test_a_pixel_sees_the_ones_before_it_and_no_other(size, sides):
    """Bitwise: also not in the padding, in the smaller images, or in what is spread from them."""
    model, call = ready(size)
    rng = np.random.default_rng(0)
    x = rng.integers(0, size.levels, (1, *sides, size.channels), np.int32)
    raw = np.asarray(call(model, jnp.asarray(x))).reshape(-1, numbers(size.channels, 2))
    sees = np.zeros((raw.shape[0], raw.shape[0]), bool)  # [pixel, another one]
    for other, at in enumerate(itertools.product(*map(range, sides))):
        moved = x.copy()
        moved[(0, *at)] = (moved[(0, *at)] + 1 + rng.integers(size.levels - 1)) % size.levels
        after = np.asarray(call(model, jnp.asarray(moved))).reshape(raw.shape)
        sees[:, other] = (after != raw).any(1)
    height, width = sides
    np.testing.assert_array_equal(sees & ~np.tri(height * width, k=-1, dtype=bool), False)
    last = sees[-1]
    assert last[:-1].all()  # all that is before it
    middle = (height - 1) * width + 1
    neighbours = [middle - 1, middle - width - 1, middle - width, middle - width + 1]
    assert sees[middle][neighbours].all()


def test_dropout_draws_from_its_key():
    model, call = ready(GREY)
    x = jnp.zeros((1, 3, 5, 1), jnp.int32)
    drop = nnx.jit(lambda model, x, key: model(x, key))
    a, b, c = (drop(model, x, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (a != call(model, x)).any()


def test_images_come_as_often_as_the_likelihood_says():
    """All images of two pixels and three levels; the second pixel sees the first."""
    size = GREY._replace(levels=3, mixtures=1)
    model = PixelCNN(size, nnx.Rngs(1))
    model.head.kernel[...] = 4 * model.head.kernel[...]  # so that it matters what was seen
    every = np.array(list(itertools.product(range(3), repeat=2)), np.int32).reshape(9, 1, 2, 1)
    p = 2.0 ** (-2 * np.asarray(costs(model, jnp.asarray(every)), np.float64))
    # some ten roundings, of half a unit each, of a logarithm that is log(9) on average at most
    rounding = 10 * np.log(9) * np.finfo(np.float32).eps / 2
    np.testing.assert_allclose(p.sum(), 1, rtol=0, atol=rounding)
    first = p.reshape(3, 3).sum(1)
    assert np.abs(p.reshape(3, 3) / first[:, None] - p.reshape(3, 3).sum(0)).max() > 0.02
    count = 4000
    drawn = draw(model, jax.random.key(0), count, (1, 2))
    assert drawn.dtype == np.uint8
    seen = np.bincount(drawn.reshape(count, 2) @ [3, 1], minlength=9)
    assert (np.abs(seen - count * p) < 5 * np.sqrt(count * p * (1 - p))).all()


def test_a_smaller_image_is_spread_over_a_larger_one():
    x = np.arange(2 * 2 * 3 * 8).reshape(2, 2, 3, 8)
    y = np.asarray(net.spread(jnp.asarray(x)))
    assert y.shape == (2, 4, 6, 2)
    for row, column, channel in itertools.product(range(4), range(6), range(2)):
        part = 2 * (row % 2) + column % 2
        expected = x[:, row // 2, column // 2, 2 * part + channel]
        np.testing.assert_array_equal(y[:, row, column, channel], expected)


def test_a_sparse_model_twice_as_deep_has_as_many_weights():
    """Biases are what is left over; and FLOPs by the formula of each layer, by hand."""
    dense = Size(1, 17, 16, 2, 2, 3, 0.0, 1.0, 4, "balanced")
    sparse = dense._replace(blocks=4, density=0.5)
    models = [nnx.eval_shape(lambda s=s: PixelCNN(s, nnx.Rngs(0))) for s in (dense, sparse)]
    f, k = 16, numbers(1, 3)
    pair = (2 * f * f + 4 * f * f) * (6 + 4)  # both convolutions of a block of each stream
    pairs = 2 * (2 * pair + 2 * f * f + 2 * f * f + 4 * f * f)  # up and down, and what is told
    ends = 2 * f * (6 + 3 + 2) + f * k
    moves = f * f * (6 + 4) + 2 * 4 * f * f
    assert net.flops(models[0], 64) == 2 * (64 * (ends + pairs) + 16 * (pairs + moves))
    assert net.flops(models[1], 64) == net.flops(models[0], 64)
    weights = ends + moves + 2 * pairs
    biases = [2 * f + k + 10 * f + 2 * 2 * b * 2 * 3 * f for b in (2, 4)]
    assert [parameter_count(m) for m in models] == [weights + b for b in biases]
    assert net.stored_share(models[0]) == 1
    assert net.stored_share(models[1]) == 0.5


@pytest.mark.parametrize("pattern", net.PATTERNS)
def test_masks(pattern):
    size = COLOR._replace(filters=32, density=0.25, pattern=pattern)
    masks = [net.mask(size, 2, 1, seed) for seed in range(3)]
    for one in masks:
        assert one.shape == (16, 8)
        np.testing.assert_array_equal(one.sum(0), 4)
        if pattern == "block_diagonal":  # both signs of a feature go the same way; four groups
            np.testing.assert_array_equal(one[:8], one[8:])
            assert len(np.unique(one, axis=1).T) == 4
    assert (masks[0] != masks[1]).any()
