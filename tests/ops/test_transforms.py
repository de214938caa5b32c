"""Products under every transformation: jit, vmap, scan, remat, and topology that changes."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from tests.helpers import (
    FEW,
    MANY,
    SHARED,
    Case,
    Inputs,
    assert_close,
    hub_mask,
    normal,
    products,
    random_mask,
)

COMPILED = collections.Counter()


@jax.monitoring.register_event_duration_secs_listener
def _count(event, _seconds, **_):
    COMPILED[event] += 1


def compilations():
    return COMPILED["/jax/core/compile/backend_compile_duration"]


# three topologies of one size, one with room to spare
MASKS = [random_mask(5, 3, 0.4, seed=1), random_mask(5, 3, 0.2, seed=2), hub_mask(5, 3)]
SEVERAL = {n: [Case(mask=mask, n=n, capacity=9) for mask in MASKS] for n in (FEW, MANY)}
TERMS = {n: max(case.terms for case in cases) for n, cases in SEVERAL.items()}


def stacked(n):
    """Inputs with a leading axis on every leaf, patterns too, and no two alike."""
    drawn = [case.inputs() for case in SEVERAL[n]]
    scale = jnp.arange(1.0, 4.0)
    inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    return inputs._replace(x=inputs.x * scale[:, None, None])


def take(inputs, i, axes):
    """Element `i` of the arguments that `axes` marks, and the others as they are."""

    def picked(argument, axis):
        return argument if axis is None else jax.tree.map(lambda leaf: leaf[i], argument)

    return Inputs(*map(picked, inputs, axes))


xla = functools.partial(products, implementation="xla")


AXES = {
    "all, few tokens": (FEW, Inputs(0, 0, 0, 0)),
    "x and values": (MANY, Inputs(None, 0, 0, 0)),
    "values and patterns": (MANY, Inputs(0, None, 0, None)),
}
MORE_AXES = {
    "x": (MANY, Inputs(None, 0, None, 0)),
    "x, few tokens": (FEW, Inputs(None, 0, None, None)),
    "values, few tokens": (FEW, Inputs(None, None, 0, None)),
    "patterns": (MANY, Inputs(0, None, None, None)),
}


@pytest.mark.parametrize(
    ("n", "axes"),
    [*AXES.values(), *(pytest.param(*axes, marks=pytest.mark.slow) for axes in MORE_AXES.values())],
    ids=[*AXES, *MORE_AXES],
)
def test_vmap(n, axes):
    """Over any of x, values and patterns; the gradients are vmapped with the rest."""
    shared = Inputs(*(None if axis == 0 else 0 for axis in axes))
    inputs = take(stacked(n), 0, shared)
    got = jax.jit(jax.vmap(xla, in_axes=(axes,)))(inputs)
    for i in range(3):
        for g, w in zip(got, xla(take(inputs, i, axes)), strict=True):
            assert_close(g[i], w, 3 * TERMS[n])


def test_nested_vmap():
    """Heads with a pattern each, over a batch: `x[b, h, n, k]`, `values[h, e, br, bc]`."""
    p, x, values, _ = stacked(FEW)
    x = jnp.stack([x, 2 * x[::-1]])
    heads = jax.vmap(lambda x, v, p: bsjax.matmul(x, v, p, implementation="xla"))
    got = jax.jit(jax.vmap(heads, in_axes=(0, None, None)))(x, values, p)
    for b in range(2):
        for h in range(3):
            pattern = jax.tree.map(lambda leaf, h=h: leaf[h], p)
            want = bsjax.matmul(x[b, h], values[h], pattern, implementation="xla")
            assert_close(got[b, h], want, 6 * TERMS[FEW])


def test_gradient_of_vmap_is_summed():
    """Values shared by a batch: vmap over x, then differentiate."""
    p, x, values, dy = SEVERAL[MANY][0].inputs()
    xs, dys = jnp.stack([x, -2 * x]), jnp.stack([dy, dy + 1])

    @jax.jit
    def gradient(values):
        def batch(values):
            return jax.vmap(lambda x: bsjax.matmul(x, values, p, implementation="xla"))(xs)

        return jax.vjp(batch, values)[1](dys)[0]

    want = bsjax.sddmm(xs, dys, p, implementation="reference")
    assert_close(gradient(values), want, 4 * TERMS[MANY])


def test_scan_over_chunks_of_tokens():
    """The sum of the gradients of chunks is the gradient of all tokens."""
    p, x, values, dy = SHARED["random, 7 tokens"].inputs()
    rng = np.random.default_rng(1)
    xs, dys = normal(rng, (4, *x.shape)), normal(rng, (4, *dy.shape))

    @jax.jit
    def scanned(xs, dys):
        def step(total, chunk):
            y, _, dvalues = xla(Inputs(p, chunk[0], values, chunk[1]))
            return total + dvalues, y

        return jax.lax.scan(step, jnp.zeros_like(values), (xs, dys))

    total, ys = scanned(xs, dys)
    terms = 4 * SHARED["random, 7 tokens"].terms
    assert_close(ys, bsjax.matmul(xs, values, p, implementation="reference"), terms)
    assert_close(total, bsjax.sddmm(xs, dys, p, implementation="reference"), terms)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda f: f, id="scan", marks=pytest.mark.slow),
        pytest.param(jax.checkpoint, id="scan of remat"),
    ],
)
def test_scan_over_layers(wrap):
    """Stacked layers, each with a pattern of its own, and the gradient through all of them."""
    masks = [random_mask(4, 4, 0.5, seed) for seed in range(3)]
    cases = [Case(mask=mask, n=MANY, capacity=10) for mask in masks]
    drawn = [case.inputs() for case in cases]
    p, x, values, dy = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    x, dy, values = x[0], dy[0], values / 4  # of unit size through all layers

    def layers(x, values, implementation):
        @wrap
        def layer(x, arguments):
            return bsjax.matmul(x, *arguments, implementation=implementation), None

        return jax.lax.scan(layer, x, (values, p))[0]

    def loop(x, values):
        for i in range(3):
            pattern = jax.tree.map(lambda leaf, i=i: leaf[i], p)
            x = bsjax.matmul(x, values[i], pattern, implementation="reference")
        return x

    @functools.partial(jax.jit, static_argnums=0)
    def all_three(f, x, values):
        y, pull = jax.vjp(f, x, values)
        return y, *pull(dy)

    got = all_three(lambda x, v: layers(x, v, "xla"), x, values)
    want = all_three(loop, x, values)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 3 * MANY)


def test_remat_changes_no_gradient():
    case = SHARED["random, 137 tokens"]
    p, x, values, dy = case.inputs()

    @jax.jit
    def remat(x, values):
        f = jax.checkpoint(
            lambda x, v: bsjax.matmul(x, v, p, implementation="xla"),
            policy=jax.checkpoint_policies.nothing_saveable,
        )
        y, pull = jax.vjp(f, x, values)
        return y, *pull(dy)

    for g, w in zip(remat(x, values), xla(Inputs(p, x, values, dy)), strict=True):
        assert_close(g, w, case.terms)


@pytest.mark.parametrize(
    ("implementation", "n"), [("xla", FEW), ("xla", MANY), ("dense", FEW), ("auto", MANY)]
)
def test_moving_blocks_compiles_nothing(implementation, n):
    """Three topologies of equal capacity: traced once and compiled once, gradients too."""
    traced = []

    @jax.jit
    def f(inputs):
        traced.append(None)
        return products(inputs, implementation=implementation)

    first, *others = (case.inputs() for case in SEVERAL[n])
    jax.block_until_ready(f(first))
    before = compilations()
    for inputs in others:
        jax.block_until_ready(f(inputs))
    assert compilations() == before
    assert len(traced) == 1
    assert f._cache_size() == 1


@pytest.mark.parametrize("n", [FEW, MANY])
def test_moving_blocks_compiles_nothing_outside_jit(n):
    """Eager calls too: what they run was compiled for the sizes, not for the coordinates."""
    first, *others = (case.inputs() for case in SEVERAL[n])

    def both(inputs):
        p, x, values, dy = inputs
        y = bsjax.matmul(x, values, p, implementation="xla")
        return jax.block_until_ready((y, bsjax.sddmm(x, dy, p, implementation="xla")))

    both(first)
    before = compilations()
    for inputs in others:
        both(inputs)
    assert compilations() == before


def test_changing_the_capacity_compiles_again():
    """The counter counts: what the tests above do not see would be seen."""
    case = Case(mask=MASKS[0], capacity=9)
    more = Case(mask=MASKS[0], capacity=10)
    f = jax.jit(lambda inputs: bsjax.matmul(inputs.x, inputs.values, inputs.p))
    f(case.inputs())
    inputs, before = more.inputs(), compilations()
    f(inputs)
    assert compilations() > before
    assert f._cache_size() == 2


def test_a_pattern_built_inside_jit():
    """From a traced mask, with capacity: the same numbers as from one that Python sees."""
    case = SEVERAL[MANY][1]
    inputs = case.inputs()

    @jax.jit
    def f(mask, inputs):
        p = bsjax.BlockPattern.from_mask(mask, case.block, capacity=case.capacity)
        return xla(inputs._replace(p=p))

    for g, w in zip(f(jnp.asarray(case.mask), inputs), xla(inputs), strict=True):
        np.testing.assert_array_equal(g, w)
