"""Bias, activation and residual inside the kernel, and their gradients, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax.ops import _fused
from tests.helpers import Case, assert_close, hub_mask, random_mask
from tests.kernels.test_interpreted import few_workers, interpreted  # noqa: F401 - a fixture

pytestmark = pytest.mark.interpreted
HUB = Case(mask=hub_mask(3, 4), block=32, n=70, capacity=8)


def run(case, implementation, *, dtype=jnp.bfloat16, transpose=False, **which):
    """y and all its gradients under a random cotangent."""
    inputs = case.inputs(dtype, transpose=transpose)
    rng = np.random.default_rng(1)
    m = inputs.dy.shape[1]
    extra = {
        "bias": jnp.asarray(rng.normal(size=m), jnp.float32).astype(dtype),
        "residual": jnp.asarray(rng.normal(size=inputs.dy.shape), jnp.float32).astype(dtype),
        "gate": jnp.asarray(rng.normal(size=inputs.p.capacity), jnp.float32).astype(dtype),
    }
    activation = which.pop("activation", None)
    names = [name for name in extra if which.get(name)]
    args = [inputs.x, jnp.where(jnp.isnan(inputs.values), 0, inputs.values)]
    args += [extra[name] for name in names]
    if implementation == "reference":
        args = [a.astype(jnp.float32) for a in args]

    @jax.jit
    def both(*args):
        def f(x, values, *rest):
            options = dict(zip(names, rest, strict=True)) | {"activation": activation}
            options |= {"implementation": implementation, "transpose": transpose}
            return bsjax.matmul(x, values, inputs.p, **options)

        y, pull = jax.vjp(f, *args)
        return y, *pull(inputs.dy.astype(y.dtype))

    if implementation == "reference":
        return both(*args)
    with interpreted():
        return jax.block_until_ready(both(*args))


def close(case, got, want):
    for g, w in zip(got, want, strict=True):
        # z is rounded once before the slope is taken of it, and the slope before it is multiplied
        spread = float(jnp.abs(w).max())
        error = float(jnp.abs(g.astype(jnp.float32) - w).max())
        assert error <= 2 ** (-7 if g.dtype == jnp.bfloat16 else -9) * spread


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "sigmoid"])
def test_bias_and_activation(activation):
    which = {"bias": True, "activation": activation}
    close(HUB, run(HUB, "mosaic", **which), run(HUB, "reference", **which))


@pytest.mark.parametrize("transpose", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_everything_at_once(transpose):
    which = {"bias": True, "residual": True, "activation": "gelu", "transpose": transpose}
    close(HUB, run(HUB, "mosaic", **which), run(HUB, "reference", **which))


@pytest.mark.slow
def test_residual_alone_in_float16():
    which = {"residual": True, "dtype": jnp.float16}
    close(HUB, run(HUB, "mosaic", **which), run(HUB, "reference", **which))


def test_gate():
    which = {"gate": True}
    close(HUB, run(HUB, "mosaic", **which), run(HUB, "reference", **which))


@pytest.mark.slow
def test_blocks_wider_than_a_slice():
    case = Case(mask=random_mask(2, 2, 0.75), block=128, n=130)
    which = {"bias": True, "residual": True, "activation": "silu"}
    close(case, run(case, "mosaic", **which), run(case, "reference", **which))


@pytest.mark.parametrize(
    ("block", "activation"), [(32, "silu"), pytest.param(64, "gelu", marks=pytest.mark.slow)]
)
def test_gated_linear_unit(block, activation):
    case = Case(mask=random_mask(3, 3, 0.5), block=block, n=70)
    inputs = case.inputs(jnp.bfloat16)
    up = jnp.flip(inputs.values, 2)

    def run(implementation, dtype):
        def f(x, gate, up):
            options = {"activation": activation, "implementation": implementation}
            return bsjax.glu(x, gate, up, inputs.p, **options)

        args = (a.astype(dtype) for a in (inputs.x, inputs.values, up))
        y, pull = jax.vjp(f, *args)
        return y, *pull(inputs.dy.astype(dtype))

    with interpreted():
        got = jax.block_until_ready(jax.jit(lambda: run("mosaic", jnp.bfloat16))())
    close(case, got, run("reference", jnp.float32))


def test_a_function_runs_after_the_kernel():
    """And its float32 cotangent is rounded for the kernels of the backward pass."""
    case = Case(mask=random_mask(2, 2, 0.75), block=64, n=70)
    which = {"bias": True, "activation": jax.nn.softplus, "gate": True}
    close(case, run(case, "mosaic", **which), run(case, "reference", **which))


def test_nothing_stored():
    case = Case(mask=np.zeros((3, 2), bool), block=32, n=5)
    which = {"bias": True, "residual": True, "activation": "relu"}
    for g, w in zip(run(case, "mosaic", **which), run(case, "reference", **which), strict=True):
        assert_close(g, w, 1)


def test_it_is_one_kernel(monkeypatch):
    """A function that no kernel knows goes another way; a name does not."""
    calls = []
    fused = _fused.matmul
    monkeypatch.setattr(_fused, "matmul", lambda *args: calls.append(1) or fused(*args))
    with interpreted():
        inputs = Case(mask=np.eye(2, dtype=bool), block=32, n=64).inputs(jnp.bfloat16)
        p, x, values, _ = inputs
        for activation, n in (("relu", 1), (jax.nn.relu, 0)):
            calls.clear()
            y = bsjax.matmul(x, values, p, activation=activation, implementation="mosaic")
            want = bsjax.matmul(x, values, p, activation=activation, implementation="dense")
            assert_close(y, want.astype(jnp.float32), 64)
            assert len(calls) == n


@pytest.mark.slow
def test_second_derivatives():
    inputs = Case(mask=np.eye(2, dtype=bool), block=32, n=64).inputs(jnp.bfloat16)
    p, x, values, _ = inputs
    bias = jnp.linspace(-1, 1, 64).astype(jnp.bfloat16)

    def twice(bias, implementation):
        def loss(x):
            y = bsjax.matmul(
                x, 0.1 * values, p, bias=bias, activation="tanh", implementation=implementation
            )
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jnp.sum(jax.grad(loss)(x).astype(jnp.float32) ** 2)

    with interpreted():
        got = jax.block_until_ready(jax.jit(jax.grad(lambda b: twice(b, "mosaic")))(bias))
    want = jax.jit(jax.grad(lambda b: twice(b, "dense")))(bias)
    off = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
    assert float(off) < 0.05 * float(jnp.abs(want.astype(jnp.float32)).max())
