"""What is kept are the largest blocks, as many as asked for, bitwise as they were."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import bsjax.nnx
from models import _gpt2
from models import _prune as prune
from models._cli import Mistake
from tests.models import gpt2 as files

BLOCK = 8
EPS = float(np.finfo(np.float32).eps)
IDS = np.random.default_rng(1).integers(0, 37, (2, 9)).astype(np.int32)


class Net(nnx.Module):
    """Sizes that blocks divide and sizes that they do not, a list, a layer without a bias, and one
    that stays."""

    def __init__(self):
        rng = np.random.default_rng(0)

        def normal(key, shape, dtype):
            return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, dtype)

        def linear(k, m, **more):
            inits = {"kernel_init": normal, "bias_init": normal}
            return nnx.Linear(k, m, **inits, **more, rngs=nnx.Rngs(0))

        self.first = linear(32, 40)
        self.others = nnx.List([linear(40, 27), linear(27, 32, use_bias=False)])
        self.head = linear(32, 5)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        for layer in self.others:
            x = jnp.tanh(layer(x))
        return self.head(x)


GRIDS = {"first": (4, 5), "others.0": (5, 4), "others.1": (4, 4)}


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture(scope="module")
def found(net):
    return prune.weights(net, BLOCK)


def matrix(net, name):
    layer = {"first": net.first, "others.0": net.others[0], "others.1": net.others[1]}[name]
    return np.asarray(layer.kernel[...])


def blocks(array, grid):
    """Every block of a matrix, the last ones smaller."""
    return {
        (i, j): array[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        for i, j in itertools.product(*map(range, grid))
    }


def test_every_layer_but_the_head_is_pruned(net, found):
    assert {name: one.stored.shape for name, one in found.items()} == GRIDS
    assert all(one.stored.all() for one in found.values())
    for name, one in found.items():
        np.testing.assert_array_equal(one.matrix, matrix(net, name))


def test_norms_are_those_of_each_block_in_float64(net, found):
    for name, one in found.items():
        norms = one.norms()
        for place, inside in blocks(matrix(net, name), GRIDS[name]).items():
            want = np.linalg.norm(inside.astype(np.float64))
            assert norms[place] == pytest.approx(want, rel=1e-14, abs=0)


@pytest.mark.parametrize("density", [1.0, 0.75, 0.5, 0.25, 0.01])
def test_the_largest_blocks_of_each_layer_stay(net, found, density):
    kept = prune.by_magnitude(found, density)
    for name, grid in GRIDS.items():
        norms = {p: np.linalg.norm(b) for p, b in blocks(matrix(net, name), grid).items()}
        count = max(1, round(density * len(norms)))
        assert set(zip(*np.nonzero(kept[name]), strict=True)) == set(
            sorted(norms, key=lambda place: -norms[place])[:count]
        )


@pytest.mark.parametrize("density", [1.0, 0.6, 0.25])
def test_the_largest_blocks_of_all_layers_stay(net, found, density):
    scaled = dict(found)
    scaled["first"] = found["first"]._replace(matrix=3 * found["first"].matrix)
    kept = prune.by_magnitude(scaled, density, scope="global")
    norms = {
        (name, *place): np.linalg.norm(one) * (3 if name == "first" else 1)
        for name, grid in GRIDS.items()
        for place, one in blocks(matrix(net, name), grid).items()
    }
    best = sorted(norms, key=lambda place: -norms[place])[: round(density * len(norms))]
    assert {(n, *p) for n, m in kept.items() for p in zip(*np.nonzero(m), strict=True)} == set(best)


@pytest.mark.parametrize("scope", prune.SCOPES)
@pytest.mark.parametrize(("balance", "axis"), [("columns", 0), ("rows", 1)])
@pytest.mark.parametrize("density", [0.75, 0.4])
def test_balanced_lines_store_equally_many(found, scope, balance, axis, density):
    free = prune.by_magnitude(found, density, scope=scope)
    kept = prune.by_magnitude(found, density, scope=scope, balance=balance)
    for name, one in found.items():
        count, norms = int(free[name].sum()), one.norms()
        lines = kept[name].sum(axis)
        assert kept[name].sum() == count  # as many as without
        assert lines.max() - lines.min() <= 1
        # of each line its largest blocks, and one more where the next is largest
        for norm, mask in zip(
            np.moveaxis(norms, axis, -1), np.moveaxis(kept[name], axis, -1), strict=True
        ):
            assert norm[mask].min(initial=np.inf) > norm[~mask].max(initial=-np.inf)
        fewest = count // len(lines)
        following = -np.sort(-norms, axis).take(fewest, axis)
        more = set(np.argsort(-following)[: count - fewest * len(lines)])
        assert set(np.flatnonzero(lines > fewest)) == more


def test_the_first_of_equals_stays():
    np.testing.assert_array_equal(prune.keep(np.ones((2, 3)), 4), [[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize("balance", prune.BALANCES)
def test_random_blocks_are_as_many_in_every_layer(found, balance):
    like = prune.by_magnitude(found, 0.4, scope="global")
    drawn, same, other = (
        prune.at_random(found, like, balance=balance, seed=seed) for seed in (0, 0, 1)
    )
    for name, mask in like.items():
        assert drawn[name].sum() == mask.sum()
        np.testing.assert_array_equal(drawn[name], same[name])
    assert any((drawn[name] != other[name]).any() for name in like)
    assert any((drawn[name] != like[name]).any() for name in like)


def test_random_blocks_are_anywhere_equally_often(found):
    like, times = prune.by_magnitude(found, 0.5), 400
    often = sum(prune.at_random(found, like, seed=s)["first"].astype(int) for s in range(times))
    # ten of 20 blocks each time: hypergeometric, five deviations
    assert abs(often - times / 2).max() < 5 * np.sqrt(times / 4)


def test_kept_values_are_bitwise_those_of_the_dense_weight(net, found):
    before = jax.tree.map(np.array, nnx.state(net))
    kept = prune.by_magnitude(found, 0.5)
    model = prune.pruned(net, kept, BLOCK)
    layers = prune.linears(model)
    assert list(layers) == list(GRIDS)
    for name, layer in layers.items():
        assert type(layer) is bsjax.nnx.BlockLinear
        p = layer.pattern.get_value()
        np.testing.assert_array_equal(p.mask(), kept[name])
        inside, full = blocks(matrix(net, name), GRIDS[name]), np.zeros((BLOCK, BLOCK))
        for i, j, values in zip(
            p.row.tolist(), p.col.tolist(), np.asarray(layer.values[...]), strict=True
        ):
            full = np.zeros((BLOCK, BLOCK), np.float32)
            full[: inside[i, j].shape[0], : inside[i, j].shape[1]] = inside[i, j]
            np.testing.assert_array_equal(values, full)
    np.testing.assert_array_equal(model.first.bias[...], net.first.bias[...])
    assert model.others[1].bias is None
    assert type(model.head) is nnx.Linear
    # and the dense model is what it was, with arrays of its own
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(net)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.head.kernel[...] is not net.head.kernel[...]
    assert model.first.bias[...].unsafe_buffer_pointer() != (
        net.first.bias[...].unsafe_buffer_pointer()
    )


def masked(net, kept):
    """The dense model with zeros in the place of the blocks that go."""
    model = prune.clone(net)
    for name, layer in prune.linears(model).items():
        wide = np.kron(kept[name], np.ones((BLOCK, BLOCK)))
        k, m = layer.kernel.shape
        layer.kernel[...] = layer.kernel[...] * wide[:k, :m].astype(np.float32)
    return model


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_pruned_model_is_the_dense_one_with_zeros(net, found, density):
    kept = prune.by_magnitude(found, density, balance="columns")
    x = jax.random.normal(jax.random.key(0), (6, 32))
    dense = net if density == 1 else masked(net, kept)
    # three layers of sums over at most 40 numbers, of size one
    np.testing.assert_allclose(
        prune.pruned(net, kept, BLOCK)(x), dense(x), rtol=0, atol=3 * 40 * EPS
    )


def test_a_pruned_model_is_pruned_further(net, found):
    half = prune.pruned(net, prune.by_magnitude(found, 0.5), BLOCK)
    again = prune.weights(half, BLOCK)
    for name, one in again.items():
        np.testing.assert_array_equal(one.stored, prune.by_magnitude(found, 0.5)[name])
    straight, stepwise = (prune.by_magnitude(f, 0.25) for f in (found, again))
    for name in GRIDS:
        np.testing.assert_array_equal(straight[name], stepwise[name])
    a, b = (prune.pruned(model, kept, BLOCK) for model, kept in ((net, straight), (half, stepwise)))
    for x, y in zip(*(jax.tree.leaves(nnx.state(one)) for one in (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)
    # what is gone is not drawn either, and cannot be asked for
    drawn = prune.at_random(again, stepwise, seed=0)
    assert not any((drawn[name] & ~again[name].stored).any() for name in GRIDS)
    more = prune.by_magnitude(again, 0.75, balance="rows")
    for name in GRIDS:
        np.testing.assert_array_equal(more[name], again[name].stored)
    with pytest.raises(Mistake, match=r"layer first has blocks of 8 x 8 already: give --block 8"):
        prune.weights(half, 4)


def test_a_block_fits_into_every_layer(net):
    with pytest.raises(
        Mistake, match=r"--block 28 is larger than a side of the layer others.0, 40"
    ):
        prune.weights(net, 28)


def test_the_share_counts_weights_and_no_padding(found):
    everything = {name: one.stored for name, one in found.items()}
    assert prune.share(everything, found) == 1
    corner = {name: np.zeros_like(one.stored) for name, one in found.items()}
    corner["others.0"][4, 3] = True  # 8 rows of 3 columns
    total = 32 * 40 + 40 * 27 + 27 * 32
    assert prune.share(corner, found) == 8 * 3 / total


def test_saliencies_are_what_a_loss_would_change_by():
    """Of a loss that is linear in the weights, exactly: with each block set to zero in turn."""
    net, rng = Net(), np.random.default_rng(0)
    params = nnx.state(net, nnx.Param)
    slopes = [jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), params)] * 2
    slopes[1] = jax.tree.map(lambda g: jnp.flip(g, 0), slopes[0])
    scores = prune.saliencies(net, iter(slopes), BLOCK)
    assert list(scores) == list(GRIDS)
    for name, grid in GRIDS.items():
        path = tuple(int(key) if key.isdigit() else key for key in name.split("."))
        grads = [np.asarray(dict(nnx.to_flat_state(s))[*path, "kernel"][...]) for s in slopes]
        for place, block in blocks(matrix(net, name), grid).items():
            products = [blocks(g, grid)[place].astype(np.float64) * block for g in grads]
            changes = np.array([product.sum() for product in products])
            # a product is rounded once; their sums are float64
            error = EPS / 2 * np.array([np.abs(product).sum() for product in products])
            bound = np.mean(2 * np.abs(changes) * error + error**2)
            want = np.mean(np.square(changes))
            assert scores[name][place] == pytest.approx(want, rel=1e-14, abs=bound)
    # of what has been pruned, the blocks that are left have the same, bit by bit
    found = prune.weights(net, BLOCK)
    half = prune.pruned(net, prune.by_magnitude(found, 0.5), BLOCK)
    ones = [jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)) for model in (net, half)]
    full, left = (prune.saliencies(m, [g], BLOCK) for m, g in zip((net, half), ones, strict=True))
    for name, mask in prune.by_magnitude(found, 0.5).items():
        np.testing.assert_array_equal(left[name][mask], full[name][mask])
        assert (left[name][~mask] == -np.inf).all()


def test_nothing_to_prune_is_said():
    with pytest.raises(Mistake, match="the model has no linear layers to prune"):
        prune.weights(nnx.List([nnx.Embed(3, 4, rngs=nnx.Rngs(0))]), BLOCK)


# ------------------------------------------------------------------------------------ of GPT-2


@nnx.jit
def run(model, ids):
    return model(ids)


def test_a_gpt2_keeps_its_arithmetic(tmp_path):
    """Against the oracle, whose weights are zero where blocks went."""
    made = files.tensors(hidden=36, layers=1)
    model, _ = _gpt2.load(files.write(tmp_path, made))
    kept = prune.by_magnitude(prune.weights(model, BLOCK), 0.5, scope="global", balance="rows")
    sparse = prune.pruned(model, kept, BLOCK)
    assert sorted(kept) == [
        *(f"layers.0.attention.{name}" for name in ("key", "out", "query", "value")),
        "layers.0.mlp.down",
        "layers.0.mlp.up",
    ]
    assert type(sparse.layers[0].mlp) is bsjax.nnx.BlockMLP
    zeroed = dict(made)
    names = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for name, mask in kept.items():
        part = name.removeprefix("layers.0.")
        wide = np.kron(mask, np.ones((BLOCK, BLOCK), np.float32))
        if part in names:
            weight = made[f"h.0.{names[part]}.weight"]
            zeroed[f"h.0.{names[part]}.weight"] = weight * wide[: len(weight), : weight.shape[1]]
        else:
            at = {"attention.query": 0, "attention.key": 24, "attention.value": 48}[part]
            qkv = zeroed["h.0.attn.c_attn.weight"].copy()
            qkv[:, at : at + 24] *= wide
            zeroed["h.0.attn.c_attn.weight"] = qkv
    want = files.logits(zeroed, IDS, 3, 1e-3)
    # five products in a row, whose longest sum is over 36 numbers, and 24 in the end
    rounding = EPS * (5 * 36 + 24) * want.std()
    np.testing.assert_allclose(run(sparse, IDS), want, rtol=0, atol=rounding)
