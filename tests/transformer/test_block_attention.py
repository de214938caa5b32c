"""`bsjax.nnx.BlockAttention` is attention, with the weights and the mask that it says."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bsjax
import bsjax.nnx
from bsjax import masks
from tests.helpers import assert_raises, normal, random_mask
from tests.ops.attention import oracle as in_numpy
from tests.transformer import oracle

RNG = np.random.default_rng(0)
N, LENGTH, KEYS, WIDTH, HEADS, BLOCK = 2, 21, 13, 20, 4, 8
X, ENCODED = (normal(RNG, (N, size, WIDTH)) for size in (LENGTH, KEYS))
PER_HEAD = masks.per_head([masks.causal() & masks.window(2), masks.causal() & masks.every(4)] * 2)
STREAMING = masks.streaming(5, 2)
TERMS = WIDTH + 8 + LENGTH + 10 + 32  # projections, scores, keys and memory, the last projection


def make(**options):
    # "dense" compiles fastest; what others compute is tested where they are
    common = {"block": BLOCK, "implementation": "dense", "bias_init": nnx.initializers.normal()}
    options = common | options
    layer = bsjax.nnx.BlockAttention(HEADS, WIDTH, 32, rngs=nnx.Rngs(0), **options)
    if layer.sinks is not None:
        layer.sinks[...] = normal(RNG, (HEADS,))
    return layer


def compare(layer, seen, *args, positions=None, dense=0.0, **options):
    """The result; gradients are compared for whole layers (test_layer.py). `dense` is the bias."""

    @nnx.jit
    def both(layer, *args):
        want = oracle.attention(layer, *args, seen=seen, positions=positions, bias=dense)
        return layer(*args, input_positions=positions, **options), want

    oracle.assert_close(*both(layer, X, *args), TERMS)


def test_rotary_grouped_heads_and_sinks():
    layer = make(mask=STREAMING, rotary=True, rotary_base=100.0, num_kv_heads=2, sinks=True)
    positions = np.arange(LENGTH) ** 2 % 50
    compare(layer, oracle.elements(STREAMING, HEADS, LENGTH), positions=positions)


def test_a_softcap_and_dropout_alone():
    layer = make(mask=STREAMING, softcap=0.5, dropout_rate=0.5)
    q, k, v = (
        oracle.linear(one, X).reshape(N, LENGTH, HEADS, 8)
        for one in (layer.query, layer.key, layer.value)
    )
    seen = oracle.elements(STREAMING, HEADS, LENGTH)
    y = in_numpy(q, k, v, q, seen, softcap=0.5).out.reshape(N, LENGTH, 32)
    want = oracle.linear(layer.out, jnp.asarray(y, jnp.float32))
    run = nnx.jit(lambda layer, off: layer(X, deterministic=off), static_argnums=1)
    oracle.assert_close(run(layer, True), want, TERMS)
    first, second = run(layer, False), run(layer, False)
    assert float(jnp.abs(first - want).max()) > 0.01
    assert not np.array_equal(first, second)


def test_memory_and_a_mask_for_each_head():
    """Ten persistent keys, which blocks of eight do not divide, and a bias by distance."""
    layer = make(mask=PER_HEAD, persistent=10, num_kv_heads=2)
    table = normal(RNG, (HEADS, LENGTH))
    dense = table[:, jnp.maximum(jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None], 0)]
    bias = lambda head, q, k: table[head, jnp.maximum(q - k, 0)]  # noqa: E731
    compare(layer, oracle.elements(PER_HEAD, HEADS, LENGTH), dense=dense[None], bias=bias)


def test_cross_attention_to_keys_of_unequal_number():
    lengths = jnp.array([KEYS, 6])
    layer = make(
        persistent=3, projection_pattern={"value": random_mask(5, 8, 0.7)}, projection_block=4
    )
    assert layer.value.values.shape[1:] == (4, 4)
    seen = jnp.arange(KEYS)[None, None, None] < lengths[:, None, None, None]
    compare(layer, seen, ENCODED, kv_lengths=lengths)


def test_an_explicit_pattern_segments_and_any_function():
    stored = random_mask(3, 6, 0.6)
    p = bsjax.BlockPattern.from_mask(stored, (8, 4), capacity=14)
    mask = lambda head, q, k: (k + head) % 3 != q % 3  # noqa: E731
    options = {"projection_pattern": {"out": np.ones((4, 5), bool)}, "projection_block": (8, 4)}
    layer = make(mask=mask, pattern=p, block=None, **options)
    ids = jnp.arange(LENGTH) // 12
    blocks = np.repeat(np.repeat(stored, 8, 0), 4, 1)[:LENGTH, :LENGTH]
    inside = blocks & (ids[:, None] == ids[None])
    seen = oracle.elements(mask, HEADS, LENGTH) & inside[None, None]
    compare(layer, seen, q_segment_ids=ids)


def test_dtypes_dropout_and_sampling():
    options = {"dropout_rate": 0.5, "normalize_qk": True, "softcap": 3.0}
    layer = make(mask=STREAMING, sampling={"fraction": 0.5}, **options)
    run = nnx.jit(lambda layer, x, **how: layer(x, **how), static_argnames=("deterministic",))
    exact = run(layer, X, deterministic=True)
    first, second = (run(layer, X, deterministic=False) for _ in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, exact)
    np.testing.assert_array_equal(run(layer, X, deterministic=True), exact)
    low = make(mask=STREAMING, dtype=jnp.bfloat16, **options)
    nnx.update(low, nnx.state(layer, nnx.Param))
    assert low.query.kernel.dtype == jnp.float32
    with jax.numpy_dtype_promotion("standard"):  # norms of Flax promote
        y = run(low, X, deterministic=True)
    assert y.dtype == jnp.bfloat16
    # inputs, weights, a projection, its bias, a norm; what is attended to, and a projection again
    oracle.assert_close(y, exact, TERMS, roundings=9)


def test_values_of_other_inputs():
    layer = make()

    @nnx.jit
    def three(layer, x):
        return layer(x), layer(x, x, x), layer(x, x, 2 * x)

    one, same, other = three(layer, X)
    np.testing.assert_array_equal(same, one)
    assert not np.array_equal(other, one)


def test_errors():
    def error(call, message):
        assert_raises(lambda: nnx.eval_shape(call), ValueError, message)

    error(
        lambda: bsjax.nnx.BlockAttention(3, 20, rngs=nnx.Rngs(0)),
        message="BlockAttention: `num_heads=3` does not divide qkv_features=20: every head has "
        "equally many features.",
    )
    error(
        lambda: make(num_kv_heads=3),
        message="BlockAttention: `num_kv_heads=3` does not divide num_heads=4: each head of keys "
        "serves a group of equally many heads of queries.",
    )
    error(
        lambda: bsjax.nnx.BlockAttention(4, 20, rotary=True, rngs=nnx.Rngs(0)),
        message="BlockAttention: `rotary` turns pairs of features, but a head has 5: choose an "
        "even number for each head.",
    )
    error(
        lambda: make(persistent=-1),
        message="BlockAttention: `persistent` must be at least 0, got -1.",
    )
    assert_raises(
        lambda: make(mask=lambda head, q, k: k <= q),
        TypeError,
        "BlockAttention: `mask` is a function, which does not say what blocks it needs: take one "
        "of bsjax.masks, or give a `pattern` too.",
    )
    assert_raises(
        lambda: make()(X, bias=jnp.ones((LENGTH, LENGTH))),
        TypeError,
        "BlockAttention: `bias` must be a function of (head, q_index, k_index), got ArrayImpl: "
        "blocks are numbered inside the layer, so read an array in a function, for example `lambda "
        "head, q, k: table[head, q - k]`.",
    )
    error(
        lambda: make(projection_pattern={"keys": random_mask(5, 8)}, projection_block=4),
        message="BlockAttention: `projection_pattern` names ['keys'], but the projections are "
        "['query', 'key', 'value', 'out'].",
    )
    error(
        lambda: make()(X, None, X),
        message="BlockAttention: `inputs_v` is given but `inputs_k` is not: for keys and values of "
        "one input pass it as `inputs_k`.",
    )
    error(
        lambda: make(persistent=2)(X, q_segment_ids=jnp.zeros(LENGTH, jnp.int32)),
        message="BlockAttention: segments do not go with `persistent` memory, which has none: pack "
        "documents of equal layout with `mask=bsjax.masks.documents(ids)`.",
    )
    error(
        lambda: make(dropout_rate=0.1)(X),
        message="BlockAttention: `deterministic` is None here and in the layer, which has dropout: "
        "call it with deterministic=False to drop, or deterministic=True.",
    )
    error(
        lambda: make(dropout_rate=0.1, keep_rngs=False)(X, deterministic=False),
        message="BlockAttention: there is no stream to drop with, since the layer was made with "
        "keep_rngs=False: call it with rngs=.",
    )
    several = jax.tree.map(
        lambda a: a[None, None], bsjax.BlockPattern.from_mask(random_mask(3, 3), 8)
    )
    error(
        lambda: make(pattern=several, block=None),
        message=f"BlockAttention: `pattern` has leaves of shape {several.row.shape}: give one "
        "pattern, with leaves [e], or one for each head, with leaves [h, e].",
    )


def test_causal_means_causal():
    """Bitwise, through a whole layer."""
    layer = bsjax.nnx.BlockTransformerLayer(
        WIDTH,
        HEADS,
        attention={"mask": masks.strided(4), "block": BLOCK, "persistent": 3},
        mlp={"hidden_features": 24, "gated": True},
        rngs=nnx.Rngs(0),
    )
    run = nnx.jit(lambda layer, x: layer(x))
    y, later = run(layer, X), run(layer, X.at[:, 10].add(1))
    np.testing.assert_array_equal(later[:, :10], y[:, :10])
    assert not np.array_equal(later[:, 10], y[:, 10])
