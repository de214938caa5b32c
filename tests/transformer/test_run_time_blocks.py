"""Layers whose key blocks are chosen at run time, against choices made query by query in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.linen
import bsjax.nnx
from bsjax import masks
from tests.helpers import assert_raises, normal, random_mask
from tests.ops.attention import choices, elements
from tests.transformer import oracle

RNG = np.random.default_rng(0)
N, LENGTH, WIDTH, HEADS, COUNT = 2, 29, 12, 4, 2
BLOCK, GRID = (8, 4), (4, 8)
X = normal(RNG, (N, LENGTH, WIDTH))
IDS = np.repeat([[0, 1, 2], [3, 4, 5]], [11, 7, 11], axis=1).astype(np.int32)
TERMS = WIDTH + 4 + LENGTH + 5 + 16  # projections, scores, keys and memory, the last projection
PER_HEAD = masks.per_head([masks.causal() & masks.window(17), masks.causal()] * 2)
STORED = random_mask(*GRID, 0.7)
GROUPED = {"rotary": True, "num_kv_heads": 2, "sinks": True}
# the arguments, what is stored, what else a query sees, and the segments of a call
CASES = {
    "grouped heads": (GROUPED | {"implementation": "xla"}, True, True, None),
    "masks and memory": (
        {"mask": PER_HEAD, "persistent": 5, "num_kv_heads": 2},
        PER_HEAD.blocks((LENGTH, LENGTH), BLOCK)[0],
        oracle.elements(PER_HEAD, HEADS, LENGTH),
        None,
    ),
    "pattern and segments": (
        {"pattern": bsjax.BlockPattern.from_mask(STORED, BLOCK), "block": None},
        STORED,
        True,
        IDS,
    ),
}


def make(**options):
    common = {"block": BLOCK, "top_blocks": COUNT, "bias_init": nnx.initializers.normal()}
    layer = bsjax.nnx.BlockAttention(HEADS, WIDTH, 16, rngs=nnx.Rngs(0), **(common | options))
    if layer.sinks is not None:
        layer.sinks[...] = normal(np.random.default_rng(1), (HEADS,))
    return layer


@nnx.jit
def full(layer, x):
    return layer(x)


@nnx.jit
def decode(layer, x):
    return layer(x, decode=True)


def chosen_by(layer, stored, ids):
    """`[n, h, q, c]`, in float64 throughout."""

    def projected(one, x):
        kernel, bias = (np.asarray(a[...], np.float64) for a in (one.kernel, one.bias))
        x = (np.asarray(x, np.float64) @ kernel + bias).reshape(N, LENGTH, -1, 4)
        if not layer.options.rotary:
            return x
        turn = np.exp(1j * np.arange(LENGTH)[:, None, None] / 10_000.0 ** (np.arange(2) / 2))
        z = (x[..., :2] + 1j * x[..., 2:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    among = np.repeat(np.broadcast_to(stored, (1, *np.shape(stored)[:-2], *GRID)), BLOCK[0], -2)
    among = among[..., :LENGTH, :]
    among = among if among.ndim == 4 else among[:, None]
    if ids is not None:
        keys = np.pad(ids, ((0, 0), (0, -LENGTH % BLOCK[1])), mode="edge").reshape(N, GRID[1], -1)
        same = (ids[:, :, None, None] == keys[:, None]).any(-1)
        among = among & same[:, None]
    return choices(projected(layer.query, X), projected(layer.key, X), BLOCK[1], COUNT, among=among)


@pytest.mark.parametrize("name", CASES)
def test_choices_of_each_query(name):
    """Results and gradients: those of dense attention to what was chosen."""
    options, stored, inside, ids = CASES[name]
    layer = make(**options)
    chosen = chosen_by(layer, stored, ids)
    assert chosen.sum(-1).max() == COUNT
    seen = elements(chosen, (1, BLOCK[1]), (LENGTH, LENGTH)) & np.tri(LENGTH, dtype=bool) & inside
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None])
    dy = normal(RNG, X.shape)

    @nnx.jit
    def both(layer, x):
        def of(f):
            def loss(layer, x):
                y = f(layer, x)
                return (y * dy).sum(), y

            return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

        segments = {} if ids is None else {"q_segment_ids": ids}
        ours = of(lambda layer, x: layer(x, **segments))
        return ours, of(functools.partial(oracle.attention, seen=seen))

    got, want = both(layer, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # as in test_layer.py; what cancels in the gradients of the keys' biases is of size one
        oracle.assert_close(a, b, 2 * TERMS + N * LENGTH, least=1.0)


def test_causal_means_causal_and_data_compiles_nothing():
    """Bitwise, through a whole layer, whatever the later positions make their block choose."""
    options = CASES["grouped heads"][0] | {"top_blocks": COUNT, "block": BLOCK, "qkv_features": 16}
    layer = bsjax.nnx.BlockTransformerLayer(
        WIDTH, HEADS, attention=options, mlp={"hidden_features": 8}, rngs=nnx.Rngs(0)
    )
    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(0)
        return layer(x)

    before, elsewhere = run(layer, X), 0
    for t in range(1, LENGTH, 3):
        after = run(layer, X.at[:, t].add(3))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert not np.array_equal(after[:, t], before[:, t])
        elsewhere += not np.array_equal(after[:, t + 1 :], before[:, t + 1 :])
    assert elsewhere > 5
    assert len(traces) == 1


def in_chunks(layer, sizes):
    layer.init_cache(X.shape)
    parts = jnp.split(X, np.cumsum(sizes), axis=1)[: len(sizes)]
    return jnp.concatenate([decode(layer, part) for part in parts], axis=1)


@pytest.mark.parametrize("name", ["grouped heads", "masks and memory"])
def test_decoding_is_the_full_pass(name):
    """In chunks of several blocks of queries, of part of one over a border, and one by one."""
    layer = make(**CASES[name][0])
    sizes = (13, 3, 3, 1, 3, *[1] * 6)
    oracle.assert_close(in_chunks(layer, sizes), full(layer, X), TERMS)
    keys = layer.cached_key[...][:, : 7 * BLOCK[1]].reshape(N, 7, BLOCK[1], 2, 4)
    oracle.assert_close(layer.cached_mean[...], np.asarray(keys, np.float64).mean(2), BLOCK[1])
    if name == "grouped heads":
        reads_only_what_is_chosen(layer)


def reads_only_what_is_chosen(layer):
    """NaN in a block of one head of keys shows only if one of its two heads of queries chose it."""

    def last():
        layer.cache_index[...] = jnp.int32(LENGTH - 1)
        return decode(layer, X[:, -1:])

    want, chosen = last(), chosen_by(layer, True, None)[:, :2, -1].any(1)
    assert chosen.sum(1).max() < GRID[1] - 2
    kept = layer.cached_key[...], layer.cached_value[...]
    for j in range(GRID[1] - 1):  # but for its own
        at = (slice(None), slice(j * BLOCK[1], (j + 1) * BLOCK[1]), 0)
        layer.cached_key[...], layer.cached_value[...] = (a.at[at].set(jnp.nan) for a in kept)
        got = last()
        np.testing.assert_array_equal(jnp.isnan(got).any((1, 2)), chosen[:, j])
        np.testing.assert_array_equal(got[~chosen[:, j]], want[~chosen[:, j]])


def test_linen():
    options = CASES["grouped heads"][0]
    ours = make(**options)
    common = {"qkv_features": 16, "block": BLOCK, "top_blocks": COUNT, **options}
    twin = bsjax.linen.BlockAttention(HEADS, decode=True, **common)
    variables = bsjax.linen.from_nnx(ours)
    want = in_chunks(ours, (13, 3))
    shapes = jax.eval_shape(twin.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes["cache"]) == jax.tree.map(
        jnp.shape, bsjax.linen.from_nnx(ours)["cache"]
    )
    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes["cache"])
    apply = jax.jit(functools.partial(twin.apply, mutable=["cache"]))
    for part in (slice(0, 13), slice(13, 16)):
        y, state = apply({**variables, "cache": cache}, X[:, part])
        cache = state["cache"]
        oracle.assert_close(y, want[:, part], TERMS)


@pytest.mark.slow
def test_leading_axes_vmap_and_bfloat16():
    layer = make(**CASES["grouped heads"][0])
    want = full(layer, X)
    oracle.assert_close(full(layer, X[0]), want[0], TERMS)
    oracle.assert_close(full(layer, X[None]), want[None], TERMS)
    over = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0)))
    oracle.assert_close(over(layer, X), want, TERMS)
    layer.init_cache(X[0].shape)
    for part in (slice(0, 13), slice(13, 14)):
        oracle.assert_close(decode(layer, X[0, part]), want[0, part], TERMS)
    low = make(**CASES["grouped heads"][0], dtype=jnp.bfloat16)
    y = full(low, X)
    assert y.dtype == jnp.bfloat16
    low.init_cache(X.shape)
    assert (low.cached_key.dtype, low.cached_mean.dtype) == (jnp.bfloat16, jnp.float32)
    got = decode(low, X[:, :13])
    # what is attended to, a projection and its bias, in both; they choose by the same numbers
    oracle.assert_close(got, y[:, :13], TERMS, roundings=2 * 3)


def test_errors():
    error = functools.partial(assert_raises, error=ValueError)
    error(
        lambda: make(top_blocks=0),
        message="BlockAttention: `top_blocks` must be at least 1, got 0.",
    )
    assert_raises(
        lambda: make(top_blocks=0.5),
        TypeError,
        "BlockAttention: `top_blocks` must be a whole number, got 0.5 of type float.",
    )
    error(
        lambda: nnx.eval_shape(lambda: make()(X, X[:, :5])),
        message="BlockAttention: `top_blocks` chooses between the blocks behind a query, and "
        "`inputs_k` have no positions among the queries: leave it out of attention to other "
        "inputs.",
    )
    error(
        lambda: nnx.eval_shape(lambda: make(**CASES["pattern and segments"][0])(X[:, :20])),
        message="BlockAttention: 20 positions in blocks of (8, 4) are a grid of (3, 5), but "
        "`pattern` has (4, 8): the inputs, or the cache of a decoder, must be as long as the "
        "sequences that the pattern is for.",
    )
