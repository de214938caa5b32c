"""A block whose gate is zero costs nothing, and its gate has a gradient all the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _core
from tests.helpers import FEW, MANY, Case, assert_close, normal, random_mask

CASE = Case(mask=random_mask(5, 4, 0.6), n=MANY, capacity=14)
IMPLEMENTATIONS = ["xla", "dense"]


def closed_row(case):
    """A gate that closes all of block-row 1, and tokens that nobody may read there."""
    p, x, values, dy = case.inputs()
    gate = normal(np.random.default_rng(2), (p.capacity,))
    gate = jnp.where(p.row == 1, 0.0, gate)
    values = jnp.nan_to_num(values)
    br = p.block[0]
    poisoned = x.at[:, br : 2 * br].set(jnp.nan)
    return p, x, poisoned, values, gate, dy


@pytest.mark.parametrize("n", [FEW, MANY])
def test_what_is_closed_is_not_read(n):
    p, x, poisoned, values, gate, dy = closed_row(Case(mask=CASE.mask, n=n, capacity=14))
    nothing = jnp.where((gate == 0)[:, None, None], jnp.nan, values)

    def f(implementation, x, values):
        return bsjax.matmul(x, values, p, gate=gate, implementation=implementation)

    y, pull = jax.vjp(functools.partial(f, "xla"), poisoned, nothing)
    want, want_pull = jax.vjp(functools.partial(f, "reference"), x, values)
    assert_close(y, want, CASE.terms)
    for got, wanted in zip(pull(dy), want_pull(dy), strict=True):
        assert_close(got, wanted, CASE.terms)
    assert not np.any(pull(dy)[1][gate == 0])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_the_references(implementation, transpose):
    p, x, values, dy = CASE.inputs(transpose=transpose)
    values = jnp.nan_to_num(values)
    gate = normal(np.random.default_rng(1), (p.capacity,)).at[::3].set(0.0)

    def both(implementation):
        def f(x, values, gate):
            options = {"transpose": transpose, "implementation": implementation}
            return bsjax.matmul(x, values, p, gate=gate, **options)

        y, pull = jax.vjp(f, x, values, gate)
        return y, *pull(dy)

    *got, dgate = both(implementation)
    *want, want_gate = both("reference")
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, CASE.terms)
    assert_close(dgate, want_gate, CASE.n * values[0].size)


def tokens_of_sddmm(monkeypatch):
    """What sddmm is asked for: how many stored blocks a pattern has, as a list to be filled."""
    asked, run = [], _core._run_sddmm

    def spy(spec, x, y, p):
        jax.debug.callback(lambda n: asked.append(int(n)), jnp.sum(p.col < p.grid[1]))
        return run(spec, x, y, p)

    monkeypatch.setattr(_core, "_run_sddmm", spy)
    return asked


def test_closed_blocks_have_work_only_for_the_gradient_of_the_gate(monkeypatch):
    asked = tokens_of_sddmm(monkeypatch)
    p, x, _, values, gate, dy = closed_row(CASE)
    stored = p.nnz

    def loss(values, gate):
        y = bsjax.matmul(x, values, p, gate=gate, implementation="xla")
        return jnp.vdot(y, dy)

    jax.block_until_ready(jax.jit(jax.grad(loss))(values, gate))
    assert asked == [stored - int(np.sum(np.asarray(gate) == 0))]
    asked.clear()
    jax.block_until_ready(jax.jit(jax.grad(loss, argnums=(0, 1)))(values, gate))
    assert asked == [stored]


def test_it_is_a_mask_for_each_example():
    """Under vmap every example has its own closed blocks."""
    p, x, values, _ = CASE.inputs()
    values = jnp.nan_to_num(values)
    gates = normal(np.random.default_rng(3), (3, p.capacity))
    gates = jnp.where(gates < 0, 0.0, gates)

    def loss(implementation, gate):
        f = functools.partial(bsjax.matmul, x, values, p, implementation=implementation)
        return jnp.sum(jnp.sin(f(gate=gate)))

    got, want = (
        jax.vmap(jax.grad(functools.partial(loss, name)))(gates) for name in ("xla", "reference")
    )
    assert_close(got, want, CASE.n * values[0].size)


def test_in_a_scan_all_steps_share_one_product(monkeypatch):
    asked = tokens_of_sddmm(monkeypatch)
    case = Case(mask=random_mask(3, 3, 0.7), n=FEW)
    p, x, values, _ = case.inputs()
    gate = jnp.arange(p.capacity, dtype=jnp.float32) / 4

    def loss(scan, values, gate):
        def step(carry, u):
            y = bsjax.matmul(carry, 0.1 * values, p, gate=gate, implementation="xla")
            return jnp.tanh(y + u), None

        return jnp.sum(scan(step, x, jnp.ones((4, 1, 1)))[0])

    grads = [
        jax.jit(jax.grad(functools.partial(loss, scan), argnums=(0, 1)))(values, gate)
        for scan in (bsjax.scan, jax.lax.scan)
    ]
    jax.block_until_ready(grads)
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, 4 * case.n * values[0].size)
    assert asked == [p.nnz] * 5  # once, and once for each of four steps
