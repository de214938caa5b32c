"""`bsjax.attention(..., implementation="mosaic")`, interpreted: what the door makes of it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bsjax
from bsjax import masks
from bsjax.ops import _mosaic
from bsjax.ops._mosaic_attention import packed
from tests.helpers import normal

pytestmark = pytest.mark.interpreted
bf16, f32 = jnp.bfloat16, jnp.float32
N, Q, S, H, G, D = 2, 100, 150, 2, 1, 64
BLOCK, GRID = (64, 64), (2, 3)


@pytest.fixture(autouse=True)
def few_workers(monkeypatch):
    monkeypatch.setattr(_mosaic, "multiprocessors", lambda: 2)


@contextlib.contextmanager
def interpreted():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def inputs(lead=(N,), dtype=bf16, heads=(H, G)):
    rng = np.random.default_rng(0)
    (h, g), shapes = heads, [(Q, H, D), (S, G, D), (S, G, D), (Q, H, D)]
    shapes = [(*lead, Q, h, D), *[(*lead, S, g, D)] * 2, (*lead, Q, h, D)]
    return [normal(rng, shape, dtype) for shape in shapes]


def gradients(implementation, *args, sinks=None, bias=None, **options):
    """y, dq, dk, dv, and the gradients of sinks and of an array `bias`."""
    *args, dy = args

    def f(q, k, v, sinks, numbers):
        given = {"bias": bias if callable(bias) else numbers, "sinks": sinks, **options}
        return bsjax.attention(q, k, v, implementation=implementation, **given)

    y, pull = jax.vjp(f, *args, sinks, None if callable(bias) else bias)
    return tuple(a for a in (y, *pull(dy)) if a is not None)


def close(got, *args, mapped=lambda run: run, **options):
    """What was computed in bfloat16, to what xla says in float32: weights, their gradients and
    results are rounded to 9 bits each, and `delta` is the sum of what was rounded."""
    run = mapped(functools.partial(gradients, "xla", **options))
    want = run(*(a.astype(f32) for a in args))
    assert len(got) == len(want)
    eps = float(jnp.finfo(bf16).eps)
    for g, w in zip(got, want, strict=True):
        off = np.asarray(g.astype(f32) - w)
        if w.shape[-2:] == (1, 1):  # a sum of what is zero for each query, but for roundings of y
            most = eps * np.linalg.norm(np.asarray(args[3].astype(f32) * want[0]))
            assert np.abs(off).max() <= most < np.abs(np.asarray(w)).max() / 4
            continue
        assert np.linalg.norm(off) <= eps * np.linalg.norm(np.asarray(w)), np.linalg.norm(off)
        assert np.abs(off).max() <= 4 * eps * np.abs(np.asarray(w)).max()


@pytest.mark.slow
def test_everything_at_once():
    """Ragged lengths, shared heads, two masks, lengths, segments, sinks, softcap; a spare slot."""
    mask = (masks.causal(50), lambda head, q, k: (q + k) % 7 != head)
    p = bsjax.BlockPattern.from_mask(np.array([[1, 1, 0], [1, 1, 1]], bool), BLOCK, capacity=6)
    options = {
        "p": p,
        "mask": mask,
        "full": jnp.zeros(6, bool),
        "sinks": jnp.array([0.5, -1.0]),
        "softcap": 10.0,
        "kv_lengths": jnp.array([S, 70]),
        "q_segment_ids": jnp.arange(Q) // 60,
        "kv_segment_ids": jnp.arange(S) // 75,
    }
    args = inputs()
    with interpreted():
        got = jax.block_until_ready(jax.jit(lambda *a: gradients("mosaic", *a, **options))(*args))
    close(got, *args, **options)


DIAGONAL = bsjax.BlockPattern.from_mask(np.array([[1, 0, 1], [1, 1, 0]], bool), BLOCK, capacity=5)


def test_masks_by_slot_numbers_by_slot_and_dropout():
    """Of each head and element, or of all; with flags; a spare slot. Lists sort the slots anew."""
    rng = np.random.default_rng(3)
    mask = tuple(
        jnp.asarray(rng.random(shape) < 0.7).at[..., 0, :, :].set(True)
        for shape in [(N, H, 5, 64, 1), (H, 5, 1, 64), (5, 64, 64)]
    )
    options = {
        "p": DIAGONAL,
        "mask": (*mask, masks.causal(70)),
        "full": jnp.array([True, False, False, False, False]),
        "bias": normal(rng, (H, 5, 1, 1)),
        "dropout_rate": 0.4,
        "key": jax.random.key(0),
        "softcap": 5.0,
        "kv_lengths": jnp.array([S, 60]),  # so that one has slots that nobody needs
    }
    args = inputs()
    with interpreted():
        got = jax.block_until_ready(jax.jit(lambda *a: gradients("mosaic", *a, **options))(*args))
    close(got, *args, **options)


@pytest.mark.slow
def test_blocks_chosen_at_run_time_with_a_bias():
    q, k, v, dy = [a[:, :Q] for a in inputs()]

    @jax.jit
    def run(q, k, v, dy):
        # exact means, or another block may be chosen
        p, chosen = bsjax.top_blocks(q.astype(f32), k.astype(f32), block=64, count=1)
        options = {"p": p, "mask": (chosen, masks.causal()), "bias": _alibi}
        return gradients("mosaic", q, k, v, dy, **options), options["p"], chosen

    with interpreted():
        got, p, chosen = jax.block_until_ready(run(q, k, v, dy))
    close(got, q, k, v, dy, p=p, mask=(chosen, masks.causal()), bias=_alibi)


def _alibi(head, q, k):
    return -jnp.exp2(-(head + 1).astype(f32)) * jnp.abs(q - k).astype(f32)


def test_packed():
    """Bit i of word j is column 32 j + i; one column for all sets all bits, or none."""
    mask = np.random.default_rng(0).random((1, 2, 3, 4, 64)) < 0.5
    words = np.asarray(packed(jnp.asarray(mask)))
    assert words.shape == (1, 2, 3, 2, 4)
    bits = words[:, :, :, :, :, None] >> np.arange(32) & 1
    np.testing.assert_array_equal(bits.swapaxes(3, 4).reshape(mask.shape), mask)
    alone = np.asarray(packed(jnp.asarray(mask[..., :1])))
    np.testing.assert_array_equal(alone, -mask[..., :1].swapaxes(3, 4).astype(np.int32))


def test_patterns_are_data_and_may_be_chosen_for_each_head():
    args, traces = inputs(lead=()), []

    @jax.jit
    def run(*args, p):
        traces.append(1)
        return gradients("mosaic", *args, p=p)

    for seed in range(2):
        mask = np.random.default_rng(seed).random((H, *GRID)) < 0.5
        each = [bsjax.BlockPattern.from_mask(one, BLOCK, capacity=6) for one in mask]
        p = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        with interpreted():
            got = jax.block_until_ready(run(*args, p=p))
        close(got, *args, p=p)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("by_slot", [False, True])
def test_vmap_and_shard_map(by_slot):
    args = inputs(lead=(2, 1))
    mask = masks.window(40)
    p, full = mask.pattern((Q, S), BLOCK)
    options = {"p": p, "mask": mask, "full": full}
    if by_slot:
        rng = np.random.default_rng(4)
        chosen = jnp.asarray(rng.random((5, 64, 1)) < 0.7)
        options = {"p": DIAGONAL, "mask": (chosen, masks.causal()), "bias": _alibi}
        options |= {"dropout_rate": 0.3, "key": jax.random.key(0)}
    run = functools.partial(gradients, "mosaic", **options)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"),) * 4, out_specs=P("d"))
    for mapped in (jax.vmap, sharded):  # under vmap both have the first element's dropout
        with interpreted():
            got = jax.block_until_ready(jax.jit(mapped(run))(*args))
        close(got, *args, mapped=mapped, **options)


@pytest.mark.parametrize("sinks", [None, jnp.array([0.5, -1.0])], ids=["no sinks", "sinks"])
def test_nothing_stored(sinks):
    """Zeros, and no gradient, without a kernel."""
    p = bsjax.BlockPattern.from_mask(np.zeros(GRID, bool), BLOCK)
    got = gradients("mosaic", *inputs(), p=p, sinks=sinks)
    assert not any(np.asarray(a).any() for a in got)


def refused(sentence, *, arrays=None, **options):
    q, k, v, _ = arrays or inputs()
    block = options.pop("block", BLOCK)
    grid = (-(-Q // block[0]), -(-S // block[1]))
    p = bsjax.BlockPattern.from_mask(np.ones(grid, bool), block)
    with pytest.raises(ValueError, match=sentence):
        bsjax.attention(q, k, v, p, implementation="mosaic", **options)


def test_reasons():
    cannot = 'attention: implementation="mosaic" cannot run here: '
    table, numbers = jnp.ones(S, bool), jnp.ones(S)
    refused(cannot + "there is no kernel for float32", arrays=inputs(dtype=f32))
    q, k, v, dy = inputs()
    refused(cannot + "kernels want values as wide as keys", arrays=[q, k, v[..., :32], dy])
    refused(cannot + "heads of 48: kernels know sizes", arrays=[a[..., :48] for a in inputs()])
    refused(cannot + "blocks of 32 x 64: each side must be a multiple of 64", block=(32, 64))
    one = (
        r"kernels have an array `bias` only as one number for each slot, \[..., h, e, 1, 1\], and "
    )
    refused(one + r"this one ends in \(6, 64, 1\): write it", bias=jnp.ones((6, 64, 1)))
    closes = (
        r"the function `bias` closes over 1 array\(s\), and kernels know only indices: write it "
    )
    refused(closes + "as arithmetic", bias=lambda head, q, k: numbers[k])
    refused("`bias` takes a step .* do not have .sin.", bias=lambda h, q, k: jnp.sin(q.astype(f32)))
    refused(r"`mask` closes over 1 array\(s\)", mask=lambda head, q, k: table[k])
    refused(
        "arithmetic on single elements.*sin", mask=lambda head, q, k: jnp.sin(q.astype(f32)) > 0
    )
    refused("arithmetic on single elements.*transpose", mask=lambda head, q, k: k <= q.T)


def test_without_a_gpu_it_says_so():
    p = bsjax.BlockPattern.from_mask(np.ones(GRID, bool), BLOCK)
    sentence = 'attention: implementation="mosaic" cannot run here: it needs a Hopper GPU'
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=sentence):
        bsjax.attention(q, k, v, p, implementation="mosaic")
