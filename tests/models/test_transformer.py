"""The models are what they claim, learn, and a resumed run is bitwise the uninterrupted one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax.nnx
from models import transformer
from models._cli import Mistake
from models._train import Checkpoints
from models.transformer import Run, Size, Transformer, block_sparse, dense
from tests.models.tiny import config, ctrl_c_at, optax_promotes

# ------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--density 1",
        "--density 0.05 --pattern random",
        "--width 512 --heads 8 --layers 3 --block 64 --density 0.1",
        "--width 96 --heads 3 --block 16",
    ],
)
def test_parameters_are_equal_counted_whole(flags):
    c = config(*flags.split())
    sparse = transformer.wide(c)
    narrow = transformer.narrower(c, sparse)
    assert narrow.width <= c.width
    counts = [transformer.parameters(c, size) for size in (sparse, narrow)]
    assert abs(counts[1] / counts[0] - 1) < 0.02


@pytest.fixture(scope="module")
def models():
    """One of each kind, equally wide."""
    c, makers = config(), (block_sparse, dense)
    with optax_promotes():  # elsewhere they are made so, and that compiles once
        return {make: Transformer(c, Size(32, 128, make), nnx.Rngs(0)) for make in makers}


def found(model, kind):
    return [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, kind)]


def test_every_parameter_is_counted(models):
    linears = 4 * 0.25 * 32 * 32 * 3 + 32 * (3 + 1 + 4 + 1)  # qkv, projection, up, down: 12 grids
    rest = 256 * 32 + 3 * 32 + 32 * 256 + 256  # embeddings, norms, the head and its bias
    assert transformer.parameters(config(), transformer.wide(config())) == linears + rest
    leaves = jax.tree.leaves(nnx.state(models[block_sparse], nnx.Param))
    assert sum(leaf.size for leaf in leaves) == linears + rest


def test_one_model_is_sparse_in_every_layer_and_the_other_nowhere(models):
    sparse, full = models[block_sparse], models[dense]
    layers = found(sparse, bsjax.nnx.BlockLinear)
    assert [layer.pattern.get_value().density for layer in layers] == [0.25] * 4
    assert not found(full, bsjax.nnx.BlockLinear)
    head = (32, 256)
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    others = [(layer.in_features, layer.out_features) for layer in found(full, nnx.Linear)]
    assert sorted([*shapes, head]) == sorted(others)


def test_each_layer_has_a_pattern_of_its_own_and_the_seed_decides():
    def masks(*flags):
        linear = block_sparse(config(*flags), nnx.Rngs(0))
        return [linear(64, 64).pattern.get_value().mask().tolist() for _ in range(3)]

    first, second, third = masks()
    assert first != second != third != first
    assert masks() == [first, second, third]
    assert masks("--seed", "1") != [first, second, third]


@pytest.mark.parametrize("linear", [block_sparse, dense])
def test_a_byte_changes_what_follows_and_nothing_before(models, linear):
    data = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    before, after = (jax.jit(models[linear])(d) for d in (data, data.at[:, 9].add(1)))
    assert before.shape == (2, 16, 256)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    # the embedding reaches three bytes back; beyond it, attention does
    assert (jnp.abs(before - after).max((0, 2))[9:] > 1e-4).all()


def test_rotary_positions_are_relative():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))
    q, k = (transformer.rotate(jnp.tile(x, (1, 12, 1, 1)))[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T)
    for distance in range(-11, 12):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products) > 0.1


def test_equal_sizes_share_one_compilation(straight):
    """Timing fresh models must not compile what training has compiled already."""
    for name, run in runs_of(config()).items():
        assert nnx.graphdef(run) == nnx.graphdef(straight[0][name])


# ------------------------------------------------------------------------------------ the training


def runs_of(c):
    sparse = transformer.wide(c)
    sizes = {"block-sparse": sparse, "dense": transformer.narrower(c, sparse)}
    with optax_promotes():
        return {name: Run.start(c, size) for name, size in sizes.items()}


def leaves(runs):
    return [np.asarray(leaf) for leaf in jax.tree.leaves([nnx.state(run) for run in runs.values()])]


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """(runs, losses) without an interruption."""
    runs = runs_of(config())
    saved = Checkpoints(tmp_path_factory.mktemp("straight"), {})
    with optax_promotes():
        return runs, transformer.train(config(), text, runs, saved)


def test_both_models_learn(straight):
    _, losses = straight
    assert [len(of_one) for of_one in losses.values()] == [config().steps] * 2
    for of_one in losses.values():
        assert of_one[0] > 6
        assert np.mean(of_one[-4:]) < math.log2(7) + 0.6  # seven letters, at random


def test_a_resumed_run_has_the_same_losses_bit_by_bit(straight, tmp_path, text, capfd):
    c = config()
    with optax_promotes():
        with ctrl_c_at(11):
            assert transformer.train(c, text, runs_of(c), Checkpoints(tmp_path, {})) is None
        saved = Checkpoints(tmp_path, {})
        assert saved.step() == 12  # the step under way ended
        resumed = runs_of(c)
        losses = transformer.train(dataclasses.replace(c, resume=True), text, resumed, saved)
    assert losses == straight[1]
    for a, b in zip(leaves(straight[0]), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "Going on from step 12." in capfd.readouterr().out


def test_a_model_that_diverges_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "train_step", lambda *_, **__: jnp.float32(jnp.nan))
    with pytest.raises(Mistake, match=r"^the block-sparse model diverged.*: lower --learning_rate"):
        transformer.train(config(), text, runs_of(config()), Checkpoints(tmp_path, {}))
