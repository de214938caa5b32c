"""Kernels in the interpreter, on any machine: races are errors, memory that nobody wrote is NaN.

The interpreter knows one device and runs programs as threads: few workers and small cases.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import bsjax
from bsjax.ops import _mosaic
from pallas_kernels import block_sparse, config
from tests.helpers import Case, assert_close, hub_mask, islands_mask, kept, products, random_mask

pytestmark = pytest.mark.interpreted

CASES = {
    "one token": Case(mask=random_mask(3, 2), block=32, n=1),
    "odd tokens, empty rows and columns": Case(mask=islands_mask(4, 5), block=64, n=137),
    "hub, spare": Case(mask=hub_mask(5, 4), block=32, n=70, capacity=16),
    "a single block": Case(mask=np.ones((1, 1), bool), block=64, n=64),
    "full": Case(mask=np.ones((3, 2), bool), block=16, n=80),
    "side 128": Case(mask=random_mask(2, 3, 0.6), block=128, n=130),
    "wide": Case(mask=random_mask(3, 2, 0.6), block=(64, 256), n=100),
    "tall": Case(mask=random_mask(2, 3, 0.6), block=(32, 16), n=100),
    "many tokens": Case(mask=random_mask(3, 3, 0.5), block=64, n=300),
}
MORE_SIDES = {
    f"side {a} x {b}": Case(mask=random_mask(3, 2, 0.7), block=(a, b), n=90, capacity=5)
    for a in (16, 32, 64, 128, 256)
    for b in (16, 32, 64, 128, 256)
    if a * b <= 128 * 256
}


@pytest.fixture(autouse=True)
def few_workers(monkeypatch):
    monkeypatch.setattr(_mosaic, "multiprocessors", lambda: 2)


@contextlib.contextmanager
def interpreted():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


interpret = jax.jit(
    functools.partial(products, implementation="mosaic"), static_argnames="transpose"
)


def conforms(case, dtype=jnp.bfloat16, *, transpose=False):
    inputs = case.inputs(dtype, transpose=transpose)
    with interpreted():
        got = interpret(inputs, transpose=transpose)
        jax.block_until_ready(got)
    want = products(kept(inputs), transpose=transpose, implementation="reference")
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g, w, case.terms)
    assert not np.any(np.asarray(got[2][inputs.p.nnz :]))  # spare slots receive zeros


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("tall", "many tokens") else ())
        for name in CASES
    ],
)
def test_matmul_and_its_derivatives(name):
    conforms(CASES[name])


@pytest.mark.parametrize("name", ["hub, spare", pytest.param("wide", marks=pytest.mark.slow)])
def test_transposed(name):
    conforms(CASES[name], transpose=True)


def test_float16():
    conforms(CASES["hub, spare"], jnp.float16)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", MORE_SIDES.values(), ids=MORE_SIDES)
def test_more_sides(case, dtype, transpose):
    conforms(case, dtype, transpose=transpose)


GROUPS = {
    "pairs, one left": Case(mask=random_mask(4, 5, 0.6), block=64, n=130, capacity=14),
    "fours, ragged": Case(mask=random_mask(3, 6, 0.7), block=16, n=80),
    "all alike": Case(mask=np.ones((3, 4), bool), block=32, n=70),
    "wide pairs": Case(mask=random_mask(3, 3, 0.6), block=128, n=130),
}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("pairs, one left", 2),
        pytest.param("fours, ragged", 4, marks=pytest.mark.slow),
        pytest.param("pairs, one left", 4, marks=pytest.mark.slow),
        pytest.param("fours, ragged", 2, marks=pytest.mark.slow),
        pytest.param("all alike", 4, marks=pytest.mark.slow),
        pytest.param("wide pairs", 2, marks=pytest.mark.slow),
    ],
)
def test_output_blocks_that_share_what_is_read(name, columns, monkeypatch):
    monkeypatch.setattr(config, "_columns", lambda *_: columns)
    jax.clear_caches()
    conforms(GROUPS[name])


@pytest.mark.parametrize(
    ("name", "columns"),
    [("pairs, one left", 1), pytest.param("fours, ragged", 4, marks=pytest.mark.slow)],
)
def test_programs_that_share_what_is_read(name, columns, monkeypatch):
    """Two programs with other tokens, each of which loads a half of the values for both."""
    heuristic = config.for_matmul

    def in_clusters(*args, **options):
        found = heuristic(*args, **options)
        return dataclasses.replace(found, tile=128, columns=columns, cluster=2, workers=2)

    monkeypatch.setattr(config, "for_matmul", in_clusters)
    jax.clear_caches()
    conforms(GROUPS[name])


def test_strands_of_tokens(monkeypatch):
    """Tiles in another order, some of them cut between workers."""
    monkeypatch.setattr(block_sparse, "interleaved", lambda *_: 2)
    jax.clear_caches()
    conforms(Case(mask=random_mask(3, 3, 0.3), block=64, n=500))


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_stored(n):
    case = Case(mask=np.zeros((3, 2), bool), block=32, n=n)
    conforms(case)


def test_patterns_are_data():
    """Another pattern of the same capacity compiles nothing."""
    case = CASES["hub, spare"]
    inputs = case.inputs(jnp.bfloat16)
    other = bsjax.BlockPattern.from_mask(random_mask(5, 4, 0.3), 32, capacity=16)
    traces = []

    @jax.jit
    def run(x, v, p):
        traces.append(1)
        return bsjax.matmul(x, v, p, implementation="mosaic")

    with interpreted():
        values = jnp.nan_to_num(inputs.values)
        for p in (inputs.p, other):
            y = run(inputs.x, values, p)
            want = bsjax.matmul(inputs.x, values, p, implementation="reference")
            assert_close(y, want.astype(jnp.float32), case.terms)
    assert len(traces) == 1


def test_vmap_over_everything():
    case = Case(mask=random_mask(3, 2, 0.5), block=32, n=70)
    inputs = case.inputs(jnp.bfloat16)
    p = bsjax.BlockPattern.from_mask(random_mask(3, 2, 0.5, seed=1), 32)
    patterns = jax.tree.map(lambda a, b: jnp.stack([a, b]), inputs.p, p)
    xs, vs = (jnp.stack([a, 2 * a]) for a in (inputs.x, inputs.values))

    def loss(implementation):
        def one(x, v, p):
            y = bsjax.matmul(x, v, p, implementation=implementation)
            return jnp.sum(y.astype(jnp.float32) * inputs.dy.astype(jnp.float32))

        return jax.vmap(jax.grad(one, (0, 1)))

    with interpreted():
        got = jax.jit(loss("mosaic"))(xs, vs, patterns)
        jax.block_until_ready(got)
    for g, w in zip(got, loss("reference")(xs, vs, patterns), strict=True):
        assert_close(g, w.astype(jnp.float32), case.terms)


def test_second_derivatives():
    case = Case(mask=random_mask(2, 2, 0.8), block=32, n=64)
    inputs = case.inputs(jnp.bfloat16)

    def twice(v, implementation):
        def loss(x):
            y = bsjax.matmul(x, v, inputs.p, implementation=implementation)
            return jnp.sum(jnp.tanh(y.astype(jnp.float32)))

        return jnp.sum(jax.grad(loss)(inputs.x).astype(jnp.float32) ** 2)

    v = 0.1 * inputs.values
    with interpreted():
        got = jax.jit(jax.grad(lambda v: twice(v, "mosaic")))(v)
        jax.block_until_ready(got)
    want = jax.jit(jax.grad(lambda v: twice(v, "dense")))(v)
    # the same rounded steps in another order of additions
    close = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
    assert float(close.max()) < 0.05 * float(jnp.abs(want.astype(jnp.float32)).max())


def test_scan():
    """Forward only: the interpreter's effects do not go through the derivative of a loop. That
    loops and rematerialisation compile is tested beside."""
    case = Case(mask=np.eye(2, dtype=bool), block=32, n=64)
    inputs = case.inputs(jnp.bfloat16)
    p, x, v, _ = inputs

    def loop(implementation):
        def step(x, _):
            y = bsjax.matmul(x, v, p, implementation=implementation)
            return jnp.tanh(y), None

        return jax.lax.scan(step, x, length=2)[0]

    with interpreted():
        got = jax.block_until_ready(jax.jit(lambda: loop("mosaic"))())
    np.testing.assert_allclose(
        got.astype(jnp.float32), loop("dense").astype(jnp.float32), atol=0.02
    )


def test_the_same_bits_again():
    case = CASES["hub, spare"]
    inputs = case.inputs(jnp.bfloat16)
    with interpreted():
        runs = [interpret(inputs) for _ in range(2)]
        jax.block_until_ready(runs)
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_dvalues_of_sampled_tokens():
    """The kernel gets the tokens that were taken, scaled and rounded, and a ragged last group."""
    p, x, values, dy = Case(mask=random_mask(2, 2, 0.7), block=32, n=70).inputs(jnp.bfloat16)
    options = {"key": jax.random.key(0), "fraction": 0.5, "sample_block": 4, "sampler": "priority"}

    @functools.partial(jax.jit, static_argnames="name")
    def dvalues(x, values, dy, name):
        def f(v):
            return bsjax.matmul(x, v, p, activation="relu", implementation=name, **options)

        return jax.vjp(f, values)[1](dy)[0]

    with interpreted():
        got = jax.block_until_ready(dvalues(x, values, dy, "mosaic"))
    want = dvalues(x, values, dy, "xla")
    # both sum the same numbers, and round once
    np.testing.assert_allclose(
        np.asarray(got, np.float32),
        np.asarray(want, np.float32),
        rtol=float(jnp.finfo(jnp.bfloat16).eps),
        atol=float(jnp.finfo(jnp.float32).eps) * 4 * 70 * 16,
    )


def test_inside_shard_map():
    """With its checks on: what varies over the mesh, and what a gradient sums."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    case = Case(mask=random_mask(3, 2, 0.5), block=32, n=70)
    inputs = case.inputs(jnp.bfloat16)
    P = jax.sharding.PartitionSpec

    def step(x, v, dy):
        y, pull = jax.vjp(lambda x, v: bsjax.matmul(x, v, inputs.p, implementation="mosaic"), x, v)
        return y, *pull(dy)

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=(P("d"), P("d"), P())
    )
    with interpreted():
        got = jax.jit(sharded)(inputs.x, inputs.values, inputs.dy)
        jax.block_until_ready(got)
    for g, w in zip(got, products(kept(inputs), implementation="reference"), strict=True):
        assert_close(g, w, case.terms)


def test_without_a_gpu_it_says_so():
    inputs = CASES["one token"].inputs(jnp.bfloat16)
    sentence = 'matmul: implementation="mosaic" cannot run here: it needs a Hopper GPU'
    with pytest.raises(ValueError, match=sentence):
        bsjax.matmul(inputs.x, inputs.values, inputs.p, implementation="mosaic")
