"""Masks from graphs: counts, structure, and the statistics of networkx's graphs of that name."""

import ast
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsjax import patterns

seeds = st.integers(0, 2**32)
shares = st.floats(0, 1)


def test_runtime_needs_numpy_only():
    files = sorted(Path(patterns.__file__).parent.glob("*.py"))
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    for name in names:
        assert name.split(".")[0] not in ("jax", "networkx", "scipy"), name


def symmetric_with_diagonal(mask, n):
    assert (mask.shape, mask.dtype) == ((n, n), bool)
    assert mask.diagonal().all()
    np.testing.assert_array_equal(mask, mask.T)


@given(st.integers(1, 30), st.data(), seeds)
def test_barabasi_albert_counts(n, data, seed):
    m = data.draw(st.integers(0, n - 1))
    mask = patterns.barabasi_albert(n, m, seed=seed)
    symmetric_with_diagonal(mask, n)
    assert mask.sum() == 2 * m * (n - m) + m * m + (n - m)
    assert mask[:m, :m].all()
    for new in range(m, n):  # each new node meets m earlier ones
        assert mask[new, :new].sum() == m
    np.testing.assert_array_equal(mask, patterns.barabasi_albert(n, m, seed=seed))


def test_barabasi_albert_draws_by_degree():
    """n = 4, m = 2: the last node meets two of three nodes with degrees 1, 1 and 2."""
    draws = 1500
    left_out = sum(~patterns.barabasi_albert(4, 2, seed=s)[3, :3] for s in range(draws))
    # node 2 is left out if 0 and 1 are drawn, in either order: 2 * 1/4 * 1/3
    expected = np.array([5 / 12, 5 / 12, 2 / 12])
    deviation = (draws * expected * (1 - expected)) ** 0.5
    assert (abs(left_out - draws * expected) < 4 * deviation).all()


