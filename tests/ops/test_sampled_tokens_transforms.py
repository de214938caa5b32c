"""`matmul` with a key under transformations, over a mesh, and what it keeps in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from tests.helpers import assert_close, normal, random_mask, slow
from tests.ops.test_sampled_tokens import CASE, KEY, inputs, run


def test_keeps_the_sampled_tokens_only():
    """What lies between the passes of a layer whose input nobody else keeps."""
    n, side = 2048, 16
    p = bsjax.BlockPattern.from_mask(np.eye(8, dtype=bool), side)
    x, values = jnp.ones((n, 128)), jnp.ones((8, side, side))

    def memory(fraction, **options):
        def forward(u, values):
            def layer(values):
                given = {
                    "key": KEY,
                    "fraction": fraction,
                    "sample_block": 8,
                    "implementation": "dense",
                    **options,
                }
                return jnp.sum(bsjax.matmul(jnp.sin(u), values, p, **given), axis=1)

            return jax.vjp(layer, values)

        analysis = jax.jit(forward).lower(x, values).compile().memory_analysis()
        return analysis.output_size_in_bytes

    whole, small = 4 * n * 128, 4 * (n + 4 * 8 * side**2 + n)
    assert memory(1) > whole
    assert memory(0.25) < 0.25 * whole + small
    assert memory(0.25, gate=jnp.ones(8)) < 0.25 * whole + small


@pytest.mark.slow
def test_vmap_draws_for_each():
    x, values, p, dy = inputs()
    x, dy = jnp.stack([x, 2 - x]), jnp.stack([dy, -dy])
    keys = jax.random.split(KEY, 2)
    one = functools.partial(run, sampler="priority", sample_block=4, implementation="dense")
    together = jax.vmap(one, (0, None, None, 0, None, 0))(x, values, p, dy, {}, keys)
    for i in range(2):
        alone = one(x[i], values, p, dy[i], {}, keys[i])
        for ours, theirs in zip(together[:3], alone[:3], strict=True):
            assert_close(ours[i], np.asarray(theirs), 16 * CASE.n)


@pytest.mark.parametrize("loop", ["bsjax.scan", slow("scan"), slow("remat")])
def test_in_loops(loop):
    """The same sample when it is computed again; `bsjax.scan` has one product over the samples of
    all steps."""
    p = bsjax.BlockPattern.from_mask(random_mask(3, 3, 0.7), 8)
    rng = np.random.default_rng(0)
    x, dy = normal(rng, (9, 24)), normal(rng, (9, 24))
    values = normal(rng, (p.capacity, 8, 8)) / 5
    keys = jax.random.split(KEY, 3)

    def step(values, h, key):
        return bsjax.matmul(
            h, values, p, key=key, fraction=0.5, sampler="priority", implementation="dense"
        )

    def looped(x, values):
        body = jax.checkpoint(step) if loop == "remat" else step
        scan = bsjax.scan if loop == "bsjax.scan" else jax.lax.scan
        return jnp.vdot(scan(lambda h, key: (body(values, h, key), None), x, keys)[0], dy)

    def unrolled(x, values):
        for i in range(3):
            x = step(values, x, keys[i])
        return jnp.vdot(x, dy)

    program = jax.make_jaxpr(jax.grad(looped, 1))(x, values).eqns
    backward = [step for step in program if step.primitive.name == "scan"][-1]
    given_out = [out.aval.shape for out in backward.outvars]
    # the cotangents of the sampled tokens of all steps
    assert ((3, 4, 24) in given_out) == (loop == "bsjax.scan")
    got, want = (jax.jit(jax.grad(f, (0, 1)))(x, values) for f in (looped, unrolled))
    for ours, theirs in zip(got, want, strict=True):
        few = 16 * float(jnp.finfo(jnp.float32).eps)  # of some steps in another order
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=few * float(abs(theirs).max()))


MESHES = [
    slow(AxisType.Auto, P("data"), (16, 8)),
    slow(AxisType.Explicit, P("data"), (16, 8)),
    (AxisType.Explicit, P("data", "model"), (16, 8)),
    slow(AxisType.Explicit, P(("data", "model")), (136,)),  # 68 sampled, which 8 does not divide
]


@pytest.mark.parametrize(("axis_type", "spec", "lead"), MESHES)
def test_tokens_over_a_mesh(axis_type, spec, lead):
    """The sample of one device, of tokens that are not gathered for it where axes are explicit."""
    p = bsjax.BlockPattern.from_mask(random_mask(3, 2, 0.7), 8)
    rng = np.random.default_rng(0)
    x, dy = normal(rng, (*lead, 24)), normal(rng, (*lead, 16))
    values, gate = normal(rng, (p.capacity, 8, 8)), {"gate": normal(rng, (p.capacity,))}
    options = {"sampler": "priority", "sample_block": 2, "implementation": "dense"}
    want = run(x, values, p, dy, gate, KEY, **options)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((x, dy), NamedSharding(mesh, spec))
        rest = jax.device_put((values, p, gate, KEY), NamedSharding(mesh, P()))
        values, p, gate, key = rest
        program = run.lower(x, values, p, dy, gate, key, **options).compile()
        got = program(x, values, p, dy, gate, key)
    gathered = [line for line in program.as_text().splitlines() if " all-gather" in line]
    if axis_type == AxisType.Explicit:  # numbers of tokens and norms are, but no features
        assert not any("24]" in line.split("all-gather(")[0] for line in gathered)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(ours, np.asarray(theirs), 136 * 16)


@pytest.mark.slow
def test_shard_map():
    """With its checks on: each device samples its own tokens, and dvalues is summed."""
    x, values, p, dy = inputs()
    x, dy = x[:44], dy[:44]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local(x, values, p, dy, key):
        return run(x, values, p, dy, {}, key, sampler="priority", implementation="dense")[:3]

    specs = (P("data"), P(), P(), P("data"), P())
    out = (P("data"), P("data"), P())
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out))(
        x, values, p, dy, KEY
    )
    halves = [local(x[i : i + 22], values, p, dy[i : i + 22], KEY)[2] for i in (0, 22)]
    assert_close(got[2], np.asarray(halves[0] + halves[1]), 16 * CASE.n)
