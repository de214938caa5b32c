"""Models on disk: sizes of patterns are saved beside the leaves, and others are refused."""

import re

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import bsjax.nnx
from tests.nnx.test_nnx_training import MASK, data, model, patterns, step

TX = optax.adam(1e-2)


def training(seed, mask=MASK, **options):
    ours = model(seed, mask, **options)
    return nnx.Dict(model=ours, optimizer=nnx.Optimizer(ours, TX, wrt=nnx.Param))


def save(training):
    """What a file gets: a dictionary of arrays, sizes of patterns among them."""
    return serialization.to_state_dict(nnx.to_pure_dict(nnx.state(training)))


def load(training, saved):
    state = nnx.state(training)
    pure = serialization.from_state_dict(nnx.to_pure_dict(state), saved)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(training, state)


def steps(training, count):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(count):
            value = step(training.model, training.optimizer, *data())
    return value


@pytest.fixture
def orbax(tmp_path):
    def through(saved, target):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "model", saved)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(tmp_path / "model", target)

    return through


def bytes_(saved, target):
    return serialization.msgpack_restore(serialization.msgpack_serialize(saved))


@pytest.mark.parametrize("medium", ["orbax", "msgpack"])
def test_round_trip(medium, request):
    """Other parameters, another topology: training goes on as if nothing had happened."""
    through = request.getfixturevalue("orbax") if medium == "orbax" else bytes_
    ours, other = training(0), training(1, np.roll(MASK, 1, axis=0))
    steps(ours, 2)
    load(other, through(save(ours), save(other)))
    for mine, theirs in zip(patterns(ours.model), patterns(other.model), strict=True):
        assert mine.equals(theirs)
    np.testing.assert_array_equal(steps(ours, 2), steps(other, 2))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(other))


def test_to_bytes_and_from_bytes():
    pure, other = (nnx.to_pure_dict(nnx.state(model(seed))) for seed in (0, 1))
    back = serialization.from_bytes(other, serialization.to_bytes(pure))
    jax.tree.map(np.testing.assert_array_equal, back, pure)
    assert back["layers"][0]["pattern"].equals(pure["layers"][0]["pattern"])


def test_restores_into_an_abstract_model(orbax):
    ours = model()
    abstract = nnx.eval_shape(model)
    restored = orbax(save(ours), save(abstract))
    load(abstract, restored)
    np.testing.assert_array_equal(abstract(data()[0]), ours(data()[0]))


def as_saved(**changes):
    saved = serialization.to_state_dict(bsjax.BlockPattern.from_mask(MASK, 8))
    return {name: v for name, v in (saved | changes).items() if v is not None}


e = int(MASK.sum())
REFUSED = {
    "another block": (
        as_saved(block=np.array([16, 16], np.int32)),
        ValueError,
        "BlockPattern: the saved pattern has block (16, 16), the target has (8, 8): restore into a "
        "model built with the same sizes.",
    ),
    "another grid": (
        as_saved(grid=np.array([5, 4], np.int32)),
        ValueError,
        "BlockPattern: the saved pattern has grid (5, 4), the target has (4, 4)",
    ),
    "another capacity": (
        as_saved(row=np.zeros(3, np.int32)),
        ValueError,
        f"BlockPattern: the saved `row` has shape (3,), the target's has ({e},): restore into a "
        "model whose pattern has the same capacity.",
    ),
    "leaves alone": (
        as_saved(grid=None, block=None),
        ValueError,
        "BlockPattern: the saved state lacks ['block', 'grid']: save models with flax",
    ),
    "cast": (
        as_saved(col=np.zeros(e, np.float32)),
        TypeError,
        "BlockPattern: the saved `col` must be int32, got float32: coordinates are indices, so "
        "leave them out when a model is cast or averaged.",
    ),
    "out of range": (
        as_saved(row=np.full(e, 7, np.int32)),
        ValueError,
        "outside the grid (4, 4)",
    ),
}


@pytest.mark.parametrize(("saved", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(saved, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        serialization.from_state_dict(bsjax.BlockPattern.from_mask(MASK.T, 8), saved)


def taller(mask):
    """One more block-row, and as many blocks: all leaves keep their shapes."""
    return np.concatenate([mask, np.zeros_like(mask[:1])])


def layer(mask, in_features):
    return bsjax.nnx.BlockLinear(in_features, 32, pattern=mask, block=8, rngs=nnx.Rngs(1))


def test_a_model_of_other_sizes_is_refused(orbax):
    saved, target = layer(MASK, 32), layer(taller(MASK), 40)
    restored = orbax(save(saved), save(target))
    with pytest.raises(
        ValueError, match=r"saved pattern has grid \(4, 4\), the target has \(5, 4\)"
    ):
        load(target, restored)


def test_leaves_alone_would_be_restored_in_silence(orbax):
    """Why sizes are saved: without them nothing tells this checkpoint from the right one."""
    saved, target = layer(MASK, 32), layer(taller(MASK), 40)
    restored = orbax(nnx.to_pure_dict(nnx.state(saved)), nnx.to_pure_dict(nnx.state(target)))
    assert restored["pattern"].grid == (5, 4)
