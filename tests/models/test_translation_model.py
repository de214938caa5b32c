"""The model: what sees what, the cache, its searches, and a step of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import _beam as beams
from models import _translation as models
from models import _translation_train as training
from models._buckets import Batch
from models._parallel_text import BOS, EOS, PAD
from models._translation import Translator
from models._translation_train import Run, Training
from tests.helpers import of_one_sign, tolerance
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module
from tests.models.translation_runs import (
    SIZE,
    beam_by_hand,
    tokens,
    unpadded,
)
from tests.transformer.oracle import assert_close

# sums of products between a token and a logit, one after another
TERMS = SIZE.layers * 2 * (4 * SIZE.width + 2 * SIZE.hidden) + SIZE.width
LABELS = 13  # of `batch()`, whose losses and gradients are summed
VARIANTS = {
    "rotary": SIZE,
    "learned, gated, window": SIZE._replace(
        positions="learned", gated=True, attention="window", window=2
    ),
}
LENGTHS = np.array([5, 3, 8], np.int32)


def ready(size, seed=0):
    model = Translator(size, seed)
    model.eval()
    return model


@functools.cache
def model(name):
    return ready(VARIANTS[name])


def sources(width=8):
    source = tokens(3, 8)
    source[np.arange(8) >= LENGTHS[:, None]] = PAD
    return np.pad(source, ((0, 0), (0, width - 8)))


forward = nnx.jit(lambda model, *args: model(*args))


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_with_a_cache_is_decoding_without(name):
    one, target = model(name), tokens(3, 6, seed=1)
    whole = forward(one, sources(), LENGTHS, target)
    encoded, other = nnx.jit(lambda one: one.encode(sources(), LENGTHS))(one), nnx.clone(one)
    other.init_cache(encoded, 6)

    @nnx.jit
    def step(other, token, at):
        return other.decode(token, None, LENGTHS, at=at)

    steps = [step(other, target[:, i : i + 1], jnp.int32(i)) for i in range(6)]
    assert_close(jnp.concatenate(steps, axis=1), whole, TERMS)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    """Behind sources and targets, and what lies in it: bitwise where the sizes are the same."""
    one, target = model(name), tokens(3, 6, seed=1)
    rows = forward(one, sources(), LENGTHS, target)
    dirt = np.where(np.arange(8) < LENGTHS[:, None], sources(), 7).astype(np.int32)
    np.testing.assert_array_equal(forward(one, dirt, LENGTHS, target), rows)
    wide = forward(one, sources(12), LENGTHS, np.pad(target, ((0, 0), (0, 4))))
    assert_close(wide[:, :6], rows, TERMS)
    # and a sentence does not see the others of its batch
    order = [1, 0, 1]
    others = forward(one, sources()[order], LENGTHS[order], target[order])
    np.testing.assert_array_equal(others[0], rows[1])


def test_a_token_sees_nothing_behind_it_and_everything_of_the_source():
    one, target = model("rotary"), tokens(3, 6, seed=1)
    rows = forward(one, sources(), LENGTHS, target)
    other = target.copy()
    other[:, 3] = (other[:, 3] - 2) % 9 + 3
    changed = forward(one, sources(), LENGTHS, other)
    np.testing.assert_array_equal(changed[:, :3], rows[:, :3])
    assert (np.abs(changed - rows).max((0, 2))[3:] > 1e-4).all()
    source = sources()
    source[0, 4] = (source[0, 4] - 2) % 9 + 3
    changed = np.abs(forward(one, source, LENGTHS, target) - rows).max(-1)
    assert (changed[0] > 1e-5).all()
    assert (changed[1:] == 0).all()


@nnx.jit
def after(one, source, lengths, prefix, at):
    return beams.log_p(one(source, lengths, prefix)[0, at])


@pytest.mark.parametrize("beam", [0, 2])
def test_searching_with_a_cache_is_searching_over_whole_prefixes(beam):
    one = model("rotary")
    found = models.translate(one, sources(), LENGTHS, beam=beam, alpha=0.6)
    longest = int(models.limits(LENGTHS).max())
    for i in range(2):

        def log_p(prefix, i=i):
            padded = np.full((1, longest), PAD, np.int32)
            padded[0, : len(prefix)] = prefix
            source, lengths = sources()[i : i + 1], LENGTHS[i : i + 1]
            return np.asarray(after(one, source, lengths, padded, len(prefix) - 1))

        limit = int(models.limits(LENGTHS)[i])
        (_, best), *_ = beam_by_hand(log_p, max(beam, 1), limit, 0.6)
        assert (*found[i], EOS) == best


def test_a_translation_does_not_depend_on_its_batch():
    one, order = model("rotary"), [1, 2, 1]
    found = models.translate(one, sources(), LENGTHS, beam=2)
    assert models.translate(one, sources(12), LENGTHS, beam=2) == found
    others = models.translate(one, sources()[order], LENGTHS[order], beam=2)
    assert others == [found[i] for i in order]


# -------------------------------------------------------------------------- a step of training


TRAINING = Training(10, 0.01, "cosine", 0.2, 0.1, 1.0, 0.9, 1)


def batch(n=4):
    target = tokens(n, 6, seed=2)
    target[:, 0], target[:, -1] = BOS, EOS
    target[1, 3:] = [EOS, PAD, PAD]
    lengths = np.array([5, 3, 8, 0], np.int32)[:n]  # the last row is filled up
    target[3] = PAD
    return Batch(np.vstack([sources(), tokens(1, 8)]), lengths, target)


def test_smoothed_losses_are_cross_entropies_with_smoothed_labels():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    labels = np.array([[3, 4, EOS], [4, EOS, PAD]])
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    smoothed = 0.9 * np.eye(5)[labels] + 0.1 / 5
    expected = -(smoothed * np.log(p)).sum(-1)
    expected[1, 2] = 0
    got = training.losses(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(got, expected, **tolerance(jnp.float32, 5))
    exact = -np.log(np.take_along_axis(p, labels[..., None], -1))[..., 0]
    exact[1, 2] = 0
    got = training.losses(jnp.asarray(logits), jnp.asarray(labels), 0.0)
    np.testing.assert_allclose(got, exact, **tolerance(jnp.float32, 5))


def test_rates_rise_along_a_line_and_fall_as_they_say():
    root = training.schedule("inverse_sqrt", 0.1, 100)
    np.testing.assert_allclose([root(5), root(10), root(40), root(90)], [0.5, 1, 0.5, 1 / 3])
    cosine = training.schedule("cosine", 0.1, 100)
    found = [cosine(5), cosine(10), cosine(55), cosine(100)]
    # the cosine, its product and its sum are rounded, and are one at most
    bound = 3 / 2 * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(found, [0.5, 1, 0.51, 0.02], rtol=0, atol=bound)


@pytest.fixture(scope="module")
def stepped():
    """Three steps by the recipe, and by optax and plain autodiff."""
    run = Run.start(SIZE, TRAINING, 0)
    graph, params, rest = nnx.split(run.model, nnx.Param, ...)
    params, rest = jax.tree.map(jnp.copy, (params, rest))
    rate = optax.warmup_cosine_decay_schedule(0, 0.01, 2, 10, 0.01 / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98, eps=1e-9))
    moments, average, found = tx.init(params), params, []

    @jax.jit
    def step(params, moments):
        def loss(params):
            source, lengths, target = batch()
            logits = nnx.merge(graph, params, rest)(source, lengths, target[:, :-1])
            smoothed = optax.smooth_labels(jax.nn.one_hot(target[:, 1:], SIZE.vocabulary), 0.1)
            each = optax.softmax_cross_entropy(logits, smoothed)
            return each.sum(where=target[:, 1:] != PAD) / (target[:, 1:] != PAD).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(gradient, moments, params)
        return value, gradient, optax.apply_updates(params, updates), moments

    gradients = []
    for i in range(3):
        own = run.step(batch())
        value, gradient, params, moments = step(params, moments)
        gradients.append(gradient)
        share = max(1 - 0.9, 9 / (10 + i))
        average = jax.tree.map(lambda a, b: share * a + (1 - share) * b, params, average)  # noqa: B023
        found.append((float(own), float(value)))
    return run, found, params, average, gradients


def assert_stepped_alike(a, b):
    """Adam moves a parameter by the rate times its gradient, which is scaled to unit size."""
    bound = tolerance(jnp.float32, TERMS + LABELS)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=3 * bound["rtol"], atol=3 * 0.01 * bound["atol"])


def test_a_step_is_clipped_adam_on_all_labels(stepped):
    run, losses, params, average, _ = stepped
    for own, expected in losses:
        assert own == pytest.approx(expected, rel=of_one_sign(TERMS + LABELS))
    assert_stepped_alike(nnx.state(run.model, nnx.Param), params)
    assert_stepped_alike(nnx.state(run.averaged(), nnx.Param), average)
    assert run.model.dropout.deterministic is False
    assert run.averaged().dropout.deterministic is True


def test_parts_of_a_batch_and_remat_give_the_same_gradient(stepped):
    one = Translator(SIZE._replace(remat=True), 0)
    count = float((batch().target[:, 1:] != PAD).sum())

    @nnx.jit
    def gradient(one):
        def loss(one, part):
            return training.total(one, part, 0.1) / count

        return training.accumulated(loss, one, batch(), 2)

    value, found = gradient(one)
    assert count == LABELS
    assert float(value) == pytest.approx(stepped[1][0][1], rel=of_one_sign(TERMS + LABELS))
    for x, y in zip(*map(jax.tree.leaves, (found, stepped[4][0])), strict=True):
        assert_close(x, y, TERMS + LABELS)


@pytest.mark.parametrize("kind", ["sampled, dropout", "block-sparse", "bfloat16"])
@pytest.mark.slow
def test_every_kind_of_model_learns(kind):
    size = {
        "sampled, dropout": SIZE._replace(fraction=0.75, dropout=0.1),
        "block-sparse": SIZE._replace(density=0.5, block=8),
        "bfloat16": SIZE._replace(dtype="bfloat16", attention="longformer", window=2),
    }[kind]
    run = Run.start(size, TRAINING._replace(steps=60, accumulate=2), 0)
    losses = [float(run.step(batch())) for _ in range(60)]
    assert losses[-1] < losses[0] - 0.7
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(run.average))
    rows = models.translate(run.averaged(), sources(), LENGTHS, beam=2)
    assert len(rows) == 3
    assert unpadded([*rows[0], EOS])[-1] == EOS