@given(st.integers(1, 30), st.data(), shares, seeds)
def test_watts_strogatz_counts(n, data, p, seed):
    k_half = data.draw(st.integers(0, (n - 1) // 2))
    mask = patterns.watts_strogatz(n, k_half, p, seed=seed)
    symmetric_with_diagonal(mask, n)
    assert mask.sum() == n * (2 * k_half + 1)
    np.testing.assert_array_equal(mask, patterns.watts_strogatz(n, k_half, p, seed=seed))


@given(st.integers(1, 6), st.integers(1, 6), st.data(), shares, seeds)
def test_watts_strogatz_2d_counts(height, width, data, p, seed):
    n = height * width
    y, x = np.divmod(np.arange(n), width)
    alone = (2 * y % height == 0) & (2 * x % width == 0)  # nodes that are their own opposite
    k_half = data.draw(st.integers(0, (n - alone.sum()) // 2))
    mask = patterns.watts_strogatz_2d((height, width), k_half, p, seed=seed)
    symmetric_with_diagonal(mask, n)
    assert mask.sum() == n * (2 * k_half + 1)
    same = patterns.watts_strogatz_2d((height, width), k_half, p, seed=seed)
    np.testing.assert_array_equal(mask, same)


@given(st.integers(3, 20), st.data())
def test_watts_strogatz_without_rewiring_is_a_ring(n, data):
    k_half = data.draw(st.integers(0, (n - 1) // 2))
    expected = nx.to_numpy_array(nx.watts_strogatz_graph(n, 2 * k_half, 0)) + np.eye(n) > 0
    np.testing.assert_array_equal(patterns.watts_strogatz(n, k_half, 0), expected)


@pytest.mark.parametrize("shape", [(5, 6), (3, 7), (8, 8)])
def test_watts_strogatz_2d_without_rewiring_is_a_torus(shape):
    torus = nx.grid_2d_graph(*shape, periodic=True)
    nodes = [(y, x) for y in range(shape[0]) for x in range(shape[1])]
    plus = nx.to_numpy_array(torus, nodes) + np.eye(len(nodes)) > 0
    np.testing.assert_array_equal(patterns.watts_strogatz_2d(shape, 2, 0), plus)
    # k_half = 4: the 3 x 3 square around each node
    y, x = np.array(nodes).T
    dy, dx = abs(y[:, None] - y), abs(x[:, None] - x)
    near = (np.minimum(dy, shape[0] - dy) <= 1) & (np.minimum(dx, shape[1] - dx) <= 1)
    np.testing.assert_array_equal(patterns.watts_strogatz_2d(shape, 4, 0), near)


def test_a_torus_of_height_one_is_a_ring():
    np.testing.assert_array_equal(
        patterns.watts_strogatz_2d((1, 40), 3, 0.3, seed=5),
        patterns.watts_strogatz(40, 3, 0.3, seed=5),
    )


def linked(mask):
    return mask & ~np.eye(len(mask), dtype=bool)


def corner(mask, m):
    """networkx's graph as the paper's mask."""
    mask = mask | np.eye(len(mask), dtype=bool)
    mask[:m, :m] = True
    return mask


STATISTICS = {
    "clustering": patterns.clustering,
    "path length": patterns.average_path_length,
    "spread of degrees": lambda mask: linked(mask).sum(axis=0).std(),
    "largest degree": lambda mask: linked(mask).sum(axis=0).max(),
    "least degree": lambda mask: linked(mask).sum(axis=0).min(),
    "share of the ten largest": lambda mask: np.sort(linked(mask).sum(axis=0))[-10:].sum(),
    "where the links are": lambda mask: np.mean(np.subtract(*np.nonzero(linked(mask))) ** 2),
}
GRAPHS = {
    "barabasi_albert": (
        lambda s: patterns.barabasi_albert(150, 4, seed=s),
        lambda s: corner(nx.to_numpy_array(nx.barabasi_albert_graph(150, 4, seed=s)) > 0, 4),
    ),
    "watts_strogatz": (
        lambda s: patterns.watts_strogatz(150, 4, 0.2, seed=s),
        lambda s: nx.to_numpy_array(nx.watts_strogatz_graph(150, 8, 0.2, seed=s)) > 0,
    ),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_statistics_of_networkx(graph, statistic):
    draws = 24
    f = STATISTICS[statistic]
    ours, theirs = ([f(make(s)) for s in range(draws)] for make in GRAPHS[graph])
    error = ((np.var(ours) + np.var(theirs)) / draws) ** 0.5  # of the difference of the means
    assert abs(np.mean(ours) - np.mean(theirs)) <= 4 * error


@given(st.integers(0, 6), st.data())
def test_butterfly(power, data):
    n, factors = 2**power, data.draw(st.integers(0, power))
    mask = patterns.butterfly(n, factors)
    symmetric_with_diagonal(mask, n)
    assert (mask.sum(axis=0) == factors + 1).all()
    apart = np.bitwise_count(np.arange(n)[:, None] ^ np.arange(n))
    assert (apart[mask] <= 1).all()  # numbers that differ in one binary digit
    profile = patterns.mixing_profile(mask)
    if factors == power:  # mixes in log2(n) steps and not before
        assert profile[-1] == 1
        assert len(profile) == max(power, 1)
    else:  # never leaves its 2^factors blocks
        assert profile[-1] == 2**factors / n


def test_butterfly_takes_all_factors_by_itself():
    np.testing.assert_array_equal(patterns.butterfly(16), patterns.butterfly(16, 4))


@given(st.integers(1, 120), st.integers(1, 9))
def test_strides_mix_within_their_steps(n, steps):
    masks = patterns.strides(n, steps)
    assert len(masks) == steps
    r = max(mask.sum(axis=0).max() for mask in masks)
    assert r**steps >= n  # what any masks need
    assert n == 1 or (r - 1) ** steps < n  # and no more than that
    for mask in masks:
        assert (mask.shape, mask.dtype) == ((n, n), bool)
        assert mask.diagonal().all()
        assert len({*mask.sum(axis=0), *mask.sum(axis=1)}) == 1  # perfectly balanced
    assert patterns.mixing_profile(masks)[-1] == 1


@pytest.mark.parametrize(
    ("n", "steps", "degree"),
    [(576, 2, 24), (576, 3, 9), (576, 4, 5), (576, 5, 4), (144, 4, 4), (64, 3, 4), (1000, 3, 10)],
)
def test_strides_store_the_root_of_n(n, steps, degree):
    """64 and 1000 are cubes whose floating-point root lies on the wrong side."""
    for mask in patterns.strides(n, steps):
        assert (mask.sum(axis=0) == degree).all()


def test_strides_walk_the_digits():
    first, second = patterns.strides(9, 2)
    assert np.flatnonzero(first[4]).tolist() == [4, 5, 6]
    assert np.flatnonzero(second[4]).tolist() == [1, 4, 7]  # 4, 4 + 3, 4 + 6 - 9


def test_one_node():
    one = [[True]]
    for mask in (
        patterns.barabasi_albert(1, 0),
        patterns.watts_strogatz(1, 0, 0.5),
        patterns.watts_strogatz_2d((1, 1), 0, 1),
        patterns.butterfly(1),
        *patterns.strides(1, 2),
    ):
        np.testing.assert_array_equal(mask, one)


def test_full_graphs():
    assert patterns.barabasi_albert(5, 4).all()
    assert patterns.watts_strogatz(7, 3, 0.7).all()  # nowhere to rewire to
    assert patterns.watts_strogatz_2d((3, 3), 4, 1).all()


def test_seeds_differ():
    for generate in (
        lambda s: patterns.barabasi_albert(40, 2, seed=s),
        lambda s: patterns.watts_strogatz(40, 2, 0.3, seed=s),
        lambda s: patterns.watts_strogatz_2d((5, 8), 2, 0.3, seed=s),
    ):
        assert not np.array_equal(generate(0), generate(1))
