"""What attention drops: a hash, as random as a share of so many draws can tell.

Bounds are those of a normal distribution: a test of `count` numbers allows each of them
`normal_bound(count)` standard deviations, which chance exceeds in one of them once in a million.
(The numbers are the same in every run.)
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _attention_dropout as dropout
from tests.ops.attention import kept as by_numpy

pytestmark = pytest.mark.usefixtures("quick_compilations")
N, H, SIZE = 2, 3, 512
RATES = [0.1, 0.5, 0.93]


def normal_bound(count):
    return statistics.NormalDist().inv_cdf(1 - 1e-6 / (2 * count))


@jax.jit
def kept(key, which, first=0):
    """`[n, h, q, s]`, from a query and key on."""
    at = first + jnp.arange(SIZE, dtype=jnp.int32)
    words = dropout.words(dropout.seeds(key, N, H)[:, :, None], at[None, None])
    a, b = (one[..., None] for one in words)
    bits = [dropout.kept(a, b, at[None, None, None], rate) for rate in RATES]
    return jnp.stack(bits)[which]


def standard(rate, key=0, first=0):
    """With mean zero and variance one, if a share of `rate` is dropped."""
    drawn = np.asarray(kept(jax.random.key(key), rate, first)).astype(np.float32)
    return (drawn - (1 - RATES[rate])) / np.sqrt(RATES[rate] * (1 - RATES[rate]))


def assert_random(sums, draws):
    """Sums of so many independent numbers with mean zero and variance one."""
    sums = np.asarray(sums, np.float64)
    assert np.abs(sums).max() <= normal_bound(sums.size) * np.sqrt(draws)


def skewed(rate, count, draws):
    """The bound for binomial sums, further out on the long side: that of Bernstein's inequality."""
    log, share = np.log(2e6 * count), RATES[rate]
    most = max(share, 1 - share) / np.sqrt(share * (1 - share))  # of one number
    return most * log / 3 + np.sqrt((most * log / 3) ** 2 + 2 * draws * log)


@pytest.mark.parametrize("rate", range(len(RATES)), ids=map(str, RATES))
@pytest.mark.parametrize("first", [0, 100_000])
def test_a_share_is_kept_everywhere(rate, first):
    """Of all, and of each row, column, diagonal, head and batch element."""
    x = standard(rate, first=first)
    assert_random(x.sum(), x.size)
    assert_random(x.sum((2, 3)), SIZE**2)
    for axis in (2, 3):
        sums = x.sum(axis)
        assert np.abs(sums).max() <= skewed(rate, sums.size, SIZE)
        # not too even either: the variance of sums, itself with a variance of two and some
        off = (sums**2 / SIZE - 1).mean() * np.sqrt(sums.size / 2)
        assert abs(off) <= normal_bound(1)
    for shift in range(0, SIZE, 128):
        along = x[:, :, np.arange(SIZE), (np.arange(SIZE) + shift) % SIZE].sum(2)
        assert np.abs(along).max() <= skewed(rate, along.size * (SIZE // 128), SIZE)


@pytest.mark.parametrize("rate", range(len(RATES)), ids=map(str, RATES))
def test_neighbours_are_independent(rate):
    """No correlation between near keys or queries, heads, batch elements, keys of calls."""
    x = standard(rate)
    for distance in (1, 2, 3, 4, 8, 64, 128):
        for axis in (2, 3):
            a, b = np.split(x, [distance], axis)[1], np.split(x, [SIZE - distance], axis)[0]
            assert_random((a * b).sum((2, 3)), SIZE * (SIZE - distance))
    assert_random((x[:, 0] * x[:, 1]).sum((1, 2)), SIZE**2)
    assert_random((x[0] * x[1]).sum((1, 2)), SIZE**2)
    assert_random((x * x.swapaxes(2, 3) * (1 - np.eye(SIZE, dtype=np.float32))).sum((2, 3)) / 2,
                  SIZE**2 / 2)  # fmt: skip
    for key in (1, 2):
        assert_random((x * standard(rate, key)).sum((2, 3)), SIZE**2)
    # four corners of a rectangle
    for i, j in ((1, 1), (2, 64), (64, 2)):
        a, b = x[:, :, i:] * x[:, :, :-i], SIZE - i
        corners = (a[..., j:] * a[..., :-j]).sum((2, 3))
        assert_random(corners, b * (SIZE - j))


def test_no_two_rows_are_alike():
    """All pairs of rows, and of columns: correlations like those of random bits."""
    x = standard(1)[0, 0]
    for rows in (x, x.T):
        gram = rows @ rows.T
        np.fill_diagonal(gram, 0)
        assert np.abs(gram).max() <= skewed(1, gram.size, SIZE)
        assert abs(gram.var() / SIZE - 1) <= normal_bound(1) * np.sqrt(2 / (SIZE**2 / 2)) + 2 / SIZE


def test_a_weak_hash_does_not_pass():
    """What the tests above would see of the same hash without its products."""
    seed = dropout.seeds(jax.random.key(0), N, H)
    at = jnp.arange(SIZE, dtype=jnp.int32)
    first, _ = dropout.words(seed[0, 0], at)
    bits = at[None] * dropout.STEP + first[:, None]
    x = 2 * np.asarray(bits >= 0).astype(np.float32) - 1
    with pytest.raises(AssertionError):
        assert_random((x[:, 1:] * x[:, :-1]).sum(), SIZE * (SIZE - 1))


@pytest.mark.parametrize("rate", range(len(RATES)), ids=map(str, RATES))
def test_numpy_drops_the_same(rate):
    key = jax.random.key(5)
    want = by_numpy(dropout.seeds(key, N, H), SIZE, SIZE, RATES[rate]) > 0
    np.testing.assert_array_equal(np.asarray(kept(key, rate)), want)


def test_seeds_of_any_kind_of_key():
    """All differ, and more elements do not change those of the first."""
    for impl in ("threefry2x32", "rbg"):
        key = jax.random.key(0, impl=impl)
        seed = np.asarray(dropout.seeds(key, 4, 3))
        assert len(set(seed.ravel().tolist())) == seed.size
        np.testing.assert_array_equal(dropout.seeds(key, 2, 3), seed[:2])


@pytest.mark.parametrize("block", [(8, 16), (16, 8)])
def test_implementations_and_blocks_drop_the_same(block):
    """Bit by bit: with zeros for queries and unit vectors for values, y tells what is kept."""
    n, s, h = 2, 32, 2
    q, v = jnp.zeros((n, s, h, 4)), jnp.broadcast_to(jnp.eye(s)[:, None], (n, s, h, s))
    p = bsjax.BlockPattern.from_mask(np.ones((s // block[0], s // block[1]), bool), block)
    key = jax.random.key(3)
    want = by_numpy(dropout.seeds(key, n, h), s, s, 0.4) > 0
    for name in ("xla", "dense", "reference"):
        y = bsjax.attention(q, q, v, p, dropout_rate=0.4, key=key, implementation=name)
        np.testing.assert_array_equal(np.asarray(y).swapaxes(1, 2) > 0, want)


def test_rates_at_the_ends():
    assert dropout.threshold(0.0) == -(2**31)
    assert dropout.threshold(0.5) == 0
    assert dropout.threshold(1 - 2**-40) == 2**31 - 1
