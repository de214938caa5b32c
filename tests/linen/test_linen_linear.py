"""`bsjax.linen.BlockLinear`: the arithmetic of the NNX layer, and a Linen module like any other."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import bsjax.linen
import bsjax.nnx
from bsjax import inits
from bsjax.linen import BlockLinear
from tests.helpers import assert_close, hub_mask, normal

MASK = hub_mask(4, 3)
IN, OUT = 29, 18
KEY, BIAS = jax.random.key(0), nn.initializers.normal(1.0)


def layer(out_features=OUT, **options):
    options = {"pattern": MASK, "block": 8, "bias_init": BIAS} | options
    return BlockLinear(out_features, **options)


def inputs(shape=(5, IN), dtype=jnp.float32, seed=0):
    return normal(np.random.default_rng(seed), shape, dtype)


def p(capacity=None):
    return bsjax.BlockPattern.from_mask(MASK, 8, capacity=capacity)


def sibling(variables, **options):
    """The NNX layer with the same parameters."""
    options = {"pattern": MASK, "block": 8} | options
    ours = bsjax.nnx.BlockLinear(IN, OUT, rngs=nnx.Rngs(9), **options)
    ours.values[...] = variables["params"]["values"]
    if ours.bias is not None:
        ours.bias[...] = variables["params"]["bias"]
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
        {"implementation": "dense", "precision": "default"},
        {"pattern": p(12), "block": None},
    ],
    ids=str,
)
def test_both_dialects_agree(options):
    """Equal outputs and gradients from equal parameters, to the last bit."""
    linen, x = layer(**options), inputs()
    variables = linen.init(KEY, x)
    theirs = sibling(variables, **options)
    y = linen.apply(variables, x)
    np.testing.assert_array_equal(y, theirs(x))
    assert y.dtype == options.get("dtype", jnp.float32)

    dy = inputs((5, OUT), seed=1)
    weigh = lambda y: (y.astype(jnp.float32) * dy).sum()  # noqa: E731
    grads = jax.grad(lambda v: weigh(linen.apply(variables | {"params": v}, x)))(
        variables["params"]
    )
    want = nnx.grad(lambda layer: weigh(layer(x)))(theirs)
    for name, grad in grads.items():
        assert grad.dtype == options.get("param_dtype", jnp.float32)
        np.testing.assert_array_equal(grad, want[name][...])


@pytest.mark.parametrize(
    "init", [inits.stored_fan_in(), nn.initializers.he_normal()], ids=["ours", "standard"]
)
def test_initialisers(init):
    """Any of them, with the pattern and the real sizes."""
    keys = []

    @inits.by_pattern
    def spy(key, p, dtype, features):
        assert features == (IN, OUT)
        keys.append(key)
        return jnp.zeros((p.capacity, *p.block), dtype)

    layer(kernel_init=spy).init(KEY, inputs())
    got = layer(kernel_init=init).init(KEY, inputs())["params"]["values"]
    want = inits.initialize(init, keys[0], p(), jnp.float32, (IN, OUT))
    np.testing.assert_array_equal(got, want)


def test_variables():
    variables = layer(pattern=p(12), block=None).init(KEY, inputs())
    sizes = jax.tree.map(lambda a: (a.shape, str(a.dtype)), variables)
    assert sizes == {
        "params": {"values": ((12, 8, 8), "float32"), "bias": ((OUT,), "float32")},
        "patterns": {
            "row": ((12,), "int32"),
            "col": ((12,), "int32"),
            "grid": ((2,), "int32"),
            "block": ((2,), "int32"),
        },
    }
    assert set(layer(use_bias=False).init(KEY, inputs())["params"]) == {"values"}


def test_the_collection_decides_where_blocks_are():
    """The coordinates are variables: moving blocks needs no new module and no compilation."""
    ours, x, traces = layer(), inputs(), 0
    variables = ours.init(KEY, x)

    @jax.jit
    def forward(variables, x):
        nonlocal traces
        traces += 1
        return ours.apply(variables, x)

    for shift in range(3):
        moved = bsjax.BlockPattern.from_mask(np.roll(MASK, shift, axis=0), 8)
        coordinates = {"row": moved.row, "col": moved.col}
        y = forward(variables | {"patterns": variables["patterns"] | coordinates}, x)
        kernel = bsjax.todense(variables["params"]["values"], moved)[:IN, :OUT]
        want = x @ kernel + variables["params"]["bias"][None]
        assert_close(y, np.asarray(want), IN)
    assert traces == 1


def test_bare_coordinates_are_enough():
    ours, x = layer(), inputs()
    variables = ours.init(KEY, x)
    bare = {name: variables["patterns"][name] for name in ("row", "col")}
    y = ours.apply(variables | {"patterns": bare}, x)
    np.testing.assert_array_equal(y, ours.apply(variables, x))


def test_parameters_for_given_coordinates():
    """`apply` with `mutable="params"` draws what fits the patterns that are there."""
    other = bsjax.BlockPattern.from_mask(hub_mask(3, 4).T, 8, capacity=p().capacity)
    given = {"patterns": {"row": other.row, "col": other.col}}
    _, drawn = layer().apply(given, inputs(), rngs={"params": KEY}, mutable=["params"])
    fan_in = np.asarray(other.mask()).sum(0)
    assert not np.array_equal(fan_in, MASK.sum(0))
    assert drawn["params"]["values"].shape == (p().capacity, 8, 8)
    with pytest.raises(ValueError, match="from_dense: the pattern is traced"):
        jax.jit(
            lambda given: layer(kernel_init=nn.initializers.he_normal()).apply(
                given, inputs(), rngs={"params": KEY}, mutable=["params"]
            )
        )(given)


def test_a_standard_initialiser_is_not_drawn_again():
    """Linen asks for the shape of a parameter at every call; the draws belong to `init`."""
    calls = 0

    def init(key, shape, dtype):
        nonlocal calls
        calls += 1
        return jnp.ones(shape, dtype)

    ours, x = layer(kernel_init=init), inputs()
    variables = ours.init(KEY, x)
    drawn = calls
    ours.apply(variables, x)
    assert calls == drawn > 0


def test_sharding_annotations_reach_the_parameter():
    init = nn.with_partitioning(inits.stored_fan_in(), ("model", None, None))
    ours, plain = layer(kernel_init=init), layer()
    variables = ours.init(KEY, inputs())
    assert variables["params"]["values"].names == ("model", None, None)
    want = plain.init(KEY, inputs())
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(variables), want)
    np.testing.assert_array_equal(ours.apply(variables, inputs()), plain.apply(want, inputs()))


# ---------------------------------------------------------------- the pattern as a field


def test_modules_are_compared_by_their_blocks():
    assert layer() == layer()
    assert hash(layer()) == hash(layer())
    assert layer() == layer(pattern=p(), block=8)
    assert layer().clone() == copy.deepcopy(layer()) == layer()
    assert layer() != layer(pattern=np.roll(MASK, 1, axis=0))
    assert layer() != layer(pattern=bsjax.BlockPattern.from_mask(MASK, 16), block=None)
    assert layer().pattern.equals(p())
    assert layer().pattern != "a pattern"


def test_the_field_is_a_pattern():
    values = layer().init(KEY, inputs())["params"]["values"]
    held = layer().pattern
    x = inputs((2, 32))
    np.testing.assert_array_equal(bsjax.matmul(x, values, held), bsjax.matmul(x, values, p()))
    assert jax.tree.map(lambda a: a, held) == held


def test_created_with_a_traced_pattern():
    def forward(q, x):
        ours = layer(pattern=q, block=None)
        assert ours.clone() == ours
        return ours.init_with_output(KEY, x)[0]

    x = inputs()
    want = layer().init_with_output(KEY, x)[0]
    assert_close(jax.jit(forward)(p(), x), np.asarray(want), IN)  # another program, other roundings


# ---------------------------------------------------------------- flax.serialization and tabulate


def test_serialization_both_ways():
    ours, x = layer(), inputs()
    variables = ours.init(KEY, x)
    target = ours.init(jax.random.key(1), x)
    saved = serialization.to_bytes(variables)
    restored = serialization.from_bytes(target, saved)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    np.testing.assert_array_equal(ours.apply(restored, x), ours.apply(variables, x))
    state = serialization.to_state_dict(variables)
    jax.tree.map(np.testing.assert_array_equal, serialization.msgpack_restore(saved), state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: layer(20, pattern=np.vstack([MASK, np.zeros((1, 3), bool)])),
            "BlockLinear: the collection `patterns` holds a pattern of grid (4, 3), but the field "
            "`pattern` has (5, 3): use the module that these variables were made with.",
        ),
        (
            lambda: layer(20, pattern=MASK, block=(16, 8)),
            "holds a pattern of block (8, 8), but the field `pattern` has (16, 8)",
        ),
    ],
    ids=["grid", "block"],
)
def test_variables_of_another_pattern_are_refused(other, message):
    variables = layer(20).init(KEY, inputs())
    module = other()
    with pytest.raises(ValueError, match=re.escape(message)):
        module.apply(variables, inputs((5, module.pattern.shape[0])))


def test_tabulate():
    table = layer().tabulate(KEY, inputs(), console_kwargs={"width": 200, "force_terminal": False})
    assert f"values: float32[{p().nnz},8,8]" in table
    assert f"row: int32[{p().nnz}]" in table


# ---------------------------------------------------------------- errors


ERRORS = {
    "mask without block": (
        lambda: layer(block=None),
        ValueError,
        "BlockLinear: `pattern` is a mask, so its block size is not known: give `block=`",
    ),
    "no pattern": (lambda: BlockLinear(OUT), TypeError, "'pattern'"),
    "out_features": (
        lambda: layer(25).init(KEY, inputs()),
        ValueError,
        "BlockLinear: out_features=25 needs 4 blocks of 8, but `pattern` has a grid (4, 3) of "
        "blocks (8, 8): its out_features may be 17 to 24.",
    ),
    "inputs": (
        lambda: layer().apply(layer().init(KEY, inputs()), inputs((5, 33))),
        ValueError,
        "BlockLinear: in_features=33 needs 5 blocks of 8, but `pattern` has a grid (4, 3) of "
        "blocks (8, 8): its in_features may be 25 to 32.",
    ),
    "a scalar": (lambda: layer().init(KEY, jnp.float32(1)), ValueError, "in_features=0 needs 0"),
    "cast wholesale": (
        lambda: layer().apply(
            jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer().init(KEY, inputs())),
            inputs(dtype=jnp.bfloat16),
        ),
        TypeError,
        "must be int32, got bfloat16",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
