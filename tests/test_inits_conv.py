"""Initialisers of values with taps: each tap of a stored input is an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers as standard

import bsjax
from bsjax import inits
from tests.helpers import slow
from tests.test_inits import KEY, within_sampling_error

WINDOW = (3, 2)


def drawn(init, mask, block=16, features=None, window=WINDOW):
    p = bsjax.BlockPattern.from_mask(mask, block)
    return inits.initialize(init, KEY, p, jnp.float32, features, window)


def test_a_full_pattern_gets_the_numbers_of_a_dense_kernel():
    values = drawn(standard.he_normal(), np.ones((3, 2), bool), features=(48, 32))
    want = standard.he_normal()(KEY, (*WINDOW, 48, 32), jnp.float32)
    columns = np.asarray(values).reshape(2, 3, *WINDOW, 16, 16)
    got = np.moveaxis(columns, 0, -2).swapaxes(0, 2).swapaxes(0, 1)  # [*window, r, br, c, bc]
    np.testing.assert_array_equal(got.reshape(*WINDOW, 48, 32), want)


INITS = {
    "stored_fan_in": inits.stored_fan_in(),
    "lecun": standard.lecun_normal(),
    "sinkhorn": inits.sinkhorn(),
}


@pytest.mark.parametrize("name", ["stored_fan_in", slow("lecun"), slow("sinkhorn")])
def test_taps_and_stored_inputs_are_the_fan_in(name):
    """The variances that an output sums over are 1, however many inputs are stored."""
    values = np.asarray(drawn(INITS[name], np.array([[1, 0], [1, 1], [1, 0]], bool), block=32))
    for column in (values[:3], values[3:]):
        assert abs(float((column**2).sum()) / 32 - 1) < 0.1


def test_padding_is_zero_in_every_tap():
    values = drawn(inits.stored_fan_in(), np.ones((1, 2), bool), block=8, features=(3, 13))
    assert values.shape == (2, *WINDOW, 8, 8)
    assert not np.any(values[..., 3:, :])
    assert not np.any(values[1, ..., 5:])
    within_sampling_error(np.asarray(values[0, ..., :3, :]).ravel(), 1 / 18)


@pytest.mark.slow
def test_orthogonal():
    """The columns over all taps are orthonormal."""
    values = drawn(inits.orthogonal(), np.ones((2, 1), bool), block=8)
    columns = np.asarray(values).reshape(-1, 8)
    np.testing.assert_allclose(columns.T @ columns, np.eye(8), atol=1e-5)


@pytest.mark.parametrize("window", [(3, 3), slow((2, 4))])
def test_identity_is_the_middle_tap(window):
    values = drawn(inits.identity(), np.eye(3, dtype=bool), block=4, window=window)
    p = bsjax.BlockPattern.from_mask(np.eye(3, dtype=bool), 4)
    x = jax.random.normal(KEY, (2, 5, 4, 12))
    np.testing.assert_array_equal(bsjax.conv(x, values, p, implementation="reference"), x)


def test_shapes_are_checked():
    def wrong(key, shape, dtype):
        return jnp.zeros(shape[1:], dtype)

    with pytest.raises(TypeError, match=r"must return an array of shape \(3, 2, 16, 16\)"):
        drawn(wrong, np.ones((1, 1), bool))
