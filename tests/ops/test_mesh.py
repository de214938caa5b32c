"""Plain jit over a mesh: tokens stay on their devices, with automatic and with explicit axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
RNG = np.random.default_rng(0)
PATTERN = bsjax.BlockPattern.from_mask(RNG.random((8, 12)) < 0.3, block=16)
K, M = PATTERN.shape
X = jnp.asarray(RNG.normal(size=(16, 64, K)), jnp.float32)
DY = jnp.asarray(RNG.normal(size=(16, 64, M)), jnp.float32)
VALUES = jnp.asarray(RNG.normal(size=(PATTERN.capacity, 16, 16)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=(M,)), jnp.float32)


def layer(x, values, bias, p, implementation):
    return bsjax.matmul(x, values, p, bias=bias, activation="silu", implementation=implementation)


def gradients(x, values, bias, dy, p, implementation):
    y, pull = jax.vjp(lambda *a: layer(*a, p, implementation), x, values, bias)
    return y, *pull(dy)


def collectives(program: str) -> dict[str, int]:
    return {name: len(re.findall(rf" {name}(?:-start)?\(", program)) for name in COLLECTIVES}


def run_on(mesh, spec, lead, implementation):
    """Compiled HLO of forward and of forward + backward, and the gradients, on the mesh."""
    x, dy = X.reshape(*lead, K), DY.reshape(*lead, M)
    place = {s: NamedSharding(mesh, s) for s in (P(), spec)}
    args = (*jax.device_put((x,), place[spec]), *jax.device_put((VALUES, BIAS), place[P()]))
    dy, p = jax.device_put(dy, place[spec]), jax.device_put(PATTERN, place[P()])
    forward = jax.jit(lambda *a: layer(*a, implementation)).lower(*args, p).compile()
    both = jax.jit(lambda *a: gradients(*a, implementation)).lower(*args, dy, p).compile()
    return forward.as_text(), both.as_text(), both(*args, dy, p)


@pytest.mark.parametrize("implementation", ["xla", "dense"])
@pytest.mark.parametrize(
    ("axis_type", "spec", "lead"),
    [
        (AxisType.Auto, P("data"), (16, 64)),
        (AxisType.Auto, P("data"), (1024,)),
        (AxisType.Explicit, P("data"), (16, 64)),
        (AxisType.Explicit, P(("data", "model")), (1024,)),
        (AxisType.Explicit, P("data", "model"), (32, 32)),
    ],
)
def test_tokens_are_not_gathered(axis_type, spec, lead, implementation):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        forward, both, (y, dx, dvalues, dbias) = run_on(mesh, spec, lead, implementation)
    assert collectives(forward) == dict.fromkeys(COLLECTIVES, 0)
    found = collectives(both)
    # gradients of replicated weights are summed over devices, and nothing else moves
    assert found.pop("all-reduce") > 0
    assert found == dict.fromkeys(found, 0)
    assert tuple(y.sharding.spec)[: len(spec)] == tuple(spec)
    assert tuple(dx.sharding.spec)[: len(spec)] == tuple(spec)
    wanted = gradients(
        X.reshape(*lead, K), VALUES, BIAS, DY.reshape(*lead, M), PATTERN, "reference"
    )
    for ours, theirs in zip((y, dx, dvalues, dbias), wanted, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_gates_beside_sharded_tokens(axis_type):
    gate = jnp.asarray(RNG.normal(size=PATTERN.capacity), jnp.float32).at[::3].set(0.0)

    def step(x, values, gate, dy):
        def f(x, values, gate):
            return bsjax.matmul(x, values, PATTERN, gate=gate, implementation="xla")

        y, pull = jax.vjp(f, x, values, gate)
        return y, *pull(dy)

    wanted = step(X, VALUES, gate, DY)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((X, DY), NamedSharding(mesh, P("data")))
        values, gates = jax.device_put((VALUES, gate), NamedSharding(mesh, P()))
        program = jax.jit(step).lower(x, values, gates, dy).compile()
        ours = program(x, values, gates, dy)
    assert collectives(program.as_text())["all-gather"] == 0
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0)


def test_block_norms_of_sharded_tokens():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    key = jax.random.key(0)
    wanted = bsjax.block_norms(X, DY, 16, key=key)
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((X, DY), NamedSharding(mesh, P("data")))
        ours = jax.jit(lambda x, dy: bsjax.block_norms(x, dy, 16, key=key))(x, dy)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("what", "spec", "message"),
    [
        ("x", P(None, None, "data"), r"features of an activation .* 'data'.*bsjax.partition"),
        ("values", P("data"), r"values or coordinates .* 'data'.*bsjax.partition"),
    ],
)
def test_what_a_product_needs_whole(what, spec, message):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    p = bsjax.BlockPattern.from_mask(np.ones((8, 12), bool), block=16)
    args = {"x": X, "values": jnp.ones((96, 16, 16))}
    with jax.set_mesh(mesh):
        args[what] = jax.device_put(args[what], NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=message):
            bsjax.matmul(args["x"], args["values"], p)
