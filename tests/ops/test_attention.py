"""`attention` against NumPy in float64 and against JAX's dense attention: results and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import masks
from bsjax.ops._attention_dropout import seeds
from tests.helpers import assert_close, normal, slow
from tests.ops.attention import elements, kept, oracle

pytestmark = pytest.mark.usefixtures("quick_compilations")
N, Q, S, H, G, D, F = 2, 37, 50, 4, 2, 24, 20
BLOCK, GRID, CAPACITY = (8, 16), (5, 4), 16
TERMS = D + F + S  # products behind one number: of a score, of its gradient, of a sum over keys


def inputs(dtype=jnp.float32, n=N, q=Q, s=S, h=H, g=G, d=D, f=F):
    rng = np.random.default_rng(0)
    shapes = (n, q, h, d), (n, s, g, d), (n, s, g, f), (n, q, h, f)
    return [normal(rng, shape, dtype) for shape in shapes]


def block_mask(lead=(), density=0.5, seed=0):
    mask = np.random.default_rng(seed).random((*lead, *GRID)) < density
    mask[..., 2, :] = False  # queries with nothing to attend to
    mask[..., :, 1] = False  # keys that nobody sees
    return mask


def pattern(mask, capacity=CAPACITY, block=BLOCK):
    lead = mask.shape[:-2]
    one = [
        bsjax.BlockPattern.from_mask(m, block, capacity=capacity)
        for m in mask.reshape(-1, *mask.shape[-2:])
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a).reshape(*lead, -1), *one)
    return stacked if lead else one[0]


@functools.partial(jax.jit, static_argnames="implementation")
def plain(q, k, v, dout, p, implementation):
    out, pull = jax.vjp(
        lambda q, k, v: bsjax.attention(q, k, v, p, implementation=implementation), q, k, v
    )
    return out, *pull(dout)


@pytest.mark.parametrize(
    ("lead", "implementation"),
    [
        ((), "xla"),
        ((H,), "xla"),
        ((N, H), "xla"),
        ((N, H), "dense"),
        ((), "reference"),
        slow((H,), "reference"),
        slow((N, H), "reference"),
        slow((), "dense"),
        slow((H,), "dense"),
    ],
    ids=str,
)
def test_patterns(lead, implementation):
    """Empty rows and columns, spare slots, odd lengths, grouped heads, values of another width."""
    args = inputs()
    for seed, density in [(0, 0.5), (1, 0.9)] if lead == () else [(0, 0.5)]:
        mask = block_mask(lead, density, seed)
        seen = elements(mask, BLOCK, (Q, S))
        want = oracle(*args, seen)
        got = plain(*args, pattern(mask), implementation=implementation)
        for a, b in zip(got, want[:4], strict=True):
            assert_close(a, b, TERMS)
        assert not np.asarray(got[0][:, 16:24]).any()
        assert not np.asarray(got[1][:, 16:24]).any()


def everything(implementation):
    """Every argument at once, for all gradients."""

    def run(q, k, v, dout, bias, table, sinks, ids, lengths, p, full, key, by_table):
        def f(q, k, v, bias, table, sinks):
            known = bias
            if by_table:
                known = lambda h, q, k: table[h, q - k + S]  # noqa: E731
            return bsjax.attention(
                q, k, v, p,
                mask=(masks.causal(20), lambda h, q, k: (k + h) % 5 != 0),
                full=full,
                bias=known,
                sinks=sinks,
                scale=0.3,
                softcap=1.5,
                q_segment_ids=ids[:, :Q],
                kv_segment_ids=ids,
                kv_lengths=lengths,
                dropout_rate=0.25,
                key=key,
                implementation=implementation,
            )  # fmt: skip

        out, pull = jax.vjp(f, q, k, v, bias, table, sinks)
        return out, *pull(dout)

    return jax.jit(run, static_argnums=12)


@pytest.mark.parametrize(
    ("by_table", "implementation"),
    [
        (False, "xla"),
        (True, "xla"),
        slow(False, "reference"),
        slow(True, "reference"),
        slow(False, "dense"),
        slow(True, "dense"),
    ],
    ids=str,
)
def test_every_argument_at_once(by_table, implementation):
    q, k, v, dout = inputs()
    rng = np.random.default_rng(1)
    bias = normal(rng, (H, CAPACITY, 8, 1))
    table, sinks = normal(rng, (H, Q + S)), normal(rng, (H,))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (N, S))))
    lengths = jnp.asarray([S - 9, S])
    mask = block_mask(seed=3, density=0.8)
    p, key = pattern(mask), jax.random.key(3)
    t, s = np.arange(Q)[:, None], np.arange(S)
    inside = (s <= t + 20) & ((s + np.arange(H)[:, None, None]) % 5 != 0)
    full = np.zeros(CAPACITY, bool)
    full[1] = True  # whatever the mask says there
    row, col = np.asarray(p.row), np.asarray(p.col)
    flagged = np.zeros((*GRID,), bool)
    flagged[row[1], col[1]] = True
    seen = elements(mask, BLOCK, (Q, S)) & (inside | elements(flagged, BLOCK, (Q, S)))
    seen = seen & (np.asarray(ids)[:, None, :Q, None] == np.asarray(ids)[:, None, None])
    seen = seen & (s < np.asarray(lengths)[:, None, None, None])
    if by_table:
        dense = np.asarray(table)[:, t - s + S]
    else:
        blocks = np.zeros((H, GRID[0] + 1, GRID[1] + 1, *BLOCK))
        blocks[:, row, col] = np.asarray(bias)
        dense = blocks[:, :-1, :-1].swapaxes(2, 3).reshape(H, 40, 64)[:, :Q, :S]
    drop = kept(seeds(key, N, H), Q, S, 0.25)
    want = oracle(q, k, v, dout, seen, bias=dense, sinks=sinks, scale=0.3, softcap=1.5, kept=drop)
    if by_table:
        dtable = np.zeros(table.shape)
        for h in range(H):
            np.add.at(dtable[h], t - s + S, want.bias.sum(0)[h])
        dbias = np.zeros(bias.shape)
    else:
        padded = np.pad(want.bias.sum(0), ((0, 0), (0, 40 - Q), (0, 64 - S)))
        padded = padded.reshape(H, 5, 8, 4, 16).swapaxes(2, 3)
        padded = np.pad(padded, ((0, 0), (0, 1), (0, 1), (0, 0), (0, 0)))
        dbias = padded[:, row, col].sum(-1, keepdims=True)
        dtable = np.zeros(table.shape)
    args = (q, k, v, dout, bias, table, sinks, ids, lengths, p, jnp.asarray(full), key, by_table)
    got = everything(implementation)(*args)
    for a, b in zip(got[:4], want[:4], strict=True):
        assert_close(a, b, TERMS * 4)
    for a, b in zip(got[4:], (dbias, dtable, want.sinks), strict=True):
        assert_close(a, b, TERMS * N * Q)  # sums over the queries of all batch elements


@pytest.mark.parametrize(
    ("dtype", "d"),
    [
        (jnp.bfloat16, 64),
        slow(jnp.float32, 256),
        slow(jnp.float16, 40),
        slow(jnp.float32, 1),
        slow(jnp.float32, 33),
        slow(jnp.bfloat16, 256),
    ],
    ids=str,
)
def test_jax_attention_with_the_element_mask(dtype, d):
    """Of float32 operands: ours rounds once at the end, for every dtype."""
    q, k, v, dout = inputs(dtype, n=1, q=21, s=21, h=2, g=1, d=d, f=d)
    mask = masks.strided(4)
    p, full = mask.pattern((21, 21), 8)
    seen = mask(0, jnp.arange(21)[:, None], jnp.arange(21)[None])

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])

    def ours(q, k, v):
        return bsjax.attention(q, k, v, p, mask=mask, full=full, implementation="xla")

    def both(q, k, v, dout):
        got, pull = jax.vjp(ours, q, k, v)
        wide = [a.astype(jnp.float32) for a in (q, k, v, dout)]
        with jax.default_matmul_precision("highest"):
            want, back = jax.vjp(dense, *wide[:3])
        return (got, *pull(dout)), (want, *back(wide[3]))

    for a, b in zip(*jax.jit(both)(q, k, v, dout), strict=True):
        assert a.dtype == dtype
        assert_close(a, b, 2 * (2 * d + 21))


def test_float64():
    with jax.enable_x64(True):
        q, k, v, dout = inputs(jnp.float64, n=1, q=10, s=10, h=1, g=1, d=4, f=4)
        p = bsjax.BlockPattern.from_mask(np.tri(5, dtype=bool), 2)
        got = plain(q, k, v, dout, p, implementation="xla")
        want = oracle(q, k, v, dout, elements(np.tri(5, dtype=bool), (2, 2), (10, 10)))
        for a, b in zip(got, want[:4], strict=True):
            assert a.dtype == jnp.float64
            assert_close(a, b, 20)


@pytest.mark.parametrize("implementation", ["xla", "reference", slow("dense")])
def test_nothing_to_attend_to(implementation):
    """No stored block, or a mask that is never true: zeros, and zero gradients; sinks too."""
    args = *inputs(n=1, q=8, s=8, h=1, g=1, d=4, f=4), jnp.ones(1)

    @jax.jit
    def f(q, k, v, dout, sinks, p, least):
        def attend(q, k, v, sinks):
            mask = lambda h, q, k: q + k >= least  # noqa: E731
            return bsjax.attention(
                q, k, v, p, mask=mask, sinks=sinks, implementation=implementation
            )

        out, pull = jax.vjp(attend, q, k, v, sinks)
        return out, *pull(dout)

    stored = bsjax.BlockPattern.from_mask(np.ones((2, 2), bool), 4)
    none = bsjax.BlockPattern.from_mask(np.zeros((2, 2), bool), 4, capacity=4)
    for p, least in [(none, 0), (stored, 100)]:
        for a in f(*args, p, least):
            assert not np.asarray(a).any()
    assert all(np.asarray(a).any() for a in f(*args, stored, 0))


def test_empty_arrays():
    p = bsjax.BlockPattern.from_mask(np.zeros((0, 2), bool), 4)
    k = jnp.ones((3, 8, 2, 4))
    assert bsjax.attention(jnp.ones((3, 0, 2, 4)), k, k, p, implementation="xla").shape[1] == 0
    p = bsjax.BlockPattern.from_mask(np.zeros((2, 0), bool), 4)
    out = bsjax.attention(k, k[:, :0], k[:, :0], p, implementation="xla")
    assert out.shape == k.shape
    assert not np.asarray(out).any()
    p = bsjax.BlockPattern.from_mask(np.ones((2, 2), bool), 4)
    assert bsjax.attention(k[:0], k[:0], k[:0], p, implementation="xla").shape == (0, 8, 2, 4)


def test_spare_slots_and_unseen_keys_are_not_read():
    q, k, v, dout = inputs()
    mask = block_mask()
    v = v.at[:, 16:32].set(jnp.nan)  # nobody sees these
    k = k.at[:, 16:32].set(jnp.nan)
    out, dq, dk, dv = plain(q, k, v, dout, pattern(mask), implementation="xla")
    for a in (out, dq, dk, dv):
        assert np.isfinite(np.asarray(a)).all()


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, dout = inputs()
    mask = block_mask()
    got = plain(200 * q, k, v, dout, pattern(mask), implementation="xla")
    want = oracle(200 * q, k, v, dout, elements(mask, BLOCK, (Q, S)))
    for a in got:
        assert np.isfinite(np.asarray(a)).all()
    assert_close(got[0], want.out, 200 * D)  # products behind a score, each 200 times as large


def test_dropout_depends_on_the_place_and_not_on_the_slot():
    q, k, v, _ = inputs()
    key = jax.random.key(0)
    f = jax.jit(
        lambda p: bsjax.attention(q, k, v, p, dropout_rate=0.5, key=key, implementation="xla")
    )
    mask = block_mask()
    more = mask.copy()
    more[4] = True  # later rows have other blocks, and all slots another number
    a, b = f(pattern(mask)), f(pattern(more))
    np.testing.assert_array_equal(a[:, :32], b[:, :32])
    assert (np.asarray(a[:, 32:]) != np.asarray(b[:, 32:])).any()
