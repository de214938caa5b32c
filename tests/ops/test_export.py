"""One artefact for each platform: `jax.export` of products and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import bsjax
from tests.helpers import FEW, MANY, SHARED, Inputs, assert_close, products, unchecked

CASES = {n: SHARED[f"random, {n} tokens"] for n in (FEW, MANY)}


def exported(inputs, implementation, platforms):
    def f(p, x, values, dy):
        return products(Inputs(p, x, values, dy), implementation=implementation)

    return export.export(jax.jit(f), platforms=platforms)(*inputs)


@pytest.mark.parametrize(
    ("implementation", "n"), [("auto", FEW), pytest.param("xla", MANY, marks=pytest.mark.slow)]
)
def test_exported_for_a_cpu(implementation, n):
    inputs = CASES[n].inputs()
    got = exported(inputs, implementation, ["cpu"]).call(*inputs)
    for g, w in zip(got, products(inputs, implementation=implementation), strict=True):
        np.testing.assert_array_equal(g, w)


def test_kernels_for_a_gpu_without_one():
    p = bsjax.BlockPattern.from_mask(np.eye(2, dtype=bool), 64)
    x, values = jnp.ones((100, 128), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    product = jax.jit(lambda x, v: bsjax.matmul(x, v, p, implementation="mosaic"))
    artefact = export.export(product, platforms=["cuda"])(x, values)
    assert "mosaic_gpu" in artefact.mlir_module()


@pytest.mark.parametrize("n", CASES)
@pytest.mark.parametrize(
    ("implementation", "platforms"),
    [("auto", ["cuda"]), ("auto", ["cpu", "cuda"]), ("xla", ["cuda"])],
)
def test_lowered_for_a_gpu_without_one(implementation, platforms, n):
    artefact = exported(CASES[n].inputs(), implementation, platforms)
    assert artefact.platforms == tuple(platforms)


@pytest.mark.parametrize(("implementation", "known"), [("auto", []), ("xla", ["n >= 1024"])])
def test_any_number_of_tokens(implementation, known):
    """One artefact for all of them. An explicit "xla" has two formulations and must be told on
    which side of their border a symbolic number is. (It is no `int`, which annotations promise.)"""
    p, x, values, dy = CASES[MANY].inputs()
    (n,) = export.symbolic_shape("n", constraints=known)
    symbolic = [jax.ShapeDtypeStruct((n, a.shape[1]), a.dtype) for a in (x, dy)]
    with unchecked():
        artefact = exported(Inputs(p, symbolic[0], values, symbolic[1]), implementation, ["cpu"])
    inputs = Inputs(p, jnp.tile(x, (8, 1)), values, jnp.tile(dy, (8, 1)))
    got = artefact.call(*inputs)
    want = products(inputs, implementation="reference")
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 8 * CASES[MANY].terms)


def test_a_pattern_travels_with_a_saved_artefact():
    """Coordinates are arguments; the static sizes are saved with the function."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    p, x, values, _ = CASES[FEW].inputs()
    saved = export.export(jax.jit(bsjax.matmul))(x, values, p).serialize()
    loaded = export.deserialize(saved)
    np.testing.assert_array_equal(loaded.call(x, values, p), bsjax.matmul(x, values, p))
    other = bsjax.BlockPattern(p.row, p.col, p.grid, (4, 16))
    with pytest.raises(ValueError, match="pytree"):
        loaded.call(x, values, other)
