"""Products inside shard_map, with its checks on, over eight devices.

Plain jit over sharded arrays is in test_mesh.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bsjax
from tests.helpers import FEW, MANY, Case, assert_close, hub_mask, normal

DEVICES = 8
CASE = Case(mask=hub_mask(16, 8), n=8 * 3, capacity=40)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def on(mesh, in_specs, out_specs):
    """`shard_map` under jit; its checks are on unless one turns them off."""
    return lambda f: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def whole(p, x, values, dy):
    """y, dx and dvalues on one device, from the reference."""

    def f(x, values):
        return bsjax.matmul(x, values, p, implementation="reference")

    y, pull = jax.vjp(f, x, values)
    return y, *pull(dy)


def compare(got, want, terms):
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, terms)


def drawn(n, dtype=jnp.float32):
    p, _, values, _ = CASE.inputs(dtype)
    rng = np.random.default_rng(1)
    return p, normal(rng, (n, p.shape[0])), values, normal(rng, (n, p.shape[1]))


TOKENS = P(("data", "model"))


@pytest.mark.parametrize(
    ("where", "implementation", "n"),
    [
        ("inside", "xla", FEW),
        ("inside", "xla", MANY),
        ("inside", "dense", FEW),
        ("outside", "xla", MANY),
        ("outside", "auto", FEW),
    ],
)
def test_tokens_sharded_and_weights_replicated(mesh, where, implementation, n):
    """The gradient of replicated values is summed over devices, whoever differentiates."""
    p, x, values, dy = inputs = drawn(DEVICES * n)

    def f(x, values, p):
        return bsjax.matmul(x, values, p, implementation=implementation)

    if where == "inside":

        @on(mesh, (P(), TOKENS, P(), TOKENS), (TOKENS, TOKENS, P()))
        def run(p, x, values, dy):
            y, pull = jax.vjp(lambda x, v: f(x, v, p), x, values)
            return y, *pull(dy)

    else:
        sharded = on(mesh, (TOKENS, P(), P()), TOKENS)(f)

        @jax.jit
        def run(p, x, values, dy):
            y, pull = jax.vjp(lambda x, v: sharded(x, v, p), x, values)
            return y, *pull(dy)

    compare(run(*inputs), whole(p, x, values, dy), DEVICES * n)


def cut(values, p, axis, mesh):
    """Local patterns and values `[parts, ...]`; what spare slots hold is never read."""
    local, order = bsjax.partition(p, mesh.shape["model"], axis=axis)
    return local, values.at[order].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def mine(stacked):
    """The part of this device, without the axis of length one that sharding left."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


@pytest.mark.parametrize("n", [pytest.param(FEW, marks=pytest.mark.slow), MANY])
def test_block_columns_sharded(mesh, n):
    """Every device has its own columns of y and its own values; x is replicated over them."""
    p, x, values, dy = drawn(2 * n)
    local, parts = cut(values, p, "columns", mesh)

    @on(mesh, (P("model"), P("data"), P("model")), P("data", "model"))
    def columns(local, x, parts):
        return bsjax.matmul(x, mine(parts), mine(local), implementation="xla")

    @jax.jit
    def run(x, parts, dy):
        y, pull = jax.vjp(lambda x, parts: columns(local, x, parts), x, parts)
        return y, *pull(dy)

    y, dx, dparts = run(x, parts, dy)
    want_y, want_dx, want_dvalues = whole(p, x, values, dy)
    compare((y, dx), (want_y, want_dx), 2 * n + CASE.terms)
    want_dparts, _ = cut(want_dvalues, p, "columns", mesh)[::-1]
    assert_close(dparts, jnp.nan_to_num(want_dparts), 2 * n)


@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_block_rows_sharded(mesh, n):
    """Every device has its own features of x; partial results are summed."""
    p, x, values, dy = drawn(2 * n)
    local, parts = cut(values, p, "rows", mesh)

    @on(mesh, (P("model"), P("data", "model"), P("model")), P("data"))
    def rows(local, x, parts):
        y = bsjax.matmul(x, mine(parts), mine(local), implementation="xla")
        return jax.lax.psum(y, "model")

    @jax.jit
    def run(x, parts, dy):
        y, pull = jax.vjp(lambda x, parts: rows(local, x, parts), x, parts)
        return y, *pull(dy)

    y, dx, dparts = run(x, parts, dy)
    want_y, want_dx, want_dvalues = whole(p, x, values, dy)
    compare((y, dx), (want_y, want_dx), 2 * n + CASE.terms)
    want_dparts, _ = cut(want_dvalues, p, "rows", mesh)[::-1]
    assert_close(dparts, jnp.nan_to_num(want_dparts), 2 * n)


@pytest.mark.slow
def test_epilogue_gate_and_glu(mesh):
    """Every other argument may be replicated too, and gets the sum of its gradients."""
    p, x, values, dy = drawn(DEVICES * FEW)
    rng = np.random.default_rng(2)
    gate, bias = normal(rng, (p.capacity,)), normal(rng, (p.shape[1],))
    values, dy = values / 8, dy / 8

    def f(p, x, values, gate, bias, implementation):
        options = {"implementation": implementation}
        y = bsjax.matmul(x, values, p, gate=gate, bias=bias, activation="tanh", **options)
        return y + bsjax.glu(x, values, values, p, **options)

    def results(run):
        y, pull = jax.vjp(lambda *a: run(p, *a), x, values, gate, bias)
        return y, *pull(dy)

    alone = functools.partial(f, implementation="reference")
    sharded = functools.partial(f, implementation="xla")
    sharded = on(mesh, (P(), TOKENS, P(), P(), P()), TOKENS)(sharded)
    compare(results(sharded), results(alone), 40 * CASE.n)


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_sddmm_of_sharded_tokens(mesh, implementation):
    p, x, _, dy = drawn(DEVICES * FEW)

    @on(mesh, (P(), TOKENS, TOKENS), P())
    def run(p, x, dy):
        return jax.lax.psum(bsjax.sddmm(x, dy, p, implementation=implementation), ("data", "model"))

    want = bsjax.sddmm(x, dy, p, implementation="reference")
    assert_close(run(p, x, dy), want, DEVICES * FEW)


def test_block_norms_of_sharded_tokens(mesh):
    """Each device's own norms: what varies over the mesh comes out so."""
    p, x, _, dy = drawn(DEVICES * FEW)

    @on(mesh, (TOKENS, TOKENS), TOKENS)
    def run(x, dy):
        return bsjax.block_norms(x, dy, p.block, key=jax.random.key(0), rank=8)[None]

    got = run(x, dy)
    for i, norms in enumerate(got):
        mine = slice(i * FEW, (i + 1) * FEW)
        alone = bsjax.block_norms(x[mine], dy[mine], p.block, key=jax.random.key(0), rank=8)
        assert_close(norms, alone, FEW * 64)
