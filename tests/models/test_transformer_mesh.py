"""A decoder on several devices computes what one device computes, and its checkpoints fit both."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
from models import _mesh, transformer
from models._cli import Mistake
from models._mesh import Team
from models._train import Checkpoints
from models.transformer import Run
from tests.helpers import of_one_sign, slow
from tests.models.tiny import TERMS, config, optax_promotes
from tests.transformer.oracle import assert_close

SPARSE = "--attention window --window 5 --attention_block 4 --pattern random --density 0.3"
BYTES = 8 * 16  # that a loss is the mean of


@pytest.fixture(autouse=True)
def promoting():
    with optax_promotes():
        yield


def flags(line, data=1, model=1):
    c = config("--batch", "8", *line.split())
    return dataclasses.replace(c, data_parallel=data, tensor_parallel=model)


def size_of(c, name):
    sparse = transformer.wide(c)
    return transformer.narrower(c, sparse) if name == "dense" else sparse


def started(c, name="sparse"):
    """(team, runs): not on their devices yet."""
    size = size_of(c, name)
    return Team(c, {name: size}), {name: Run.start(c, size)}


def raw(leaf):
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(raw(x), raw(y))


def windows(rows=8):
    return jax.random.randint(jax.random.key(3), (rows, 17), 0, 256)


# ------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("line", "name"), [slow("", "dense"), ("", "sparse"), slow(SPARSE, "sparse")]
)
def test_what_is_spread_is_gathered_exactly(line, name):
    c = flags(line, 2, 2)
    team, runs = started(c, name)
    rng = np.random.default_rng(0)
    moments = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype) if a.ndim else a,
        nnx.state(runs[name].optimizer, nnx.optimizer.OptState),
    )
    nnx.update(runs[name].optimizer, moments)
    want = jax.tree.map(raw, nnx.state(runs[name]))
    team.spread(runs)
    cut = runs[name].model.blocks[0].up
    assert (cut.kernel if name == "dense" else cut.values).shape[0] == 2
    equal(team.states(runs)[name], want)
    team.gather(runs)
    equal(nnx.state(runs[name]), want)


def test_a_part_has_the_query_key_and_value_of_its_heads():
    """Against slices of the dense matrix, which know nothing of blocks."""
    p = bsjax.BlockPattern.from_mask(bsjax.patterns.random((4, 12), 0.4), block=4)
    values = jax.random.normal(jax.random.key(0), (p.capacity, 4, 4))
    local, order = _mesh.cut(p, 2, "qkv")
    whole = np.asarray(bsjax.todense(values, p)).reshape(16, 3, 2, 8)
    for part in range(2):
        own = jax.tree.map(lambda a, part=part: a[part], local)
        got = bsjax.todense(
            jnp.where(order[part] < 0, 0, 1)[:, None, None] * values[order[part]], own
        )
        np.testing.assert_array_equal(got, whole[:, :, part].reshape(16, 24))


@pytest.mark.parametrize("shape", [(5, 12), (12,)])
def test_a_dense_layer_is_split_by_heads_and_joined(shape):
    a = np.random.default_rng(0).normal(size=shape)
    parts = _mesh._split(a, 2, "qkv")
    want = np.moveaxis(a.reshape(*shape[:-1], 3, 2, 2), -2, 0).reshape(2, *shape[:-1], 6)
    np.testing.assert_array_equal(parts, want)
    np.testing.assert_array_equal(_mesh._joined(parts, shape, "qkv"), a)


def test_hidden_features_that_parts_do_not_divide_are_filled_with_zeros():
    a = np.ones((7, 3))
    parts = _mesh._split(a, 2, "down")
    assert parts.shape == (2, 4, 3)
    assert not parts[1, 3].any()
    np.testing.assert_array_equal(_mesh._joined(parts, (7, 3), "down"), a)


# ---------------------------------------------------------------------------- loss and gradients


def gradients(line, name, data, model):
    """The loss, and the gradients in the place of the parameters, gathered."""
    c = flags(line, data, model)
    team, runs = started(c, name)
    team.spread(runs)
    net = runs[name].model
    found = nnx.jit(nnx.value_and_grad(team.losses[name]))(net, team.data(windows()))
    nnx.update(net, found[1])
    team.gather(runs)
    return float(found[0]), nnx.state(net, nnx.Param)


alone = functools.cache(functools.partial(gradients, data=1, model=1))
GATED = "--attention strided --stride 4 --attention_block 4 --per_head --heads 4 --gated"
SAMPLED = "--sparse none --sample 0.5"


@pytest.mark.parametrize(
    ("line", "name", "data", "model"),
    [
        slow(SPARSE, "sparse", 8, 1),
        (SPARSE, "sparse", 2, 2),
        slow("--attention top_blocks --attention_block 4 --top_blocks 2", "sparse", 2, 2),
        slow("", "dense", 1, 2),
        slow("", "sparse", 2, 2),
        slow(f"{GATED} --density 0.5", "sparse", 2, 2),
        slow(f"{GATED} --density 0.5 --remat", "dense", 4, 2),
        slow(SAMPLED, "sparse", 4, 1),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(line, name, data, model):
    want, of_one = alone(line, name)
    got, of_many = gradients(line, name, data, model)
    assert got == pytest.approx(want, rel=of_one_sign(BYTES))
    for a, b in zip(*map(jax.tree.leaves, (of_many, of_one)), strict=True):
        assert_close(a, b, TERMS + BYTES)


@pytest.mark.slow
def test_accumulated_gradients_over_a_mesh_are_those_of_one_device():
    """The first step has the rate zero: the moments say what the gradient was."""

    def stepped(data, model, accumulate):
        c = flags(SPARSE, data, model)
        team, runs = started(c)
        team.spread(runs)
        how = {"loss": team.losses["sparse"], "accumulate": accumulate}
        loss = transformer.train_step(*runs["sparse"], team.data(windows()), **how)
        team.gather(runs)
        return float(loss), jax.tree.leaves(nnx.state(runs["sparse"].optimizer))

    (want, of_one), (got, of_many) = stepped(1, 1, 1), stepped(2, 2, 2)
    assert got == pytest.approx(want, rel=of_one_sign(BYTES))
    for a, b in zip(of_many, of_one, strict=True):
        if a.dtype == jnp.float32:
            assert_close(a, b, 4 * (TERMS + BYTES))  # of a square: twice the error
        else:
            np.testing.assert_array_equal(a, b)  # steps


@pytest.mark.slow
def test_a_sampled_model_is_cut_too_and_draws_anew_in_every_step():
    """Each device samples its own features: no equality, but it learns."""
    c = flags(f"{SAMPLED} --sample 0.9", 1, 2)
    team, runs = started(c)
    team.spread(runs)
    data = team.data(windows())
    losses = [
        float(transformer.train_step(*runs["sparse"], data, loss=team.losses["sparse"]))
        for _ in range(12)
    ]
    assert losses[0] != losses[1]  # the first rate is 0
    assert losses[-1] < losses[0] - 1


# ----------------------------------------------------------------------------------- checkpoints


class Text:
    """The same bytes over and over, so that a few steps say something."""

    train = np.resize(np.frombuffer(b"abcde fgh\n", np.uint8), 300)


def stopped_run(c, folder, steps):
    """(losses, state) after some steps of a longer run, and a checkpoint of it."""
    team, runs = started(c)
    saved, losses = Checkpoints(folder, {}), []
    team.spread(runs)
    for step in range(steps):
        data = team.data(transformer.batch(c, Text, step))
        loss = transformer.train_step(*runs["sparse"], data, loss=team.losses["sparse"])
        losses.append(float(loss))
    saved.save(steps, team.states(runs), {"sparse": losses})
    saved.close()
    team.gather(runs)
    return losses, nnx.state(runs["sparse"])


def whole_run(c, folder):
    """(losses, state) of a run to its end."""
    team, runs = started(dataclasses.replace(c, resume=False))  # which compiles once for both
    losses = transformer.train(c, Text, runs, Checkpoints(folder, {}), team)["sparse"]
    return losses, nnx.state(runs["sparse"])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run on four devices that nobody stopped; one that was, and its checkpoint."""
    c, folder = flags(f"{SPARSE} --steps 4", 2, 2), tmp_path_factory.mktemp("four")
    with optax_promotes():
        whole = whole_run(c, folder / "whole")
        return whole, stopped_run(c, folder / "stopped", 2), folder / "stopped"


