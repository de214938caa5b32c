"""Masks for the internal steps of a cell."""

import numpy as np
import pytest

from bsjax.patterns import balanced, barabasi_albert, mixing_profile, step_masks, strides

# Percent of pairs connected after 1, 2, ... steps, as published tables and our own counts have it:
# blocks of state, family and parameters, density, steps until all are.
TABLE = [
    (576, "barabasi_albert", {"m": 8}, 0.0293, 4),
    (576, "barabasi_albert", {"m": 6}, 0.0224, 4),
    (576, "watts_strogatz", {"k_half": 8, "p": 0.2}, 0.0295, 4),
    (288, "barabasi_albert", {"m": 4}, 0.0309, 4),
    (144, "barabasi_albert", {"m": 2}, 0.0343, 6),
    (128, "barabasi_albert", {"m": 3}, 0.054, 5),
    (128, "watts_strogatz", {"k_half": 6, "p": 0.2}, 0.102, 4),
]


@pytest.mark.parametrize(("n", "graph", "parameters", "density", "steps"), TABLE)
def test_mixes_within_the_depth(n, graph, parameters, density, steps):
    """As fast as the table says, with fresh masks (which may be a step faster) and a shared one."""
    for share in (False, True):
        masks = step_masks(n, steps, graph, parameters, share=share)
        assert len(masks) == steps + 1
        assert np.mean(masks) == pytest.approx(density, rel=0.02)
        assert all(mask.diagonal().all() for mask in masks)
        profile = mixing_profile(masks[:-1])
        assert profile[-1] > 0.9999
        assert profile[steps - 3] < 1


def test_strides_mix_in_exactly_the_depth():
    masks = step_masks(576, 4, "strides")
    assert all(np.array_equal(a, b) for a, b in zip(masks[:4], strides(576, 4), strict=True))
    assert [p == 1 for p in mixing_profile(masks[:-1])] == [False, False, False, True]
    assert masks[0].mean() == pytest.approx(5 / 576)


def test_draws():
    """One seed, one list; another one, other masks; shared ones are one object."""
    first, again = (step_masks(20, 3, "barabasi_albert", {"m": 2}, seed=7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({mask.tobytes() for mask in first}) == 4
    near = step_masks(20, 3, "barabasi_albert", {"m": 2}, seed=8)
    assert not {mask.tobytes() for mask in first} & {mask.tobytes() for mask in near}
    shared = step_masks(20, 3, "barabasi_albert", {"m": 2}, share=True)
    assert all(mask is shared[0] for mask in shared)


def test_any_function():
    def graph(n, *, seed, share):
        return balanced((n, n), share, seed=seed) & ~np.eye(n, dtype=bool)

    masks = step_masks(10, 2, graph, {"share": 0.3})
    assert all(mask.diagonal().all() for mask in masks)
    with pytest.raises(ValueError, match=r"gave a mask of shape \(3, 3\) for n=10: return"):
        step_masks(10, 2, lambda n, seed: np.eye(3, dtype=bool))
    with pytest.raises(TypeError, match="`graph` must be bool"):
        step_masks(10, 2, lambda n, seed: np.eye(n))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"graph": "ring"},
            r'`graph` must be one of "balanced", "barabasi_albert", .*, got .ring.',
        ),
        ({"graph": 3}, "or a function"),
        ({"graph": "strides", "share": True}, "leave both out"),
        ({"graph": "strides", "parameters": {"r": 2}}, "leave both out"),
        ({"depth": 0}, "`depth` must be a whole number of at least 1"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        step_masks(**{"n": 10, "depth": 2, **options})


def test_names_are_the_generators():
    drawn = step_masks(30, 1, "barabasi_albert", {"m": 3}, share=True, seed=0)[0]
    assert drawn.sum() == barabasi_albert(30, 3).sum()
