"""BigBird: window, ends, and random blocks that coincide with neither."""

import numpy as np
import pytest

from bsjax import patterns
from tests.helpers import assert_raises


@pytest.mark.parametrize("seed", [0, 1])
def test_bigbird(seed):
    mask = patterns.bigbird((16, 16), window=3, ends=1, random=3, seed=seed)
    row, column = np.arange(16)[:, None], np.arange(16)
    near = abs(row - column) <= 1
    ends = (row == 0) | (row == 15) | (column == 0) | (column == 15)
    assert mask[near | ends].all()
    assert (mask & ~near & ~ends).sum(1)[1:-1].tolist() == [3] * 14
    np.testing.assert_array_equal(
        mask, patterns.bigbird((16, 16), window=3, ends=1, random=3, seed=seed)
    )


def test_bigbird_random_blocks_differ_by_seed_and_are_anywhere():
    free = sum(
        patterns.bigbird((12, 12), window=1, ends=0, random=2, seed=s).astype(int)
        for s in range(400)
    )
    off = free[~np.eye(12, dtype=bool)]
    np.testing.assert_allclose(off, 400 * 2 / 11, atol=5 * (400 * 2 / 11) ** 0.5)


def test_bigbird_extreme_grids():
    assert patterns.bigbird((1, 1)).all()
    assert patterns.bigbird((1, 5)).all()
    assert patterns.bigbird((5, 1)).all()
    assert patterns.bigbird((4, 8), random=100).all()
    narrow = patterns.bigbird((4, 8), window=1, ends=0, random=0)
    assert narrow.sum(1).tolist() == [1] * 4
    assert narrow[:, ::2].trace() == 4


def test_bigbird_messages():
    assert_raises(
        lambda: patterns.bigbird((4, 4), window=2),
        ValueError,
        "bigbird: `window` must be odd, got 2: as many blocks before as after.",
    )
