"""`conv` under the transformations of JAX, over meshes, and what `auto` takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from bsjax.ops import _choose as choose
from bsjax.ops import _conv_core as core
from bsjax.ops._conv_form import forward
from tests.helpers import assert_close, random_mask, slow
from tests.ops.conv import MASK, case, cotangent, theirs

pytestmark = pytest.mark.usefixtures("quick_compilations")
DEVICES = 8


def test_moving_a_block_compiles_nothing():
    one = case((4, 3), (3, 2))
    run = jax.jit(bsjax.conv)
    run(one.x, one.values, one.p)
    moved = bsjax.BlockPattern.from_mask(MASK[::-1], one.p.block, capacity=one.p.capacity)
    got = run(one.x, one.values, moved)
    assert run._cache_size() == 1
    want = theirs(one._replace(p=moved))[0]
    assert_close(got, want, one.terms)


@pytest.mark.parametrize("transpose", [False, slow(True)])
def test_vmap(transpose):
    """Over images, values and patterns of equal capacity."""
    one = case((4, 3), (3, 2), lead=(3, 2), transpose=transpose)
    masks = [MASK, MASK[::-1], np.roll(MASK, 1, 1)]
    ps = [bsjax.BlockPattern.from_mask(m, one.p.block, capacity=one.p.capacity) for m in masks]
    p = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ps)
    values = jnp.stack([one.values, 2 * one.values, one.values + 1])

    def f(x, values, p):
        def run(x, values):
            return bsjax.conv(x, values, p, implementation="xla", **one.options)

        y, pull = jax.vjp(run, x, values)
        return y, *pull(cotangent(y))

    together = jax.jit(jax.vmap(f))(one.x, values, p)
    for i in range(3):
        want = theirs(one._replace(p=ps[i], x=one.x[i], values=values[i]))
        for got, expected in zip(together, want, strict=True):
            assert_close(got[i], expected, 4 * one.terms)


def test_scan_and_remat():
    """The same layer three times in a loop that keeps no activations, and written out."""
    mask = random_mask(3, 3)
    one = case((4, 3), (3, 2), mask=mask, block=4)
    values = jnp.nan_to_num(one.values) / 4

    def layer(x, values):
        return bsjax.conv(x, values, one.p, implementation="xla", activation="tanh")

    def looped(x, values):
        step = jax.checkpoint(lambda x, _: (layer(x, values), None))
        return jax.lax.scan(step, x, length=3)[0]

    def plain(x, values):
        dense = functools.partial(bsjax.conv, implementation="reference", activation="tanh")
        return functools.reduce(lambda x, _: dense(x, values, one.p), range(3), x)

    def both(f):
        y, pull = jax.vjp(f, one.x, values)
        return y, *pull(cotangent(y))

    got, want = (jax.jit(functools.partial(both, f))() for f in (looped, plain))
    for ours, expected in zip(got, want, strict=True):
        assert_close(ours, expected, 30 * one.terms)


@pytest.fixture(scope="module")
def images():
    """Twice as many images as devices, and what one device says of them."""
    one = case((4, 3), (3, 2), lead=(2 * DEVICES,))
    return one, theirs(one)


def gradients(f, x, values):
    y, pull = jax.vjp(f, x, values)
    return y, *pull(cotangent(y) + 0 * y)  # varies over a mesh as y does


@pytest.mark.parametrize("name", ["xla", slow("dense"), slow("auto")])
def test_images_in_shard_map(images, name):
    one, want = images
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    bias = jnp.zeros(one.p.shape[1])

    def f(x, values, p):
        return bsjax.conv(x, values, p, implementation=name, bias=bias)

    sharded = jax.shard_map(f, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
    got = jax.jit(lambda x, v: gradients(lambda x, v: sharded(x, v, one.p), x, v))(
        one.x, one.values
    )
    for ours, expected in zip(got, want, strict=True):
        assert_close(ours, expected, one.terms)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_images_on_a_mesh_are_not_gathered(images, kind):
    """Each device convolves its own, and gradients of the values are summed."""
    one, want = images
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("data"))
        x = jax.device_put(one.x, place)
        values, p = jax.device_put((one.values, one.p), NamedSharding(mesh, P()))

        def run(x, values, p):
            def f(x, values):
                bias = jnp.ones(p.shape[1])
                return bsjax.conv(x, values, p, implementation="xla", bias=bias, activation="relu")

            y = f(x, values)
            dy = jax.device_put(cotangent(y), place) if kind == AxisType.Auto else y
            return jax.vjp(f, x, values)[1](dy)

        program = jax.jit(run).lower(x, values, p).compile()
        assert "all-gather" not in program.as_text()
        dx, dvalues = program(x, values, p)
    assert dx.sharding.spec[0] == "data"
    assert dvalues.shape == want[2].shape


def test_auto_never_takes_what_was_slower():
    """By block, density and platform: from the measured break-even up it is dense."""
    p = bsjax.BlockPattern.from_mask(random_mask(8, 8, 0.25), 64)
    q = bsjax.BlockPattern.from_mask(np.ones((8, 8), bool), 64)
    form = forward((14, 14), (3, 3), (1, 1), "SAME", (1, 1))

    def problem(op, p):
        return core.problem(op, form, 8, p, jnp.float32)

    for op in ("conv", "taps"):
        assert choose.fastest(problem(op, p), "cpu") == "xla"
        assert choose.fastest(problem(op, q), "cpu") == "dense"
        assert choose.fastest(problem(op, p), "default") == "dense"
    assert problem("conv", p).n == 8 * 14 * 14
    assert problem("conv", p).taps == 9
