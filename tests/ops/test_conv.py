"""`conv`: against `lax` with the dense kernel, in every form, dtype and implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import bsjax
from tests.helpers import assert_close, normal, slow
from tests.ops.conv import MASK, case, compiled, cotangent, kernel, lax_conv, ours, places, theirs

pytestmark = pytest.mark.usefixtures("quick_compilations")
NAMES = ("xla", "dense", "reference")

FORMS = {
    "same": ((7, 6), (3, 2), {}),
    "strides, dilation, padding by hand": (
        (7, 6),
        (3, 2),
        {"strides": (2, 1), "dilation": (1, 2), "padding": ((0, 2), (3, 1))},
    ),
    "transposed, strides": ((4, 3), (3, 2), {"strides": 2, "transpose": True}),
    "3-D, valid": ((3, 5, 4), (2, 1, 3), {"padding": "VALID", "strides": (2, 2, 1)}),
    "1-D, one image": ((9,), (4,), {"padding": "SAME_LOWER", "lead": ()}),
}
MORE_FORMS = {
    "last pixels are not read": ((8, 9), (2, 2), {"padding": "VALID", "strides": 3}),
    "more strides than taps": ((8, 7), (2, 2), {"strides": 4, "padding": 1}),
    "dilation and strides": ((9, 8), (3, 3), {"strides": 2, "dilation": 2}),
    "a window wider than the image": ((3, 2), (5, 4), {}),
    "much padding": ((3, 4), (2, 3), {"padding": 4, "dilation": 2}),
    "one tap, strides": ((5, 6), (1, 1), {"strides": (2, 3)}),
    "one tap, padding": ((5, 6), (1, 1), {"padding": ((1, 0), (2, 3)), "strides": 2}),
    "transposed": ((5, 4), (3, 2), {"transpose": True}),
    "transposed, valid": ((5, 4), (3, 2), {"transpose": True, "padding": "VALID", "strides": 2}),
    "transposed, more strides than taps": (
        (5, 4),
        (2, 2),
        {"transpose": True, "padding": "VALID", "strides": 4},
    ),
    "transposed, dilation": ((5, 4), (3, 2), {"transpose": True, "dilation": 2, "strides": 2}),
    "transposed, padding by hand": (
        (5, 4),
        (3, 2),
        {"transpose": True, "padding": ((0, 2), (4, 1)), "strides": 2},
    ),
    "transposed, one tap": ((5, 4), (1, 1), {"transpose": True}),
    "transposed, one tap, strides": ((5, 4), (1, 1), {"transpose": True, "strides": 2}),
    "transposed, 3-D": ((2, 3, 2), (2, 3, 1), {"transpose": True, "strides": (1, 2, 2)}),
    "1-D, valid": ((9,), (3,), {"padding": "VALID", "lead": (2, 3)}),
}
EVERY = FORMS | MORE_FORMS


def assert_lax(one, name):
    for got, want in zip(ours(one, name), theirs(one), strict=True):
        assert got.dtype == one.x.dtype
        assert got.shape == want.shape
        assert_close(got, want, one.terms)


QUICK = [
    *((form, "xla") for form in FORMS),
    ("strides, dilation, padding by hand", "dense"),
    ("transposed, strides", "dense"),
    ("transposed, strides", "reference"),
]
SLOW = [(form, name) for form in EVERY for name in NAMES if (form, name) not in QUICK]


@pytest.mark.parametrize(("form", "name"), [*QUICK, *(slow(*one) for one in SLOW)])
def test_is_lax_with_the_dense_kernel(form, name):
    space, window, options = EVERY[form]
    assert_lax(case(space, window, **options), name)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (jnp.bfloat16, "xla"),
        slow(jnp.float16, "dense"),
        slow(jnp.bfloat16, "dense"),
        slow(jnp.float16, "xla"),
        slow(jnp.bfloat16, "reference"),
    ],
)
def test_is_rounded_once(dtype, name):
    assert_lax(case((7, 6), (3, 2), dtype=dtype), name)


@pytest.mark.parametrize("name", ["xla", slow("dense"), slow("reference")])
def test_float64(name):
    with jax.enable_x64(True):
        one = case((5, 4), (3, 2), dtype=jnp.float64, strides=2)
        want = theirs(one)
        compiled.cache_clear()
        for got, expected in zip(ours(one, name), want, strict=True):
            assert got.dtype == jnp.float64
            assert_close(got, np.asarray(expected), one.terms)
    compiled.cache_clear()


MASKS = {
    "a full column of 11 blocks": np.arange(11)[:, None] < np.array([[11, 0, 3]]),
    "nothing stored": np.zeros((4, 3), bool),
    "everything": np.ones((4, 3), bool),
}


@pytest.mark.parametrize(
    "mask", ["a full column of 11 blocks", "nothing stored", slow("everything")]
)
def test_columns_of_all_lengths(mask):
    """A column of 11 blocks is cut into pieces of every size."""
    assert_lax(case((4, 3), (2, 2), mask=MASKS[mask]), "xla")


@pytest.mark.parametrize("name", ["xla", slow("dense"), slow("reference")])
@pytest.mark.parametrize("transpose", [False, True])
def test_no_image_and_no_pixel_are_zeros(name, transpose):
    for space, lead in (((4, 3), (0,)), ((0, 3), (2,)), ((2, 1), (2,))):
        one = case(space, (3, 2), lead=lead, transpose=transpose, padding=0)
        y, dx, dvalues = ours(one, name)
        assert y.shape[:-1] == (*lead, max(0, space[0] - 2), max(0, space[1] - 1))
        assert dx.shape == one.x.shape
        assert not np.any(dx)
        assert not np.any(dvalues)


def test_transposed_is_the_adjoint():
    """<conv(x), y> = <x, transposed y> for every name of padding, whatever the strides."""
    for padding in ("SAME", "VALID"):
        back = case((3, 2), (3, 2), transpose=True, strides=2, padding=padding)
        y = back.x
        dx = bsjax.conv(y, back.values, back.p, **back.options)
        x = normal(np.random.default_rng(5), dx.shape)
        options = {"strides": 2, "padding": padding}
        forth = bsjax.conv(x, back.values, back.p, **options)
        assert forth.shape == y.shape
        assert_close(jnp.vdot(forth, y), np.asarray(jnp.vdot(x, dx)), y.size * back.terms)


EPILOGUES = {
    "all": {"bias": True, "activation": "gelu", "residual": True, "gate": True},
    "only a gate": {"gate": True},
}


@pytest.mark.parametrize("what", ["all", slow("only a gate")])
@pytest.mark.parametrize("name", ["xla", slow("dense"), slow("reference")])
@pytest.mark.parametrize("transpose", [False, slow(True)])
@pytest.mark.parametrize("window", [(3, 2), slow((1, 1))])
def test_gate_bias_activation_and_residual(what, name, transpose, window):
    """Of the dense formula, with all their gradients; one gate is 0."""
    one = case((4, 3), window, transpose=transpose)
    p, rng, wanted = one.p, np.random.default_rng(3), EPILOGUES[what]
    act = jax.nn.gelu if "activation" in wanted else lambda x: x
    m = p.shape[0 if transpose else 1]
    given = {
        "gate": normal(rng, (p.capacity,)).at[1].set(0),
        "bias": normal(rng, (m,)),
        "residual": normal(rng, (2, 4, 3, m)),
    }
    given = {key: value for key, value in given.items() if key in wanted}
    stored = (np.arange(p.capacity) < p.nnz)[:, None, None, None, None]

    def f(x, values, given):
        options = one.options | {"activation": wanted.get("activation"), "implementation": name}
        return bsjax.conv(x, values, p, **options, **given)

    def law(x, values, given):
        values = jnp.where(stored, values, 0)
        if "gate" in given:
            values = values * given["gate"].reshape(-1, 1, 1, 1, 1)
        w = jnp.zeros((*window, *p.shape))
        for value, at in zip(values, places(p), strict=False):
            w = w.at[at].set(value)
        y = lax_conv(x, w, **one.options)
        y = act(y + given["bias"].reshape(1, 1, 1, -1) if "bias" in given else y)
        return y + given.get("residual", 0.0)

    def both(run):
        y, pull = jax.vjp(run, one.x, one.values, given)
        return jax.tree.leaves((y, pull(cotangent(y))))

    both = jax.jit(both, static_argnums=0)
    for got, want in zip(both(f), both(law), strict=True):
        assert_close(got, np.asarray(want), 4 * one.terms)


def test_a_closed_gate_is_not_read():
    """Values behind a gate of 0 may be anything to y and dx."""
    one = case((4, 3), (3, 2))
    gate = jnp.ones(one.p.capacity).at[2].set(0)
    big = one.values.at[2].set(1e30)
    y, pull = jax.vjp(lambda x: bsjax.conv(x, big, one.p, gate=gate), one.x)
    want = bsjax.conv(one.x, one.values, one.p, gate=gate)
    np.testing.assert_array_equal(y, want)
    assert float(jnp.abs(pull(cotangent(y))[0]).max()) < 1e4


@pytest.mark.parametrize("transpose", [False, slow(True)])
def test_second_derivatives(transpose):
    """By finite differences of the gradient, in float64."""
    options = {"transpose": transpose, "dtype": jnp.float64}
    with jax.enable_x64(True):
        one = case((4,), (2,), mask=MASK[:3], block=(1, 2), lead=(1,), **options)

        @jax.jit
        def f(x, values):
            y = bsjax.conv(x, values, one.p, strides=2, implementation="xla", **one.options)
            return jnp.sin(y)

        arguments = one.x, jnp.nan_to_num(one.values)
        check_grads(f, arguments, order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_dtypes_of_x_and_values_may_differ():
    one = case((4, 3), (3, 2))
    y, pull = jax.vjp(
        lambda x, v: bsjax.conv(x, v, one.p, bias=jnp.ones(12, jnp.bfloat16)),
        one.x.astype(jnp.bfloat16),
        one.values,
    )
    dx, dvalues = pull(cotangent(y))
    assert (y.dtype, dx.dtype, dvalues.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("transpose", [False, True])
def test_one_tap_is_matmul(transpose):
    """The very same program."""
    one = case((4, 3), (1, 1), transpose=transpose)
    flat = one.values.reshape(one.p.capacity, *one.p.block)
    options = {"transpose": transpose, "activation": "relu"}

    def conv(x, values):
        return bsjax.conv(x, values.reshape(one.values.shape), one.p, **options)

    def matmul(x, values):
        values = values.reshape(one.values.shape).reshape(flat.shape)
        return bsjax.matmul(x, values, one.p, **options)

    texts = [jax.jit(f).lower(one.x, flat).as_text() for f in (conv, matmul)]
    assert texts[0].replace("jit_conv", "") == texts[1].replace("jit_matmul", "")


def test_window_may_be_given():
    one = case((4, 3), (2, 2))
    want = bsjax.conv(one.x, one.values, one.p)
    np.testing.assert_array_equal(bsjax.conv(one.x, one.values, one.p, window=2), want)
    np.testing.assert_array_equal(bsjax.conv(one.x, one.values, one.p, window=(2, 2)), want)


@pytest.mark.parametrize("which", ["forward", "dx", "dvalues"])
def test_no_copy_of_the_image_for_each_tap(which):
    """All windows of the image would be 25 images; there are at most two more, x and y turned."""
    p = bsjax.BlockPattern.from_mask(np.eye(4, dtype=bool) | np.eye(4, k=1, dtype=bool), 32)
    x = jax.ShapeDtypeStruct((8, 16, 16, 128), jnp.float32)
    values = jax.ShapeDtypeStruct((p.capacity, 5, 5, 32, 32), jnp.float32)
    f = functools.partial(bsjax.conv, p=p, implementation="xla")
    run = {
        "forward": f,
        "dx": lambda x, v: jax.vjp(lambda x: f(x, v), x)[1](x)[0],
        "dvalues": lambda x, v: jax.vjp(lambda v: f(x, v), v)[1](x)[0],
    }[which]
    program = jax.jit(run).lower(x, values).compile()
    image, weights = (4 * np.prod(a.shape) for a in (x, values))
    assert program.memory_analysis().temp_size_in_bytes < 3 * image + 2 * weights


def test_dense_kernel_of_the_tests():
    """The oracle itself, once: a pixel by hand."""
    one = case((3, 3), (3, 3), lead=())
    w = kernel(one.values, one.p)
    by_hand = sum(
        np.asarray(one.x)[1 + i - 1, 1 + j - 1].astype(np.float64) @ w[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    )
    assert_close(theirs(one)[0][1, 1], by_hand, 9 * one.x.shape[-1])
