"""The numbers that describe a mask, against networkx, loops, and published values."""

import itertools
import math
import time

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsjax import patterns

masks = st.builds(
    lambda n, density, seed: patterns.random((n, n), density, seed=seed),
    st.integers(1, 10),
    st.floats(0, 1),
    st.integers(0, 2**32),
)


class Pattern:
    """As much of a BlockPattern as a diagnostic asks for."""

    def __init__(self, mask):
        self._mask = mask

    def mask(self):
        return self._mask


def slow_profile(chain):
    reach, profile = np.eye(len(chain[0]), dtype=int), []
    for mask in chain:
        reach = np.minimum(reach @ mask.astype(int), 1)
        profile.append(reach.mean())
    return profile


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.floats(0, 1))
def test_profile_of_a_list(sizes, density):
    """Rectangular masks, too, and sizes beyond one 64-bit word."""
    sizes = [size * 9 for size in sizes]
    grids = itertools.pairwise(sizes)
    chain = [patterns.random(grid, density * 0.1, seed=i) for i, grid in enumerate(grids)]
    profile = patterns.mixing_profile(chain)
    assert profile == pytest.approx(slow_profile(chain))
    assert all(type(share) is float for share in profile)


@given(masks, st.integers(1, 6))
def test_profile_of_one_mask(mask, steps):
    profile = patterns.mixing_profile(mask, steps=steps)
    assert profile == pytest.approx(slow_profile([mask] * steps))
    until = patterns.mixing_profile(mask)
    assert until == pytest.approx(slow_profile([mask] * len(until)))
    assert len(until) <= len(mask)
    if len(until) < len(mask):  # it stopped for a reason: full, or nothing changes any more
        assert until[-1] == 1 or until[-1] == slow_profile([mask] * (len(until) + 1))[-1]
    assert 1 not in until[:-1]


def test_a_list_with_steps_goes_round():
    a, b = patterns.strides(16, 2)
    assert patterns.mixing_profile([a, b]) == [0.25, 1]
    assert patterns.mixing_profile([a, b], steps=1) == [0.25]
    ring = patterns.watts_strogatz(9, 1, 0)
    shift = np.roll(np.eye(9, dtype=bool), 1, axis=1)
    expected = slow_profile([ring, shift, ring])
    assert patterns.mixing_profile([ring, shift], steps=3) == pytest.approx(expected)


def test_a_mask_without_a_diagonal_may_only_move():
    shift = np.roll(np.eye(5, dtype=bool), 1, axis=1)
    assert patterns.mixing_profile(shift) == [0.2] * 5


def test_one_rectangular_mask_takes_one_step():
    assert patterns.mixing_profile(patterns.global_blocks((4, 8), columns=0)) == [0.25]


def test_masks_by_every_road():
    mask = patterns.banded((6, 6), 1)
    expected = patterns.mixing_profile([mask, mask])
    assert patterns.mixing_profile(np.stack([mask, mask])) == expected
    assert patterns.mixing_profile((Pattern(mask), mask)) == expected
    assert patterns.mixing_profile(Pattern(mask), steps=2) == expected
    assert patterns.clustering(Pattern(mask)) == patterns.clustering(mask)


@given(masks)
def test_average_path_length_of_networkx(mask):
    graph = nx.from_numpy_array(mask, create_using=nx.DiGraph)
    found = patterns.average_path_length(mask)
    if len(mask) == 1:
        assert found == 0
    elif nx.is_strongly_connected(graph):
        assert found == pytest.approx(nx.average_shortest_path_length(graph))
    else:
        assert found == math.inf


@given(masks)
def test_clustering_of_networkx(mask):
    graph = nx.from_numpy_array((mask | mask.T) & ~np.eye(len(mask), dtype=bool))
    assert patterns.clustering(mask) == pytest.approx(nx.average_clustering(graph), abs=1e-6)


@pytest.mark.parametrize("mask", [patterns.watts_strogatz(80, 3, 0.1), patterns.butterfly(64, 6)])
def test_small_world_by_its_definition(mask):
    graph = nx.from_numpy_array(mask & ~np.eye(len(mask), dtype=bool))
    n, k = len(mask), mask.sum(axis=0).mean() - 1
    c, length = nx.average_clustering(graph), nx.average_shortest_path_length(graph)
    expected = (c / (k / n)) / (length / (math.log(n) / math.log(k)))
    assert patterns.small_world(mask) == pytest.approx(expected, rel=1e-5)


def test_small_world_tells_a_small_world_from_a_random_graph():
    assert patterns.small_world(patterns.watts_strogatz(400, 5, 0.1)) > 10
    assert patterns.small_world(patterns.watts_strogatz(400, 5, 1.0)) < 2


