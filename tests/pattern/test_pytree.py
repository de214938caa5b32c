"""A pattern as a pytree: what JAX, pickle and people see of it."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import BlockPattern
from tests.helpers import assert_close, assert_raises
from tests.pattern.strategies import assert_same

MASK = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]], bool)
P = BlockPattern.from_mask(MASK, (2, 3), capacity=7)


def test_leaves_are_coordinates_with_names():
    leaves = jax.tree_util.tree_leaves_with_path({"layer": P})
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == ["['layer'].row", "['layer'].col"]
    assert leaves[0][1] is P.row
    assert leaves[1][1] is P.col


def test_sizes_are_static():
    """Other coordinates are the same kind of tree; another grid or block is another kind."""
    moved = BlockPattern.from_mask(~MASK, (2, 3), capacity=7)
    assert jax.tree.structure(moved) == jax.tree.structure(P)
    for mask, block in ((MASK.T, (2, 3)), (MASK, (3, 2)), (MASK, 2)):
        other = BlockPattern.from_mask(mask, block, capacity=7)
        assert jax.tree.structure(other) != jax.tree.structure(P)
        with pytest.raises(ValueError, match="pytree"):
            jax.tree.map(lambda a, b: a, P, other)


def test_both_ways_to_flatten_agree():
    leaves, structure = jax.tree.flatten(P)
    assert_same(jax.tree.unflatten(structure, leaves), P)
    keyed, sizes = P.tree_flatten_with_keys()
    plain, same = P.tree_flatten()
    assert sizes == same == ((3, 4), (2, 3))
    assert [leaf for _, leaf in keyed] == [*plain]


@pytest.mark.parametrize(
    "placeholder",
    [None, object(), "leaf", 0, jnp.float32(1)],
    ids=["None", "object", "text", "number", "scalar"],
)
def test_the_constructor_is_inert(placeholder):
    """JAX unflattens with whatever it likes; nothing is checked, converted or copied."""
    structure = jax.tree.structure(P)
    for p in (
        jax.tree.unflatten(structure, [placeholder, placeholder]),
        BlockPattern(placeholder, placeholder, P.grid, P.block),
    ):
        assert p.row is placeholder
        assert p.col is placeholder
        assert (p.grid, p.block) == (P.grid, P.block)
        assert type(p) is BlockPattern
        assert "BlockPattern" in repr(p)


def test_inside_custom_vjp():
    """Which unflattens its arguments, cotangents and symbolic zeros through our class."""

    @jax.custom_vjp
    def f(x, p):
        return bsjax.matmul(x, jnp.ones((7, 2, 3)), p)

    f.defvjp(lambda x, p: (f(x, p), p), lambda p, dy: (dy[:, :6] * p.nnz.astype(dy.dtype), None))
    dx = jax.jit(jax.grad(lambda x, p: f(x, p).sum()))(jnp.ones((2, 6)), P)
    assert_close(dx, np.full((2, 6), 5, np.float32), 1)


def test_as_carry_and_argument_of_everything():
    """jit, vmap, scan, cond and eval_shape take and return it whole."""

    def flip(p, _):
        return p.transpose()[0].transpose()[0], p.nnz

    back, counts = jax.jit(lambda p: jax.lax.scan(flip, p, None, length=2))(P)
    assert_same(back, P)
    assert counts.tolist() == [5, 5]
    other = BlockPattern.from_mask(~MASK, (2, 3), capacity=7)
    chosen = jax.jit(lambda i, p, q: jax.lax.cond(i, lambda: p, lambda: q))(False, P, other)
    assert_same(chosen, other)
    shapes = jax.eval_shape(lambda: BlockPattern.from_mask(jnp.ones((3, 4), bool), 2, capacity=12))
    assert (shapes.capacity, shapes.grid) == (12, (3, 4))
    assert "ShapeDtypeStruct" in repr(shapes)


def test_gradients_pass_it_by():
    """Integer leaves have no gradient: differentiating a whole model needs `allow_int`, as ever."""
    model = {"values": jnp.ones((7, 2, 3)), "p": P}

    def loss(model):
        return bsjax.matmul(jnp.ones((2, 6)), model["values"], model["p"]).sum()

    gradient = jax.grad(loss, allow_int=True)(model)
    assert gradient["p"].row.dtype == jax.dtypes.float0
    assert not np.any(gradient["values"][5:])


def test_immutable():
    message = "BlockPattern is immutable: build a new one instead of setting {}."
    assert_raises(lambda: setattr(P, "row", P.col), AttributeError, message.format("row"))
    assert_raises(lambda: setattr(P, "name", "p"), AttributeError, message.format("name"))
    message = "BlockPattern is immutable: build a new one instead of deleting row."
    assert_raises(lambda: delattr(P, "row"), AttributeError, message)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_and_pickles(copied):
    assert_same(copied(P), P)


def test_equals():
    assert P.equals(BlockPattern.from_mask(MASK, (2, 3), capacity=7))
    assert P.equals(jax.device_get(P))
    assert not P.equals(BlockPattern.from_mask(MASK, (2, 3)))  # another capacity
    assert not P.equals(BlockPattern.from_mask(~MASK, (2, 3), capacity=7))
    assert not P.equals(BlockPattern.from_mask(MASK, (3, 2), capacity=7))
    assert not P.equals(BlockPattern(P.row, P.col, (4, 5), P.block))
    assert not P.equals(MASK)
    message = (
        "BlockPattern.equals: coordinates are traced, so they cannot be compared here: compare "
        "outside jit, or compare `row` and `col` as arrays."
    )
    assert_raises(lambda: jax.jit(lambda p: p.equals(P))(P), TypeError, message)


def test_repr_draws_small_patterns():
    assert repr(P) == (
        "BlockPattern(grid=(3, 4), block=(2, 3), nnz=5, capacity=7)\n  #.#.\n  .#..\n  .##."
    )
    large = BlockPattern.from_mask(np.ones((40, 40), bool), 8)
    assert repr(large) == "BlockPattern(grid=(40, 40), block=(8, 8), nnz=1600, capacity=1600)"
    empty, _ = BlockPattern.from_coords([], [], grid=(0, 3), block=8)
    assert repr(empty) == "BlockPattern(grid=(0, 3), block=(8, 8), nnz=0, capacity=0)"


def test_repr_of_what_cannot_be_drawn():
    """Tracers, several patterns, and coordinates that nobody has checked."""
    seen = []
    jax.jit(lambda p: seen.append(repr(p)))(P)
    assert seen[0].startswith("BlockPattern(grid=(3, 4), block=(2, 3), row=JitTracer(int32[7])")
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), P)
    assert repr(stack).startswith("BlockPattern(grid=(3, 4), block=(2, 3), row=")
    wild = BlockPattern(jnp.array([9, -7]), jnp.array([0, 9]), (3, 4), (2, 3))
    assert "BlockPattern(grid=(3, 4), block=(2, 3)" in repr(wild)
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), P)
    assert "bfloat16" in repr(floats)


def test_a_pattern_made_inside_jit_from_what_python_knows_is_concrete():
    """A constant: no tracer leaks, and it is as good as one from outside."""

    @jax.jit
    def f(x):
        p = BlockPattern.from_mask(MASK, (2, 3), capacity=7)
        kept.append(p)
        return bsjax.matmul(x, jnp.ones((7, 2, 3)), p)

    kept = []
    f(jnp.ones((2, 6)))
    assert_same(kept[0], P)
