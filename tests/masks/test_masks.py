"""Element masks against their definitions, and what they say of blocks against their elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import masks
from bsjax.ops import _elementwise, _hoist
from tests.helpers import assert_raises

pytestmark = pytest.mark.usefixtures("quick_compilations")
S = 50
IDS = np.sort(np.random.default_rng(0).integers(0, 4, S))
Q, K = np.arange(S)[:, None], np.arange(S)[None]
BEFORE = Q >= K


def bigbird(r, c, window, ends, random, seed, block, causal=False):
    """One row of blocks after another, choosing from lists."""
    keys = np.random.default_rng(seed).integers(46337, size=(random, 4)).tolist()
    seen = np.zeros((r, c), bool)
    for i in range(r):
        middle, stop = i * c // r, i + 1 if causal else c
        for j in range(stop):
            edge = (i, j) if causal else (i, r - 1 - i, j, c - 1 - j)
            seen[i, j] = abs(middle - j) <= window // 2 or min(edge) < ends
        others = [j for j in range(stop) if not seen[i, j]]
        for part, rounds in enumerate(keys):
            begin, end = (len(others) * at // random for at in (part, part + 1))
            x = i
            for key in rounds:
                x = (x + key) ** 3 % 46337
            if begin < end:
                seen[i, others[begin + x * (end - begin) // 46337]] = True
    elements = np.repeat(np.repeat(seen, block, 0), block, 1)[:S, :S]
    return elements & BEFORE if causal else elements


MASKS = {
    "bigbird": (masks.bigbird(S, block=3, random=4), bigbird(17, 17, 3, 1, 4, 0, 3)),
    "bigbird alone": (
        masks.bigbird((S, S), block=4, window=1, ends=0, random=2, seed=3),
        bigbird(13, 13, 1, 0, 2, 3, 4),
    ),
    "bigbird of few blocks": (masks.bigbird(S, block=8, ends=2), bigbird(7, 7, 3, 2, 3, 0, 8)),
    "causal bigbird": (
        masks.bigbird(block=3, random=2, seed=1, causal=True),
        bigbird(17, 17, 3, 1, 2, 1, 3, causal=True),
    ),
    "bigbird before": (
        masks.bigbird(S, block=4) & masks.causal(),
        bigbird(13, 13, 3, 1, 3, 0, 4) & BEFORE,
    ),
    "causal": (masks.causal(), BEFORE),
    "causal with an offset": (masks.causal(3), K <= Q + 3),
    "causal with a negative offset": (masks.causal(-2), K <= Q - 2),
    "window": (masks.window(4, 3), (Q - K <= 4) & (K - Q <= 3)),
    "prefix": (masks.prefix(7), (K < 7) | (Q < 0)),
    "every": (masks.every(6), (Q - K) % 6 == 0),
    "chunks": (masks.chunks(9), Q // 9 == K // 9),
    "summary": (masks.summary(8, 2), (K % 8 >= 6) & (Q >= 0)),
    "summary before": (masks.summary(8, 3, 1), (K % 8 >= 2) & (K % 8 < 5) & (Q >= 0)),
    "documents": (masks.documents(IDS), IDS[:, None] == IDS),
    "mixed documents": (masks.documents(IDS * 7 % 4), IDS[:, None] == IDS),
    "streaming": (masks.streaming(6, 3), BEFORE & ((Q - K < 6) | (K < 3))),
    "prefix_lm": (masks.prefix_lm(10), BEFORE | (K < 10)),
    "longformer": (masks.longformer(4, 3), (abs(Q - K) <= 4) | (K < 3) | (Q < 3)),
    "dilated": (masks.dilated(9, 3), (abs(Q - K) <= 9) & ((Q - K) % 3 == 0)),
    "strided": (masks.strided(8), BEFORE & ((Q - K < 8) | ((Q - K) % 8 == 0))),
    "fixed": (masks.fixed(8, 2), BEFORE & ((Q // 8 == K // 8) | (K % 8 >= 6))),
    "not": (~masks.window(3, 3), abs(Q - K) > 3),
}
CAUTIOUS = {"mixed documents"}  # stores blocks in vain


@pytest.mark.parametrize("name", MASKS)
def test_elements(name):
    mask, want = MASKS[name]
    np.testing.assert_array_equal(np.broadcast_to(mask(0, Q, K), (S, S)), want)
    on_device = jax.jit(lambda q, k: mask(0, q, k))(jnp.asarray(Q), jnp.asarray(K))
    np.testing.assert_array_equal(np.broadcast_to(on_device, (S, S)), want)


@pytest.mark.parametrize("block", [1, 7, 8, (8, 16), (16, 3)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_blocks(name, block):
    mask, want = MASKS[name]
    br, bc = (block, block) if isinstance(block, int) else block
    some, full = mask.blocks((S, S), block)
    assert some.shape == full.shape == (-(-S // br), -(-S // bc))
    for i, j in np.ndindex(some.shape):
        tile = want[i * br : (i + 1) * br, j * bc : (j + 1) * bc]
        assert some[i, j] >= tile.any()
        assert full[i, j] <= tile.all()
        if name not in CAUTIOUS:
            assert some[i, j] == tile.any()
    if block == 1:
        np.testing.assert_array_equal(some, want)
        np.testing.assert_array_equal(full, want)


def test_full_blocks_are_found():
    for name in ("causal", "window", "prefix", "chunks", "documents", "not"):
        mask, want = MASKS[name]
        tiles = want.reshape(25, 2, 25, 2).all((1, 3))
        np.testing.assert_array_equal(mask.blocks((S, S), 2)[1], tiles)


def test_two_steps_of_strided_heads_reach_what_is_before():
    for length, stride in [(64, 8), (50, 7)]:
        heads = [
            masks.causal() & masks.window(stride - 1),
            masks.causal() & masks.every(stride),
        ]
        local, column = (one.blocks((length, length), 1)[0].astype(int) for one in heads)
        np.testing.assert_array_equal(local @ column > 0, np.tri(length, dtype=bool))
    local, column = (
        (masks.causal() & one).blocks((1024, 1024), 1)[0].mean()
        for one in (masks.window(31), masks.every(32))
    )
    assert (round(100 * local, 1), round(100 * column, 1)) == (3.1, 1.6)  # as in the paper


def test_draws_of_bigbird():
    """As many for each row of blocks, anywhere, others by the seed; by blocks of any side."""
    drawn = np.stack(
        [
            masks.bigbird(160, block=4, window=1, ends=0, random=4, seed=s).blocks((160, 160), 4)[0]
            for s in range(60)
        ]
    )
    np.testing.assert_array_equal(drawn.sum(-1), 5)
    drawn = drawn & ~np.eye(40, dtype=bool)
    often = drawn.sum((0, 1)) / (60 * 39)  # each of 39 others is drawn by one row in ten
    assert abs(often - 4 / 39).max() < 5 * (4 / 39 / (60 * 39)) ** 0.5
    assert len({one.tobytes() for one in drawn}) == 60
    each = drawn[0].reshape(40, -1)
    assert len({row.tobytes() for row in each}) == 40
    wide, full = masks.bigbird((96, 64), block=4, ends=0, seed=7).blocks((96, 64), 4)
    assert wide.shape == (24, 16)
    np.testing.assert_array_equal(wide, full)
    assert (wide.sum(-1) >= 5).all()
    later = masks.bigbird(block=4, causal=True).blocks((160, 160), 4)[0].sum(-1)
    np.testing.assert_array_equal(later, np.minimum(np.arange(40) + 1, 6))  # 2 + 1 + 3
    assert masks.bigbird(S)(0, 3, 49) is not None  # of plain numbers


def test_kernels_can_draw_the_blocks_of_bigbird():
    index = jnp.zeros((4, 4), jnp.int32)
    for mask in (masks.bigbird(S), masks.bigbird(causal=True)):
        function, _ = _hoist.hoisted(mask, jnp.int32(0), index, index)
        assert _elementwise.why_not("mask", function) is None


def test_pattern():
    mask = masks.streaming(6, 3)
    p, full = mask.pattern((S, 40), (8, 4), capacity=40)
    some, all_of = mask.blocks((S, 40), (8, 4))
    np.testing.assert_array_equal(p.mask(), some)
    row, col = np.asarray(p.row)[: p.nnz], np.asarray(p.col)[: p.nnz]
    np.testing.assert_array_equal(full[: p.nnz], all_of[row, col])
    assert (p.capacity, bool(np.asarray(full)[p.nnz :].any())) == (40, False)
    only = bsjax.patterns.bigbird(some.shape)
    np.testing.assert_array_equal(mask.pattern((S, 40), (8, 4), only=only)[0].mask(), some & only)


def test_per_head():
    mask = masks.per_head([masks.causal(), masks.window(2, 2) & masks.causal()])
    p, full = mask.pattern((S, S), 8)
    assert p.row.shape == full.shape == (2, 28)
    for h, one in enumerate([masks.causal(), masks.window(2)]):
        some, all_of = one.blocks((S, S), 8)
        np.testing.assert_array_equal(p.mask()[h], some)
        np.testing.assert_array_equal(mask(h, Q, K), one(h, Q, K))
        e = some.sum()
        row, col = np.asarray(p.row)[h, :e], np.asarray(p.col)[h, :e]
        np.testing.assert_array_equal(full[h, :e], all_of[row, col])
        assert not np.asarray(full[h, e:]).any()
    joined = mask | masks.prefix(1)
    assert joined.blocks((S, S), 8)[0].shape == (2, 7, 7)


def test_documents_may_be_traced():
    def made(ids):
        mask = masks.causal() & masks.documents(ids)
        p, full = mask.pattern((S, S), 8, capacity=28)
        return p.mask(), full.sum()

    want, full = made(IDS)
    got, traced = jax.jit(made)(jnp.asarray(IDS))
    np.testing.assert_array_equal(got, want)
    assert traced == full


def test_repr_and_messages():
    assert repr(masks.causal() & ~masks.prefix(2)) == "(causal() & ~prefix(2))"
    assert_raises(
        lambda: masks.causal() & (lambda h, q, k: k < q),
        TypeError,
        "bsjax.masks: `&` combines two masks, got function on the right: for a function of your "
        "own, pass `mask=(mask, function)` to bsjax.attention.",
    )
    assert_raises(
        lambda: masks.bigbird(S, window=2),
        ValueError,
        "bigbird: `window` must be odd, got 2: as many blocks before as after.",
    )
    for lengths, given in ((None, False), (S, True)):
        assert_raises(
            lambda lengths=lengths, given=given: masks.bigbird(lengths, causal=given),
            ValueError,
            "bigbird: give the numbers of queries and keys, `lengths`, or `causal=True`, which "
            f"needs none, got {lengths} and causal={given}: a mask for given lengths without what "
            "is behind a query is `bigbird(lengths) & causal()`.",
        )
    assert_raises(
        lambda: masks.bigbird(S).blocks((S, 9), 4),
        ValueError,
        "bigbird: the mask is for 50 queries and 50 keys, but the pattern has 50 and 9: make it "
        "with `lengths` of these.",
    )
    assert_raises(
        lambda: masks.bigbird(block=1, causal=True).blocks((50_000, 2), 4),
        ValueError,
        "bigbird: (50000, 2) positions are 50000 blocks of 1, and at most 46336 are supported: "
        "take larger blocks.",
    )
    assert_raises(
        lambda: masks.window(-1), ValueError, "window: `before` must be at least 0, got -1."
    )
    assert_raises(
        lambda: masks.causal(0.5),
        TypeError,
        "causal: `offset` must be a whole number, got 0.5 of type float.",
    )
    assert_raises(
        lambda: masks.summary(8, 3, 2),
        ValueError,
        "summary: group 2 of 3 columns does not fit into a chunk of 8: lower `at` or `count`.",
    )
    assert_raises(
        lambda: masks.documents(np.zeros((2, 8), int)),
        TypeError,
        "documents: `q_ids` must be whole numbers of shape (positions,), got int64 of shape "
        "(2, 8): use jax.vmap for several.",
    )
    assert_raises(
        lambda: masks.documents(np.zeros(8, int)).blocks((9, 9), 2),
        ValueError,
        "documents: 8 positions have a number, but the pattern has 9: give one for each.",
    )
    assert_raises(
        lambda: masks.causal().pattern((8, 8), 2, only=np.ones((3, 3), bool)),
        ValueError,
        "Mask.pattern: `only` must be bool of shape (4, 4), the grid of these lengths and blocks, "
        "got bool of shape (3, 3).",
    )
    assert_raises(
        lambda: masks.per_head([masks.causal(), None]),
        TypeError,
        "per_head: expected a sequence of masks, one for each head, got ['Mask', 'NoneType'].",
    )
    assert_raises(
        lambda: masks.per_head([masks.per_head([masks.causal()])]).blocks((8, 8), 2),
        TypeError,
        "per_head: one of the masks is itself one for each head.",
    )
