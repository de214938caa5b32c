"""What a residual network is made of: published sizes, equal ones of twice the depth, patterns."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from models import _resnet_plan as plan
from models._cli import Mistake
from models._resnet import ResNet
from tests.helpers import slow

# parameters, as published: 0.27, 0.46, 0.66, 0.85 and 1.7 million (He et al. 2016, table 6), 2.7
# and 36.5 (Zagoruyko and Komodakis 2016, table 5), here to the last digit
PUBLISHED = {
    "resnet-20": 269_722,
    "resnet-32": 464_154,
    "resnet-44": 658_586,
    "resnet-56": 853_018,
    "resnet-110": 1_727_962,
    "wrn-16-4": 2_748_890,
    "wrn-28-10": 36_479_194,
}
DEPTHS = {"resnet-20": 20, "resnet-110": 110, "wrn-16-4": 16, "wrn-28-10": 28, "resnet-50": 50}


def made(size, channels=3, classes=10):
    """A network without memory for it."""
    return nnx.eval_shape(lambda: ResNet(size, channels, classes, 0))


def count(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert plan.costs(plan.named(name)).parameters == PUBLISHED[name]


def test_the_network_of_imagenet_has_its_published_size_and_operations():
    found = plan.costs(plan.named("resnet-50"), side=224, classes=1000)
    assert found.parameters == 25_557_032
    assert found.flops == 2 * 4_089_184_256  # with the stride in the middle: 4.09e9 products
    assert count(made(plan.named("resnet-50"), classes=1000)) == 25_557_032


@pytest.mark.parametrize("name", DEPTHS)
def test_a_name_says_the_depth(name):
    assert plan.depth(plan.named(name)) == DEPTHS[name]


SIZES = {
    "basic": plan.named("resnet-20"),
    "wide": plan.named("wrn-16-4"),
    "deeper": plan.deeper(plan.named("wrn-16-4"), (0.5,), match=True),
    "by stage": plan.with_density(plan.named("wrn-10-4"), (1.0, 0.5, 0.25)),
    "deeper basic": plan.deeper(plan.named("resnet-8")._replace(block=4), (0.5,), match=True),
    "bottleneck": plan.with_density(plan.named("resnet-50"), (0.5,))._replace(blocks=(1, 1, 1, 1)),
}


LARGE = ("deeper", "bottleneck")


@pytest.mark.parametrize("name", [slow(name) if name in LARGE else name for name in SIZES])
def test_the_formula_counts_what_the_network_has(name):
    assert count(made(SIZES[name])) == plan.costs(SIZES[name]).parameters


@pytest.mark.parametrize("name", ["resnet-8", "wrn-10-2", slow("resnet-50")])
def test_operations_are_those_of_the_traced_network(name):
    graph, state = nnx.split(made(plan.named(name), 1))
    x = jax.ShapeDtypeStruct((1, 20, 20, 1), np.float32)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state, copy=True)(x))(state, x)
    total = 0
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            window = math.prod(equation.invars[1].aval.shape[:3])  # taps and channels in
            total += 2 * window * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "dot_general":
            total += 2 * math.prod(equation.invars[1].aval.shape)
    assert total == plan.costs(plan.named(name), side=20, channels=1).flops


def equations(jaxpr):
    for equation in jaxpr.eqns:
        inner = [
            p.jaxpr for p in equation.params.values() if isinstance(p, jax.extend.core.ClosedJaxpr)
        ]
        for one in inner:
            yield from equations(one)
        if not inner:
            yield equation


# ---------------------------------------------------------------------------------- twice the depth


PAIRS = {
    "wrn-16-4": plan.named("wrn-16-4"),
    "in blocks of 32": plan.named("wrn-16-8")._replace(block=32),
    "wrn-28-10": plan.named("wrn-28-10")._replace(block=32),
    "resnet-20": plan.named("resnet-20")._replace(block=4),
}


@pytest.mark.parametrize("name", PAIRS)
def test_twice_the_depth_costs_the_same(name):
    base = PAIRS[name]
    deep = plan.deeper(base, (0.5,), match=True)
    assert deep.blocks == tuple(2 * n for n in base.blocks)
    assert deep._replace(blocks=base.blocks, densities=()) == base  # nothing else differs
    assert all(0.4 < density <= 0.5 for density in deep.densities)
    one, other = plan.costs(base), plan.costs(deep)
    assert other.parameters / one.parameters == pytest.approx(1, abs=0.005)  # gains and offsets
    assert other.flops == one.flops


def test_a_density_is_the_most():
    base = plan.named("wrn-16-4")
    deep = plan.deeper(base, (0.5, 0.25, 0.125), match=True)
    assert deep.densities == (pytest.approx(3 / 7, rel=np.finfo(float).eps, abs=0), 0.25, 0.125)
    assert plan.deeper(base, (0.5,), match=False).densities == (0.5,) * 3
    dense = plan.deeper(base, (1.0,), match=False)
    assert (dense.densities, dense.blocks) == ((), (4, 4, 4))


def test_what_rounding_leaves_over_goes_into_the_next_convolution():
    (stage,) = plan.stages_of(plan.Size("basic", (4,), (16,), densities=(0.45,), block=4))
    stored = [conv.stored for block in stage for conv in block.convs]
    assert sum(stored) == round(8 * 16 * 0.45)
    assert set(stored) == {7, 8}


def test_projections_and_what_is_too_narrow_stay_dense():
    size = plan.with_density(plan.named("wrn-10-4"), (0.5,))
    for stage in plan.stages_of(size):
        assert stage[0].projection is not None
        assert stage[0].projection.stored is None
    first, second = plan.stages_of(size)[0][0].convs
    assert (first.k, first.stored) == (16, None)  # a single block of channels in
    assert (second.k, second.stored) == (64, 8)


# ----------------------------------------------------------------------------------------- patterns

GRIDS = {(4, 4): 7, (8, 8): 30, (4, 8): 14, (8, 4): 15, (16, 16): 60, (2, 4): 4}


@pytest.mark.parametrize("pattern", plan.PATTERNS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_pattern_stores_exactly_as_many_blocks(pattern, grid):
    mask = plan.mask(pattern, grid, GRIDS[grid], seed=3)
    assert mask.shape == grid
    assert mask.sum() == GRIDS[grid]
    np.testing.assert_array_equal(mask, plan.mask(pattern, grid, GRIDS[grid], seed=3))
    assert mask.any(0).all()  # no channel out without an input


def test_rings_keep_the_diagonal():
    mask = plan.mask("watts_strogatz", (16, 16), 50, seed=0, rewired=0.0)
    apart = np.abs(np.arange(16) - np.arange(16)[:, None])
    ring = np.minimum(apart, 16 - apart) <= 1
    assert mask[ring].all()  # 48, and two more anywhere
    assert mask.sum() == 50


def test_shuffled_parts_read_from_all_parts_of_the_layer_before():
    mask = plan.mask("block_diagonal", (8, 8), 32, seed=0).astype(int)
    assert np.linalg.matrix_rank(mask) == 2  # two parts, and nothing else
    assert (mask @ mask > 0).all()  # two layers mix all


def test_layers_and_seeds_have_patterns_of_their_own():
    size = plan.with_density(plan.named("wrn-10-4"), (0.5,))
    first, other = list(plan.masks(size, 0)), list(plan.masks(size, 1))
    assert len(first) == 5
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_stage_has_the_pattern_that_it_was_given():
    size = plan.with_density(plan.named("wrn-10-4"), (0.5,))
    mixed = size._replace(patterns=("balanced", "block_diagonal", "balanced"))
    convs = [len(stage[0].convs) for stage in plan.stages_of(size)]
    stages = [i for i, n in enumerate(convs) for _ in range(n)][-5:]  # the first conv is dense
    found = zip(stages, plan.masks(size, 0), plan.masks(mixed, 0), strict=True)
    assert {i for i, one, other in found if (one != other).any()} == {1}


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["resnet-21", "wrn-17-2", "resnet", "wrn-16", "resnet-2", "vgg"])
def test_an_unknown_network_is_named(name):
    with pytest.raises(Mistake, match=f"--network {name} is not known: give resnet-20 to"):
        plan.named(name)


def test_densities_and_blocks_that_do_not_fit():
    base = plan.named("wrn-16-4")
    with pytest.raises(Mistake, match="--density has 2 values, but the network 3 stages: give one"):
        plan.with_density(base, (0.5, 0.25))
    with pytest.raises(Mistake, match="stage 1, 64 channels wide, has no room for twice the depth"):
        plan.deeper(base._replace(block=64), (0.5,), match=True)
    odd = plan.with_density(base._replace(block=12), (0.5,))
    with pytest.raises(Mistake, match="--block 12 does not divide the 64 channels into a conv"):
        plan.stages_of(odd)
