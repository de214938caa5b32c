"""Every wrong argument is answered by a sentence: function, argument, found, expected, cure."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from bsjax import patterns

square, wide = np.eye(4, dtype=bool), np.ones((4, 6), bool)

CASES = {
    # densities and probabilities
    "percent": (
        lambda: patterns.random((4, 4), 10),
        ValueError,
        "random: `density` must be a number from 0 to 1, got 10.0: it is a share, so write 10% as "
        "0.1.",
    ),
    "negative density": (
        lambda: patterns.balanced((4, 4), -0.1),
        ValueError,
        "balanced: `density` must be a number from 0 to 1, got -0.1",
    ),
    "nan": (
        lambda: patterns.random((4, 4), float("nan")),
        ValueError,
        "random: `density` must be a number from 0 to 1, got nan",
    ),
    "text density": (
        lambda: patterns.random((4, 4), "0.1"),
        TypeError,
        "random: `density` must be a number from 0 to 1, got '0.1' of type str: give a float such "
        "as 0.1.",
    ),
    "bool density": (lambda: patterns.random((4, 4), True), TypeError, "got True of type bool"),
    "no density": (lambda: patterns.random((4, 4), None), TypeError, "got None of type NoneType"),
    "probability": (
        lambda: patterns.watts_strogatz(9, 2, 1.5),
        ValueError,
        "watts_strogatz: `p` must be a number from 0 to 1, got 1.5",
    ),
    "probability in 2-D": (
        lambda: patterns.watts_strogatz_2d((3, 3), 2, float("nan")),
        ValueError,
        "watts_strogatz_2d: `p` must be a number from 0 to 1, got nan",
    ),
    "density and count": (
        lambda: patterns.balanced((4, 4), 0.5, per_column=2),
        ValueError,
        "balanced: give one of `density` and `per_column`, got both: `density` is a share of the "
        "grid, `per_column` the number of blocks in each block-column.",
    ),
    "neither": (lambda: patterns.balanced((4, 4)), ValueError, "got neither"),
    # grids
    "one number": (
        lambda: patterns.random(8, 0.5),
        TypeError,
        "random: `grid` must be a pair of sizes, got 8: write `grid=(rows, columns)`, both counted "
        "in blocks.",
    ),
    "three numbers": (
        lambda: patterns.banded((4, 4, 4), 1),
        TypeError,
        "banded: `grid` must be a pair of sizes, got (4, 4, 4)",
    ),
    "text grid": (lambda: patterns.lower_triangular("ab"), TypeError, "got 'ab'"),
    "negative grid": (
        lambda: patterns.lower_triangular((4, -1)),
        ValueError,
        "lower_triangular: `grid[1]` must be a whole number of at least 1, got -1: raise it.",
    ),
    "empty grid": (
        lambda: patterns.random((0, 4), 0.5),
        ValueError,
        "random: `grid[0]` must be a whole number of at least 1, got 0",
    ),
    "float grid": (
        lambda: patterns.global_blocks((4.0, 4)),
        TypeError,
        "global_blocks: `grid[0]` must be a whole number of at least 1, got 4.0 of type float: "
        "convert it with int(...) or round(...).",
    ),
    "torus": (
        lambda: patterns.watts_strogatz_2d(9, 1, 0.1),
        TypeError,
        "watts_strogatz_2d: `shape` must be a pair of sizes, got 9: write `shape=(rows, columns)`",
    ),
    # counts
    "negative seed": (
        lambda: patterns.random((4, 4), 0.5, seed=-1),
        ValueError,
        "random: `seed` must be a whole number of at least 0, got -1",
    ),
    "float seed": (
        lambda: patterns.barabasi_albert(4, 1, seed=0.5),
        TypeError,
        "barabasi_albert: `seed` must be a whole number of at least 0, got 0.5 of type float",
    ),
    "no seed": (
        lambda: patterns.watts_strogatz(4, 1, 0, seed=None),
        TypeError,
        "watts_strogatz: `seed` must be a whole number of at least 0, got None",
    ),
    "too many per column": (
        lambda: patterns.balanced((4, 8), per_column=5),
        ValueError,
        "balanced: `per_column` must be a whole number from 0 to 4, got 5: lower it.",
    ),
    "negative width": (
        lambda: patterns.banded((4, 4), -1),
        ValueError,
        "banded: `width` must be a whole number of at least 0, got -1: raise it.",
    ),
    "bool width": (
        lambda: patterns.banded((4, 4), True),
        TypeError,
        "banded: `width` must be a whole number of at least 0, got the bool True: give a count.",
    ),
    "no parts": (
        lambda: patterns.block_diagonal((4, 8), 0),
        ValueError,
        "block_diagonal: `parts` must be a whole number from 1 to 4, got 0: raise it.",
    ),
    "too many parts": (
        lambda: patterns.block_diagonal((4, 8), 5),
        ValueError,
        "got 5: lower it. A part needs a block-row and a block-column of the grid (4, 8).",
    ),
    "too many rows": (
        lambda: patterns.global_blocks((4, 8), rows=5),
        ValueError,
        "global_blocks: `rows` must be a whole number from 0 to 4, got 5",
    ),
    "negative columns": (
        lambda: patterns.global_blocks((4, 8), columns=-1),
        ValueError,
        "global_blocks: `columns` must be a whole number from 0 to 8, got -1",
    ),
    "no nodes": (
        lambda: patterns.barabasi_albert(0, 0),
        ValueError,
        "barabasi_albert: `n` must be a whole number of at least 1, got 0",
    ),
    "m = n": (
        lambda: patterns.barabasi_albert(8, 8),
        ValueError,
        "barabasi_albert: `m` must be a whole number from 0 to 7, got 8: lower it. Every new node "
        "links to m of the n = 8 nodes.",
    ),
    "wide ring": (
        lambda: patterns.watts_strogatz(8, 4, 0.1),
        ValueError,
        "watts_strogatz: `k_half` must be a whole number from 0 to 3, got 4: lower it. A ring of "
        "n = 8 nodes has that many different neighbours on either side.",
    ),
    "wide torus": (
        lambda: patterns.watts_strogatz_2d((2, 4), 3, 0.1),
        ValueError,
        "watts_strogatz_2d: `k_half` must be a whole number from 0 to 2, got 3: lower it. A torus "
        "(2, 4) has that many pairs of opposite neighbours.",
    ),
    "no power of two": (
        lambda: patterns.butterfly(12),
        ValueError,
        "butterfly: `n` must be a power of two, got 12: stretch a smaller one, "
        "`stretch(butterfly(8), (12, 12))`.",
    ),
    "too many factors": (
        lambda: patterns.butterfly(8, 4),
        ValueError,
        "butterfly: `factors` must be a whole number from 0 to 3, got 4: lower it. 8 is 2^3.",
    ),
    "no steps": (
        lambda: patterns.strides(8, 0),
        ValueError,
        "strides: `steps` must be a whole number of at least 1, got 0",
    ),
    "float n": (lambda: patterns.strides(8.0, 1), TypeError, "strides: `n` must be a whole number"),
    "shrinking": (
        lambda: patterns.stretch(square, (8, 2)),
        ValueError,
        "stretch: `grid` (8, 2) must be at least as large as the mask (4, 4) along both axes, or "
        "blocks would be lost: generate a smaller mask and stretch that.",
    ),
    # masks
    "float mask": (
        lambda: patterns.clustering(square.astype(float)),
        TypeError,
        "clustering: `mask` must be bool, got float64: say which blocks are stored, for example "
        "`mask != 0`.",
    ),
    "list for a mask": (
        lambda: patterns.degree_balance([[True]]),
        TypeError,
        "degree_balance: `mask` must be a bool mask or have a `.mask()`, got list: wrap it in "
        "np.asarray(..., bool).",
    ),
    "three axes": (
        lambda: patterns.degree_balance(square[None]),
        ValueError,
        "degree_balance: `mask` must have shape (rows, columns) with at least one of each, got "
        "(1, 4, 4): pass one mask at a time.",
    ),
    "no blocks": (lambda: patterns.stretch(square[:0], (4, 4)), ValueError, "got (0, 4)"),
    "not square": (
        lambda: patterns.average_path_length(wide),
        ValueError,
        "average_path_length: `mask` must be square, since its block-rows and block-columns are "
        "the nodes of one graph, got shape (4, 6): pass the square mask that it came from.",
    ),
    "clustering not square": (
        lambda: patterns.clustering(wide),
        ValueError,
        "clustering: `mask` must be square",
    ),
    "small world not square": (
        lambda: patterns.small_world(wide),
        ValueError,
        "small_world: `mask` must be square",
    ),
    "gap not square": (
        lambda: patterns.spectral_gap(wide),
        ValueError,
        "spectral_gap: `mask` must be square",
    ),
    "too sparse to compare": (
        lambda: patterns.small_world(square),
        ValueError,
        "small_world: `mask` must link a node to more than one other on average, got 0: so sparse "
        "a graph has no random one to be compared with; store more blocks.",
    ),
    "no masks": (
        lambda: patterns.mixing_profile([]),
        TypeError,
        "mixing_profile: `masks` must be a bool mask or a list of at least one, got []: pass the "
        "mask of each step.",
    ),
    "one bad mask": (
        lambda: patterns.mixing_profile([square, square.astype(int)]),
        TypeError,
        "mixing_profile: `masks[1]` must be bool, got int64",
    ),
    "shapes that do not follow": (
        lambda: patterns.mixing_profile([square, wide, square]),
        ValueError,
        "mixing_profile: step 2 ends in 6 block-columns, but step 3 starts from 4 block-rows: pass "
        "masks whose shapes follow each other; going round again, the first follows the last.",
    ),
    "going round": (
        lambda: patterns.mixing_profile([square, wide], steps=3),
        ValueError,
        "mixing_profile: step 2 ends in 6 block-columns, but step 3 starts from 4 block-rows",
    ),
    "repeated wide mask": (
        lambda: patterns.mixing_profile(wide, steps=2),
        ValueError,
        "mixing_profile: step 1 ends in 6 block-columns",
    ),
    "zero steps": (
        lambda: patterns.mixing_profile(square, steps=0),
        ValueError,
        "mixing_profile: `steps` must be a whole number of at least 1, got 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors(name):
    call, kind, text = CASES[name]
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_arrays_of_jax_are_masks():
    assert patterns.mixing_profile(jnp.asarray(square)) == [0.25]
    assert patterns.degree_balance(jnp.asarray(wide)).rows == (6, 6, 6)
