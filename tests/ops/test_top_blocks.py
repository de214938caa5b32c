"""Key blocks chosen at run time; and the past does not see the future, bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import masks
from bsjax.ops import _top_blocks
from tests.helpers import assert_close, assert_raises, normal
from tests.ops.attention import choices, oracle

pytestmark = pytest.mark.usefixtures("quick_compilations")
N, S, H, G, D = 2, 45, 4, 2, 8


def inputs(s=S):
    rng = np.random.default_rng(0)
    return [normal(rng, (N, s, heads, D)) for heads in (H, G, G)]


@pytest.mark.parametrize(("causal", "block"), [(True, (8, 4)), (False, (4, 16))])
def test_choices(causal, block):
    q, k, v = inputs()
    among = np.random.default_rng(2).random((H, S, -(-S // block[1]))) < 0.7
    p, chosen = jax.jit(
        lambda *a: bsjax.top_blocks(*a, block=block, count=3, causal=causal, among=among)
    )(q, k)
    want = choices(q, k, block[1], 3, causal=causal, among=among)
    r = -(-S // block[0])
    padded = np.pad(want, ((0, 0), (0, 0), (0, r * block[0] - S), (0, 0)))
    joined = padded.reshape(N, H, r, block[0], -1)
    np.testing.assert_array_equal(p.mask(), joined.any(3))
    for n, h in np.ndindex(N, H):
        for slot in range(int(p.nnz[n, h])):
            row, col = int(p.row[n, h, slot]), int(p.col[n, h, slot])
            np.testing.assert_array_equal(chosen[n, h, slot, :, 0], joined[n, h, row, :, col])
    if causal:
        bsjax.check(p)
        seen = np.repeat(want, block[1], -1)[..., :S] & np.tri(S, dtype=bool)
        got = bsjax.attention(q, k, v, p, mask=(chosen, masks.causal()), implementation="xla")
        assert_close(got, oracle(q, k, v, got, seen).out, D + S)


@pytest.mark.parametrize("causal", [True, False])
def test_some_queries_at_a_time_choose_the_same(causal, monkeypatch):
    """Bitwise, and whether `among` is an array or a function of queries."""
    q, k, _ = inputs()
    among = np.random.default_rng(2).random((H, S, 12)) < 0.7

    def chosen(among, rows):
        monkeypatch.setattr(_top_blocks, "ROWS", rows)
        found = jax.jit(
            lambda q, k: bsjax.top_blocks(q, k, block=(8, 4), count=3, causal=causal, among=among)
        )
        return found(q, k)

    want = chosen(among, 64)  # all at once
    asked = (lambda at: jnp.asarray(among).at[:, at].get(mode="clip")) if causal else among
    for a, b in zip(jax.tree.leaves(chosen(asked, 17)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_is_linear():
    """Some rows of scores are there at a time, and some numbers for each block of the grid; both
    together are a few percent of all scores."""
    length, c = 1 << 16, 1 << 10
    q = jax.ShapeDtypeStruct((length, 1, 4), jnp.float32)
    top_blocks = jax.jit(lambda q: bsjax.top_blocks(q, q, block=64, count=1))
    temporary = top_blocks.lower(q).compile().memory_analysis().temp_size_in_bytes
    rows, grid = (4 * size * c for size in (_top_blocks.ROWS, length // 64))
    assert temporary < 3 * (rows + grid) < 4 * length * c / 10


def attentions():
    static = masks.causal() & (masks.window(5) | masks.prefix(3))
    p, full = static.pattern((S, S), (8, 4))

    def by_mask(q, k, v):
        return bsjax.attention(q, k, v, p, mask=static, full=full, implementation="xla")

    def at_run_time(q, k, v):
        p, chosen = bsjax.top_blocks(q, k, block=(8, 4), count=3)
        mask = (chosen, masks.causal())
        return bsjax.attention(q, k, v, p, mask=mask, implementation="xla")

    return {"static": by_mask, "run time": at_run_time}


@pytest.mark.parametrize("which", ["static", "run time"])
def test_the_past_does_not_see_the_future(which):
    f = jax.jit(attentions()[which])
    q, k, v = inputs()
    before = np.asarray(f(q, k, v))
    changed = 0
    for t in range(0, S, 3):
        new = [a.at[:, t].add(3.0) for a in (q, k, v)]
        after = np.asarray(f(*new))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).all()
        changed += (after[:, t + 1 :] != before[:, t + 1 :]).any()
    assert changed > 10


@pytest.mark.slow
def test_choices_have_no_gradient():
    q, k, v = inputs()
    p, chosen = bsjax.top_blocks(q, k, block=(8, 4), count=3)
    f = attentions()["run time"]

    def fixed(q, k, v):
        return bsjax.attention(q, k, v, p, mask=(chosen, masks.causal()), implementation="xla")

    dout = normal(np.random.default_rng(1), q.shape)
    both = jax.jit(lambda *a: [jax.vjp(one, *a)[1](dout) for one in (f, fixed)])
    for a, b in zip(*both(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)  # the same arithmetic, in the same order


def test_capacity():
    q, k, _ = inputs()
    top_blocks = jax.jit(bsjax.top_blocks, static_argnames=("block", "count", "capacity"))
    whole, _ = top_blocks(q, k, block=(8, 4), count=12)
    np.testing.assert_array_equal(
        whole.mask(), np.broadcast_to(masks.causal().blocks((S, S), (8, 4))[0], (N, H, 6, 12))
    )
    p, chosen = top_blocks(q, k, block=(8, 4), count=3, capacity=60)
    assert p.row.shape == (N, H, 60)
    assert chosen.shape == (N, H, 60, 8, 1)
    p, _ = top_blocks(q, k, block=(8, 4), count=3, capacity=2)
    assert not np.asarray(p.nnz).any()
    with pytest.raises(ValueError, match="outside the grid"):
        bsjax.check(p)


def test_messages():
    q, k, _ = inputs()
    assert_raises(
        lambda: bsjax.top_blocks(q, k[:, :20], block=4, count=2),
        ValueError,
        "top_blocks: 45 queries and 20 keys: with `causal` a query is at the position of a key, so "
        "there must be as many keys: give causal=False for cross-attention.",
    )
    assert_raises(
        lambda: bsjax.top_blocks(q, k, block=4, count=2, among=np.ones((S, 5), bool)),
        ValueError,
        "top_blocks: `among` of shape (45, 5) must broadcast to (2, 4, 45, 12): the blocks of keys "
        "that each query of each head may choose.",
    )
    assert_raises(
        lambda: bsjax.top_blocks(q, k, block=4, count=2, among=np.ones((S, 12), int)),
        TypeError,
        "top_blocks: `among` must be a bool array, got int64: say what holds, for example "
        "`among != 0`.",
    )
    assert_raises(
        lambda: bsjax.top_blocks(q, k, block=4, count=0),
        ValueError,
        "top_blocks: `count` must be at least 1, got 0.",
    )
    assert_raises(
        lambda: bsjax.top_blocks(q.astype(jnp.int32), k, block=4, count=1),
        TypeError,
        "top_blocks: `q` must be floating point (float32, bfloat16, float16 or float64), got "
        "int32: cast it first, for example `q.astype(jnp.float32)`.",
    )
