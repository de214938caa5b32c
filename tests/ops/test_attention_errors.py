"""What `attention` says about a wrong argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import assert_raises

Q = jnp.ones((2, 10, 4, 8))
K = jnp.ones((2, 12, 2, 8))
P = bsjax.BlockPattern.from_mask(np.ones((3, 3), bool), 4)
PLAIN = {"q": Q, "k": K, "v": K, "p": P}

MESSAGES = {
    "one head, no axis": (
        {"q": Q[0, :, 0]},
        ValueError,
        "attention: `q` must have axes (..., positions, heads, features), got shape (10, 8): add "
        "an axis for one head.",
    ),
    "dtypes": (
        {"k": K.astype(jnp.bfloat16)},
        TypeError,
        "attention: `q`, `k` and `v` must have one dtype, got float32 and bfloat16 for `k`: cast "
        "them before.",
    ),
    "integers": (
        {"v": K.astype(jnp.int32)},
        TypeError,
        "attention: `v` must be floating point (float32, bfloat16, float16 or float64), got "
        "int32: cast it first, for example `v.astype(jnp.float32)`.",
    ),
    "values of other keys": (
        {"v": K[:, :5]},
        ValueError,
        "attention: `k` of shape (2, 12, 2, 8) and `v` of shape (2, 5, 2, 8) must agree in all "
        "axes but the last: each key has one value.",
    ),
    "leading axes": (
        {"q": Q[:1]},
        ValueError,
        "attention: `q` of shape (1, 10, 4, 8) and `k` of shape (2, 12, 2, 8) must have the same "
        "leading axes: broadcast one of them, or use jax.vmap.",
    ),
    "features": (
        {"q": Q[..., :4]},
        ValueError,
        "attention: `q` of shape (2, 10, 4, 4) and `k` of shape (2, 12, 2, 8) must have equally "
        "many features, their last axis: scores are their products.",
    ),
    "heads": (
        {"q": Q[:, :, :3]},
        ValueError,
        "attention: 2 heads of keys do not divide 3 heads of queries: each head of keys serves a "
        "group of equally many heads of queries.",
    ),
    "no pattern": (
        {"p": np.ones((3, 3), bool)},
        TypeError,
        "attention: `p` must be a BlockPattern, got ndarray: build one with "
        "BlockPattern.from_mask(mask, block=...).",
    ),
    "a cast pattern": (
        {"p": jax.tree.map(lambda a: a.astype(jnp.bfloat16), P)},
        TypeError,
        "attention: `p.row` must be int32, got bfloat16. Coordinates are indices: leave them out "
        "when a model is cast or averaged.",
    ),
    "grid": (
        {"p": bsjax.BlockPattern.from_mask(np.ones((3, 4), bool), 4)},
        ValueError,
        "attention: 10 queries in blocks of 4 and 12 keys in blocks of 4 are a grid of (3, 3), but "
        "the pattern has (3, 4): build it for these lengths.",
    ),
    "patterns of other heads": (
        {"p": jax.tree.map(lambda a: jnp.stack([a] * 2), P)},
        ValueError,
        "attention: expected one pattern with leaves [e], one for each head with [4, e], or one "
        "for each batch element and head with [2, 4, e], got row (2, 9) and col (2, 9).",
    ),
    "order": (
        {"p": bsjax.BlockPattern(P.row[::-1], P.col, P.grid, P.block)},
        ValueError,
        "attention: slots must be ordered by block-column, then by block-row, but (2, 0) comes "
        "before (1, 0): build the pattern with BlockPattern.from_coords, which sorts and returns "
        "the order for the values.",
    ),
    "mask that is no bool": (
        {"mask": lambda h, q, k: q - k},
        TypeError,
        "attention: the function `mask` must return bool, got int32: compare or cast inside.",
    ),
    "mask of a wrong shape": (
        {"mask": lambda h, q, k: q[:3] < k},
        ValueError,
        "attention: the function `mask` of a head [], queries [4, 1] and keys [1, 4] must return "
        "what broadcasts to (4, 4), got shape (3, 4).",
    ),
    "mask over all positions": (
        {"mask": jnp.ones((10, 12), bool)},
        ValueError,
        "attention: `mask` of shape (10, 12) must broadcast to (..., h, e, br, bc) = "
        "(2, 4, 9, 4, 4), a block for each slot of the pattern, with at least the last three axes: "
        "for an array over all queries and keys, pass a function of indices that reads it.",
    ),
    "numbers as a mask": (
        {"mask": jnp.ones((9, 4, 4))},
        TypeError,
        "attention: `mask` must be a bool array or a function of (head, q_index, k_index), got "
        "float32: say what holds, for example `mask != 0`.",
    ),
    "full": (
        {"full": jnp.ones(3, bool)},
        ValueError,
        "attention: `full` of shape (3,) must have shape (9,), one flag for each slot of the "
        "pattern.",
    ),
    "integer bias": (
        {"bias": lambda h, q, k: q - k},
        TypeError,
        "attention: the function `bias` must return floating point, got int32: compare or cast "
        "inside.",
    ),
    "sinks": (
        {"sinks": jnp.ones(2)},
        ValueError,
        "attention: `sinks` of shape (2,) must have shape (4,), one logit for each head.",
    ),
    "a learned scale": (
        {"scale": jnp.float32(2)},
        TypeError,
        "attention: `scale` must be a number that is known when Python runs, got "
        f"{jnp.float32(2)!r}: to learn it, multiply q by it.",
    ),
    "softcap": (
        {"softcap": 0.0},
        ValueError,
        "attention: `softcap` must be finite and over 0, got 0.0.",
    ),
    "one side of the segments": (
        {"q_segment_ids": jnp.zeros((2, 10), jnp.int32)},
        ValueError,
        "attention: `kv_segment_ids` is missing: give the segments of both sides.",
    ),
    "segments": (
        {
            "q_segment_ids": jnp.zeros((2, 9), jnp.int32),
            "kv_segment_ids": jnp.zeros((2, 12), jnp.int32),
        },
        ValueError,
        "attention: `q_segment_ids` of shape (2, 9) must have shape (2, 10), or (10,) for all "
        "leading axes.",
    ),
    "lengths": (
        {"kv_lengths": jnp.ones(2)},
        TypeError,
        "attention: `kv_lengths` must hold whole numbers, got float32.",
    ),
    "dropout": (
        {"dropout_rate": 1.0, "key": jax.random.key(0)},
        ValueError,
        "attention: `dropout_rate` must be from 0 to below 1, got 1.0.",
    ),
    "no key": (
        {"dropout_rate": 0.1},
        ValueError,
        "attention: `dropout_rate` is over 0, which needs a `key`: pass jax.random.key(seed), "
        "split for every call, or dropout_rate=0.0 outside training.",
    ),
    "a seed": (
        {"dropout_rate": 0.1, "key": 3},
        TypeError,
        "attention: `key` must be one PRNG key, got 3: make one with jax.random.key(seed) and "
        "split it for every call.",
    ),
    "implementation": (
        {"implementation": "flash"},
        ValueError,
        'attention: `implementation` must be one of "auto", "xla", "mosaic", "dense", "reference", '
        "got 'flash'.",
    ),
    "kernel": (
        {"implementation": "mosaic"},
        ValueError,
        'attention: implementation="mosaic" cannot run here: there is no kernel for float32 (the '
        "tensor cores would round it to 11 bits): cast q, k and v to bfloat16 or float16. "
        'Use implementation="auto", which takes the fastest that can.',
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    changes, error, message = MESSAGES[name]
    args = PLAIN | changes
    assert_raises(lambda: bsjax.attention(**args), error, message)
