"""Masks that know only the grid: their counts, their place, their randomness."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsjax import patterns

grids = st.tuples(st.integers(1, 12), st.integers(1, 12))
densities = st.floats(0, 1)
seeds = st.integers(0, 2**32)


@given(grids, densities, seeds)
def test_random_stores_the_rounded_share(grid, density, seed):
    mask = patterns.random(grid, density, seed=seed)
    assert (mask.shape, mask.dtype) == (grid, bool)
    assert mask.sum() == round(density * grid[0] * grid[1])
    np.testing.assert_array_equal(mask, patterns.random(grid, density, seed=seed))


def test_random_treats_all_blocks_alike():
    draws = 2000
    hits = sum(patterns.random((3, 5), 0.4, seed=s).astype(int) for s in range(draws))
    # a block is stored with probability 0.4: five standard deviations
    np.testing.assert_allclose(hits, 0.4 * draws, atol=5 * (draws * 0.4 * 0.6) ** 0.5)


@given(grids, densities, seeds)
def test_balanced_counts_differ_by_at_most_one(grid, density, seed):
    mask = patterns.balanced(grid, density, seed=seed)
    assert (mask.shape, mask.dtype) == (grid, bool)
    assert mask.sum() == round(density * grid[0] * grid[1])  # and so no block is stored twice
    for axis in (0, 1):
        counts = mask.sum(axis=axis)
        assert np.ptp(counts) == (mask.sum() % len(counts) > 0)
    np.testing.assert_array_equal(mask, patterns.balanced(grid, density, seed=seed))


@given(grids, st.data())
def test_balanced_per_column(grid, data):
    k = data.draw(st.integers(0, grid[0]))
    mask = patterns.balanced(grid, per_column=k)
    assert (mask.sum(axis=0) == k).all()
    assert np.ptp(mask.sum(axis=1)) <= 1


def test_balanced_is_uniform():
    """The 4 x 4 masks with two blocks per row and column are 90 (OEIS A001499)."""
    draws, kinds = 1800, 90
    seen = Counter(patterns.balanced((4, 4), 0.5, seed=s).tobytes() for s in range(draws))
    assert len(seen) == kinds
    expected = draws / kinds
    chi2 = sum((hits - expected) ** 2 / expected for hits in seen.values())
    assert chi2 < kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5


def test_balanced_gives_the_odd_block_to_anyone():
    draws = 400
    masks = [patterns.balanced((4, 5), 0.35, seed=s) for s in range(draws)]  # 7 blocks
    for axis, n in ((0, 5), (1, 4)):
        counts = np.array([mask.sum(axis=axis) for mask in masks])
        hits = (counts == counts.max()).sum(axis=0)
        share = (7 % n) / n  # of the lines that store one block more
        deviation = (draws * share * (1 - share)) ** 0.5
        np.testing.assert_allclose(hits, draws * share, atol=4 * deviation)


@pytest.mark.parametrize("grid", [(128, 128), (256, 16), (16, 256)])
def test_balanced_rows_share_columns_by_chance(grid):
    """Dealt in order, whole groups of rows would be alike; mixed ones share k^2 / c columns."""
    masks = [patterns.balanced(grid, 0.125, seed=s).astype(int) for s in range(6)]
    lines = [mask if grid[0] >= grid[1] else mask.T for mask in masks]  # along the longer axis
    n, width = lines[0].shape
    k = width // 8
    shared = np.concatenate([(m @ m.T)[np.triu_indices(n, 1)] for m in lines])
    assert shared.mean() == pytest.approx(k * k / width, rel=0.15)
    # the hypergeometric variance of two independent rows
    variance = k * k / width * (1 - k / width) * (width - k) / (width - 1)
    assert shared.var() == pytest.approx(variance, rel=0.15)


def test_seeds_differ():
    for generate in (patterns.random, patterns.balanced):
        assert not np.array_equal(generate((16, 16), 0.3), generate((16, 16), 0.3, seed=1))


@given(st.integers(1, 12), st.integers(0, 12))
def test_square_band(n, width):
    i = np.arange(n)
    expected = abs(i[:, None] - i) <= width
    np.testing.assert_array_equal(patterns.banded((n, n), width), expected)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_a_stretched_grid_has_a_stretched_band(n, times, width):
    band = patterns.banded((n, n), width)
    np.testing.assert_array_equal(
        patterns.banded((n, times * n), width), np.repeat(band, times, axis=1)
    )


@given(grids, st.integers(0, 3))
def test_band_follows_the_diagonal(grid, width):
    r, c = grid
    band = patterns.banded(grid, width)
    np.testing.assert_array_equal(band, patterns.banded((c, r), width).T)
    np.testing.assert_array_equal(band, band[::-1, ::-1])  # both corners alike
    assert not (band & ~patterns.banded(grid, width + 1)).any()
    # the block under every point of the diagonal (away from block borders) is stored
    t = (np.arange(r * c) + 0.5) / (r * c)
    assert band[(t * r).astype(int), (t * c).astype(int)].all()
    if width == 0:  # and nothing else is
        assert band.sum() == len({(int(x * r), int(x * c)) for x in t})


@given(grids, st.data())
def test_block_diagonal(grid, data):
    parts = data.draw(st.integers(1, min(grid)))
    mask = patterns.block_diagonal(grid, parts)
    rows, of_row = np.unique(mask, axis=0, return_inverse=True)
    assert len(rows) == parts  # one kind of row per part,
    assert (rows.sum(axis=0) == 1).all()  # every column in one part,
    for sizes in (rows.sum(axis=1), np.bincount(of_row.ravel())):
        assert np.ptp(sizes) <= 1  # parts as equal as can be,
    assert mask[0, 0]
    assert mask[-1, -1]
    assert mask.sum() == sum(
        a * b for a, b in zip(rows.sum(axis=1), np.bincount(of_row.ravel()), strict=True)
    )


def test_block_diagonal_by_hand():
    expected = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]], bool)
    np.testing.assert_array_equal(patterns.block_diagonal((4, 5), 2), expected)


@given(st.integers(1, 12))
def test_square_lower_triangle(n):
    np.testing.assert_array_equal(patterns.lower_triangular((n, n)), np.tri(n, dtype=bool))


@given(grids)
def test_lower_triangle_is_what_causal_attention_reads(grid):
    r, c = grid
    length = r * c  # positions, in query blocks of c and key blocks of r
    causal = np.tri(length, dtype=bool).reshape(r, c, c, r).any(axis=(1, 3))
    np.testing.assert_array_equal(patterns.lower_triangular(grid), causal)


@given(grids, st.data())
def test_global_blocks(grid, data):
    rows, columns = (data.draw(st.integers(0, n)) for n in grid)
    mask = patterns.global_blocks(grid, rows=rows, columns=columns)
    expected = np.zeros(grid, bool)
    expected[:rows] = expected[:, :columns] = True
    np.testing.assert_array_equal(mask, expected)


@given(grids, st.integers(1, 3), st.integers(1, 3))
def test_stretch_repeats_blocks(grid, a, b):
    mask = patterns.random(grid, 0.5)
    larger = (grid[0] * a, grid[1] * b)
    np.testing.assert_array_equal(patterns.stretch(mask, larger), np.kron(mask, np.ones((a, b))))


@given(grids, st.integers(0, 5), st.integers(0, 5))
def test_stretch_loses_nothing(grid, down, right):
    mask = patterns.random(grid, 0.5)
    larger = patterns.stretch(mask, (grid[0] + down, grid[1] + right))
    rows = np.unique(np.arange(len(larger)) * len(mask) // len(larger), return_index=True)[1]
    columns = np.arange(larger.shape[1]) * grid[1] // larger.shape[1]
    columns = np.unique(columns, return_index=True)[1]
    np.testing.assert_array_equal(larger[rows][:, columns], mask)


def test_masks_compose():
    grid = (8, 8)
    mask = (patterns.banded(grid, 1) | patterns.global_blocks(grid)) & ~patterns.random(grid, 0.2)
    assert mask.dtype == bool
    assert not (mask & patterns.random(grid, 0.2)).any()


def test_one_block_grids():
    one, none = np.ones((1, 1), bool), np.zeros((1, 1), bool)
    for mask, expected in [
        (patterns.random((1, 1), 0), none),
        (patterns.random((1, 1), 1), one),
        (patterns.balanced((1, 1), 0.0), none),
        (patterns.balanced((1, 1), per_column=1), one),
        (patterns.banded((1, 1), 0), one),
        (patterns.block_diagonal((1, 1), 1), one),
        (patterns.lower_triangular((1, 1)), one),
        (patterns.global_blocks((1, 1), rows=0, columns=0), none),
    ]:
        np.testing.assert_array_equal(mask, expected)


def test_numbers_and_grids_of_other_kinds():
    expected = patterns.random((4, 6), 0.25, seed=3)
    same = patterns.random(np.array([4, 6]), np.float32(0.25), seed=np.int64(3))
    np.testing.assert_array_equal(same, expected)
    np.testing.assert_array_equal(patterns.random([4, 6], 0.25, seed=3), expected)
