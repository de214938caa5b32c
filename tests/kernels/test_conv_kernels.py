"""Kernels of convolutions in the interpreter, against `lax` with the dense kernel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _mosaic
from bsjax.ops._choose import Problem, fastest
from pallas_kernels import conv as kernels
from pallas_kernels.conv_config import for_conv
from pallas_kernels.windows import Axis, Pairs, reads
from tests.helpers import assert_close, normal, slow
from tests.kernels.test_interpreted import interpreted
from tests.ops.conv import case, ours, theirs

bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32
MASK = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0]], bool)  # with an empty row and column


@pytest.fixture(autouse=True)
def few_workers(monkeypatch):
    monkeypatch.setattr(_mosaic, "multiprocessors", lambda: 2)


def terms(one):
    """The most products in one number of y, dx or dvalues."""
    mask = np.zeros(one.p.grid, int)
    np.add.at(mask, (one.p.row[: one.p.nnz], one.p.col[: one.p.nnz]), 1)
    br, bc = one.p.block
    taps = one.values[0].size // (br * bc)
    pixels = one.x.size // one.x.shape[-1]
    return max(pixels, taps * br * mask.sum(0).max(), taps * bc * mask.sum(1).max())


def conforms(space, window, dtype=bf16, block=64, **options):
    one = case(space, window, dtype=dtype, block=block, **{"mask": MASK, **options})
    with interpreted():
        got = jax.block_until_ready(ours(one, "mosaic"))
    for g, w in zip(got, theirs(one), strict=True):
        assert g.dtype == dtype
        assert_close(g, w, terms(one))
    assert not np.any(np.asarray(got[2][one.p.nnz :]))  # spare slots receive zeros


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("space", "window", "options"),
    [
        ((2, 3), (3, 3), {"mask": MASK[::2, :1]}),
        ((3, 3), (3, 2), {"strides": 2, "dtype": f16, "block": (32, 64), "lead": ()}),
        slow((2, 5), (3, 3), {}),
        slow((3, 5), (3, 3), {"strides": (2, 1), "padding": ((2, 0), (0, 1)), "dilation": (1, 2)}),
        slow((4, 3), (3, 3), {"strides": 2, "transpose": True}),
        slow((3, 2), (3, 3), {"transpose": True, "padding": "VALID", "block": (64, 32)}),
        slow((7,), (3,), {"padding": "VALID", "dilation": 2, "block": 128, "lead": (2, 2)}),
        slow((2, 3, 2), (2, 2, 2), {"block": 16, "strides": (1, 2, 1)}),
        slow((3, 3), (3, 3), {"lead": (150,), "block": (16, 128), "mask": MASK[:, :1]}),
        slow((3, 3), (2, 2), {"block": (256, 64), "mask": MASK[:2]}),
        slow((2, 2), (1, 1), {"strides": 2, "transpose": True}),
        slow((2, 2), (5, 5), {"padding": 3}),
    ],
)
def test_y_and_both_gradients(space, window, options):
    conforms(space, window, **options)


@pytest.mark.interpreted
@pytest.mark.slow
def test_pixels_on_their_own(monkeypatch):
    """Where neighbours could share what they read."""
    monkeypatch.setattr(kernels, "strips", lambda *_: {})
    jax.clear_caches()
    conforms((3, 4), (3, 3))


@pytest.mark.interpreted
@pytest.mark.slow
@pytest.mark.parametrize("pixels", [2, 4, 8])
@pytest.mark.parametrize("transpose", [False, True])
def test_strips_of_pixels(pixels, transpose, monkeypatch):
    """The last strip of a line has fewer, and windows read beyond both ends of it."""
    every = kernels.strips

    def only(*args):
        return {k: v for k, v in every(*args).items() if k == pixels}

    monkeypatch.setattr(kernels, "strips", only)
    jax.clear_caches()
    conforms((1, 9), (2, 3), transpose=transpose, mask=MASK[::2, :1], dilation=(1, 2))


@pytest.mark.interpreted
@pytest.mark.slow
def test_bands_of_pixels(monkeypatch):
    """More pixels than a band, the last of which is shorter."""
    whole = kernels._place
    monkeypatch.setattr(
        kernels, "_place", lambda tile, pixels, blocks, _: whole(tile, pixels, blocks, 4)
    )
    jax.clear_caches()
    conforms((3, 5), (3, 1))


@pytest.mark.parametrize(("pixels", "band"), [(12, 5), (4, 8)])
def test_every_tile_has_a_place(pixels, band):
    images, blocks = 2, 3
    tiles = jnp.arange(images * pixels * blocks, dtype=jnp.int32)
    places = jax.vmap(lambda t: kernels._place(t, pixels, blocks, band))(tiles)
    found = {tuple(map(int, one)) for one in zip(*places, strict=True)}
    every = np.ndindex(images, pixels, blocks)
    assert found == set(every)


@pytest.mark.parametrize("block", list(itertools.product((16, 32, 64, 128, 256), repeat=2)))
@pytest.mark.parametrize("strides", [1, 2])
def test_steps_of_a_strip(block, strides):
    """No deeper than values are wide: a swizzle of both operands holds all of a row."""
    strips = kernels.strips(Axis(source=9, target=9 // strides, window=3, stride=strides), False)
    chosen = for_conv(64, block, 2, strips=strips)
    assert chosen.pixels == 1 or chosen.depth <= min(block)


AXES = [
    Axis(source=7, target=7, window=3, low=1),
    Axis(source=8, target=4, window=3, stride=2, low=0),
    Axis(source=9, target=3, window=4, stride=3, dilation=2, low=2),
    Axis(source=1, target=1, window=5, low=2),
    Axis(source=5, target=7, window=2, low=2, dilation=3),
]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("transpose", [False, True])
def test_taps_of_a_pixel(axis, transpose):
    """Against the definition, for every pixel and tap."""
    want = [
        (q, t, axis.stride * q + axis.dilation * t - axis.low)
        for q in range(axis.target)
        for t in range(axis.window)
    ]
    want = {(q, t, p) for q, t, p in want if p in range(axis.source)}
    found = set()
    for out, (count, *pairs) in enumerate(np.asarray(reads(axis, transpose))):
        for tap, into in np.reshape(pairs, (-1, 2))[:count]:
            found.add((int(into), int(tap), out) if transpose else (out, int(tap), int(into)))
    assert found == want


def test_pairs_of_pixels():
    first, second = AXES[1], AXES[2]
    pairs = Pairs((first, second))
    table = np.asarray(pairs.table())
    found = {
        (tap, *map(int, pairs.at(table, tap, pair)))
        for tap in range(pairs.taps)
        for pair in range(pairs.counts[tap])
    }
    want = {
        (t * second.window + u, p * second.source + r, q * second.target + s)
        for q, t, p in first.triples()
        for s, u, r in second.triples()
    }
    assert found == want
    assert sum(pairs.counts) == len(want)


EPILOGUES = [
    ("relu", True, True, bf16),
    ("gelu", False, True, f16),
    (None, True, True, bf16),
    ("silu", True, False, bf16),
    ("tanh", False, False, bf16),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("epilogue", [EPILOGUES[0], *(slow(one) for one in EPILOGUES[1:])])
def test_epilogues(epilogue):
    with interpreted():
        check_epilogue(*epilogue)


def check_epilogue(activation, biased, added, dtype):
    """Rounded once, and gradients, against the reference in float32."""
    one = case((2, 2), (2, 3), block=32, dtype=dtype, mask=MASK[:, ::2])
    rng = np.random.default_rng(2)
    bias = normal(rng, (64,), dtype) if biased else None
    shape = (*one.x.shape[:-1], 64)
    residual, dy = (normal(rng, shape, dtype) for _ in range(2))

    def run(name, x, values, bias, residual, dy):
        def f(*args):
            x, values, bias, residual = args
            options = {"activation": activation, "implementation": name}
            options |= {"bias": bias, "residual": residual if added else None}
            return bsjax.conv(x, values, one.p, **options)

        y, pull = jax.vjp(f, x, values, bias, residual)
        return y, *pull(dy)

    args = (one.x, one.values.at[one.p.nnz :].set(0), bias, residual, dy)
    got = jax.block_until_ready(jax.jit(run, static_argnums=0)("mosaic", *args))
    want = run("xla", *jax.tree.map(lambda a: a.astype(f32), args))
    assert_close(got[0], want[0], terms(one))
    # what the activation was applied to is kept rounded, and so is the gradient of the sums
    eps = float(jnp.finfo(dtype).eps)
    for g, w in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(want[1:]), strict=True):
        g, w = (np.asarray(a, np.float32) for a in (g, w))
        assert np.abs(g - w).max() <= 2 * eps * np.abs(w).max()


def test_what_auto_takes():
    """Not the kernels, until somebody has measured them."""
    for op in ("conv", "taps"):
        sizes = {"n": 256 * 28 * 28, "grid": (4, 4), "block": (64, 64), "capacity": 2}
        problem = Problem(op=op, dtype=bf16, taps=9, pixels=784, images=256, **sizes)
        assert _mosaic.why_not(problem) is None
        assert fastest(problem, "cuda") == "dense"


def test_refusals():
    p = bsjax.BlockPattern.from_mask(MASK, 8)
    x, values = jnp.ones((1, 4, 4, 24), bf16), jnp.ones((3, 3, 3, 8, 8), bf16)
    with pytest.raises(ValueError, match="blocks of 8 x 8: each side must be one of 16, 32, 64"):
        bsjax.conv(x, values, p, implementation="mosaic")
    with pytest.raises(ValueError, match=r"conv: .* there is no kernel for float32"):
        bsjax.conv(x.astype(f32), values.astype(f32), p, implementation="mosaic")
    problem = Problem(
        op="conv",
        n=2**30,
        grid=(64, 64),
        block=(64, 64),
        capacity=4096,
        dtype=bf16,
        taps=9,
        pixels=2**12,
        images=2**18,
    )
    assert "are more than int32 counts" in (_mosaic.why_not(problem) or "")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there a kernel can run")
def test_without_a_gpu():
    p = bsjax.BlockPattern.from_mask(MASK, 64)
    x, values = jnp.ones((1, 2, 2, 192), bf16), jnp.ones((3, 3, 3, 64, 64), bf16)
    with pytest.raises(ValueError, match=r"conv: .* needs a Hopper GPU, and JAX found cpu only"):
        bsjax.conv(x, values, p, implementation="mosaic")