def test_spectral_gap():
    n = 12
    ring = patterns.watts_strogatz(n, 1, 0)
    assert patterns.spectral_gap(ring) == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / n)))
    assert patterns.spectral_gap(np.ones((n, n), bool)) == pytest.approx(1)
    assert patterns.spectral_gap(patterns.block_diagonal((n, n), 3)) == pytest.approx(0, abs=1e-9)
    assert patterns.spectral_gap(np.ones((1, 1), bool)) == 1
    # rows are divided by their own number of blocks: a walk that ends in node 0 and stays there
    assert patterns.spectral_gap(np.array([[1, 0], [1, 1]], bool)) == pytest.approx(0.5)


def test_degree_balance():
    mask = np.array([[1, 1, 1], [0, 1, 0]], bool)
    columns, rows = patterns.degree_balance(mask)
    assert columns == (1, 4 / 3, 2)
    assert rows == (1, 2, 3)
    assert (columns.imbalance, rows.imbalance) == (1.5, 1.5)
    assert patterns.degree_balance(np.zeros((2, 3), bool)).rows == (0, 0, 0)
    assert patterns.degree_balance(np.zeros((2, 3), bool)).rows.imbalance == 1
    assert patterns.degree_balance(patterns.balanced((30, 20), 0.1)).columns.imbalance == 1


# Mixing in percent, C and L of one mask of each kind, computed with networkx's generators and
# other seeds. Gray et al. 2017 used such masks: a state of 18432 in blocks of 32.
PUBLISHED = [
    (lambda s: patterns.barabasi_albert(576, 8, seed=s), 2.93, 0.079, 2.52, [2.9, 45.1, 99.8, 100]),
    (lambda s: patterns.barabasi_albert(576, 6, seed=s), 2.24, 0.065, 2.70, [2.2, 31.4, 97.1, 100]),
    (lambda s: patterns.watts_strogatz(576, 8, 0.2, seed=s), 2.95, 0.370, 2.93,
     [3.0, 19.6, 85.3, 100]),
    (lambda s: patterns.watts_strogatz(576, 6, 1.0, seed=s), 2.26, 0.019, 2.81,
     [2.3, 23.4, 93.9, 100]),
]  # fmt: skip


@pytest.mark.parametrize(("make", "density", "c", "length", "mixing"), PUBLISHED)
def test_published_numbers(make, density, c, length, mixing):
    """As near as one random graph is to another of its kind: within 4 standard deviations."""
    masks = [make(seed) for seed in range(10)]
    assert 100 * masks[0].mean() == pytest.approx(density, abs=0.005)

    def near(numbers, published, digit):
        np.testing.assert_allclose(
            published,
            np.mean(numbers, axis=0),
            atol=digit / 2 + 4 * np.max(np.std(numbers, axis=0)),
        )

    near([patterns.clustering(mask) for mask in masks], c, 0.001)
    near([patterns.average_path_length(mask) for mask in masks], length, 0.01)
    profiles = [patterns.mixing_profile(mask, steps=len(mixing)) for mask in masks]
    near(100 * np.array(profiles), mixing, 0.1)
    assert all(profile[-1] > 0.9999 for profile in profiles)


@pytest.mark.parametrize(
    ("n", "steps", "percent"),
    [(576, 2, 4.17), (576, 3, 1.56), (576, 4, 0.87), (576, 5, 0.69), (144, 2, 8.3), (144, 5, 2.1)],
)
def test_published_strides(n, steps, percent):
    chain = patterns.strides(n, steps)
    assert 100 * chain[0].mean() == pytest.approx(percent, abs=0.05)
    profile = patterns.mixing_profile(chain)
    assert profile[-1] == 1
    assert profile[-2] < 1


QUICK = {
    "random": lambda n: patterns.random((n, n), 0.05),
    "balanced": lambda n: patterns.balanced((n, n), 0.05),
    "barabasi_albert": lambda n: patterns.barabasi_albert(n, 8),
    "watts_strogatz": lambda n: patterns.watts_strogatz(n, 8, 0.2),
    "watts_strogatz_2d": lambda n: patterns.watts_strogatz_2d((24, n // 24), 8, 0.2),
    "a full mask": lambda n: np.ones((n, n), bool),
    "a thin band": lambda n: patterns.banded((n, n), 1),  # takes n - 1 steps to mix
}


@pytest.mark.parametrize("name", QUICK)
def test_576_blocks_take_less_than_a_second(name):
    start = time.process_time()
    mask = QUICK[name](576)
    made = time.process_time()
    patterns.mixing_profile(mask)
    patterns.average_path_length(mask)
    assert made - start < 1
    assert time.process_time() - made < 2