def test_a_run_resumed_on_as_many_devices_is_bitwise_the_uninterrupted_one(four, tmp_path):
    (losses, state), _, stopped = four
    folder = shutil.copytree(stopped, tmp_path / "copy")
    c = dataclasses.replace(flags(f"{SPARSE} --steps 4", 2, 2), resume=True)
    got, resumed = whole_run(c, folder)
    assert got == losses
    equal(resumed, state)


@pytest.mark.parametrize(("data", "model"), [(1, 1), slow(1, 2), slow(8, 1)])
def test_on_other_devices_a_checkpoint_loads_exactly_and_the_next_loss_is_the_same(
    four, data, model
):
    (losses, _), (_, state), folder = four
    c = flags(f"{SPARSE} --steps 4", data, model)
    team, runs = started(c)
    step, states, log = Checkpoints(folder, {}).restore({"sparse": nnx.state(runs["sparse"])})
    assert step == 2
    assert log["sparse"] == losses[:2]
    equal(states["sparse"], state)  # parameters, moments, the count of steps
    nnx.update(runs["sparse"], states["sparse"])
    team.spread(runs)
    equal(team.states(runs)["sparse"], state)
    data = team.data(transformer.batch(c, Text, step))  # the data position is the step
    loss = transformer.train_step(*runs["sparse"], data, loss=team.losses["sparse"])
    assert float(loss) == pytest.approx(losses[2], rel=of_one_sign(BYTES))


MISTAKES = {
    ("--heads 2", 1, 4): r"--heads 2 is no multiple of --tensor_parallel \(4\): try 4",
    ("", 3, 1): r"--batch 8 is no multiple of --data_parallel x --accumulate \(3\): try 6 or 9",
    ("--accumulate 2", 8, 1): r"--batch 8 is no multiple of .* \(16\)",
    ("--block 32 --density 1", 1, 2): "--tensor_parallel 2 does not divide the 1 blocks of the w",
    ("--batch 9", 9, 1): "--data_parallel 9 x --tensor_parallel 1 asks for 9 devices, and there",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_what_cannot_be_cut_is_refused(given):
    c = flags(*given)
    with pytest.raises(Mistake, match=MISTAKES[given]):
        Team(c, {"sparse": transformer.wide(c)})
