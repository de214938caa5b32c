"""`conv`: every message, by its text."""

import jax.numpy as jnp
import pytest

import bsjax
from tests.helpers import assert_raises
from tests.ops.conv import case

ONE = case((4, 3), (3, 2))  # channels (8, 12) in blocks (2, 4), 7 slots


def refused(message, error=ValueError, x=ONE.x, values=ONE.values, p=ONE.p, **options):
    assert_raises(lambda: bsjax.conv(x, values, p, **options), error, message)


def test_values_that_do_not_fit():
    for values in (ONE.values[:6], ONE.values[..., :2], ONE.values[:, 0, 0]):
        refused(
            f"conv: `values` of shape {values.shape} do not fit the pattern: expected "
            "(e, *window, br, bc) = (7, *window, 2, 4), with one to three axes of space.",
            values=values,
        )
    refused(
        "conv: `values` must be an array, got list: wrap it in jnp.asarray.", TypeError, values=[]
    )


def test_images_that_do_not_fit():
    refused(
        "conv: `x` of shape (2, 4, 3, 7) cannot be convolved with a kernel of window (3, 2) and "
        "channels (8, 12): expected (..., space, space, 8).",
        x=ONE.x[..., :7],
    )
    refused(
        "conv: `x` of shape (3, 8) cannot be convolved with a kernel of window (3, 2) and channels "
        "(8, 12): expected (..., space, space, 8).",
        x=ONE.x[0, 0],
    )
    refused(
        "conv: `x` of shape (2, 4, 3, 8) cannot be convolved with the transpose of a kernel of "
        "window (3, 2) and channels (8, 12): expected (..., space, space, 12).",
        transpose=True,
    )
    refused(
        "conv: `x` must be floating point (float32, bfloat16, float16 or float64), got int32: cast "
        "it first, for example `x.astype(jnp.float32)`.",
        TypeError,
        x=ONE.x.astype(jnp.int32),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"window": 3},
            "conv: `window` is 3, but `values` of shape (7, 3, 2, 2, 4) have the window (3, 2): "
            "leave `window` out, or give values (e, *window, br, bc).",
        ),
        (
            {"strides": (1, 2, 3)},
            "conv: `strides` must be one number, or one for each of 2 axes of space, got "
            "(1, 2, 3).",
        ),
        ({"dilation": 0}, "conv: `dilation` must be at least 1, got 0."),
        (
            {"padding": "FULL"},
            'conv: `padding` must be one of "SAME", "VALID", "SAME_LOWER", got \'FULL\'.',
        ),
        (
            {"padding": "SAME_LOWER", "transpose": True, "x": jnp.zeros((4, 3, 12))},
            'conv: `padding` must be one of "SAME", "VALID", got \'SAME_LOWER\'.',
        ),
        (
            {"padding": (1, 2, 3)},
            "conv: `padding` must be a name, a number, or for each of 2 axes of space a number or "
            "a pair (before, after), got (1, 2, 3).",
        ),
        (
            {"gate": jnp.ones(6)},
            "conv: `gate` of shape (6,) must have shape (7,), one number for each slot.",
        ),
        (
            {"bias": jnp.ones(8)},
            "conv: `bias` of shape (8,) must have shape (12,), one number for each channel of the "
            "output.",
        ),
        (
            {"residual": jnp.ones((2, 4, 3, 8))},
            "conv: `residual` of shape (2, 4, 3, 8) must have shape (2, 4, 3, 12), that of the "
            "output.",
        ),
        (
            {"activation": "swish"},
            'conv: `activation` must be a function or one of "relu", "gelu", "silu", "tanh", '
            "\"sigmoid\", got 'swish'.",
        ),
        (
            {"precision": "best"},
            'conv: `precision` must be None, a jax.lax.Precision or one of "default", "high", '
            "\"highest\", got 'best'.",
        ),
        (
            {"implementation": "mosaic"},
            'conv: implementation="mosaic" cannot run here: there is no kernel for float32 (the '
            "tensor cores would round it to 11 bits): cast x and the values to bfloat16 or "
            'float16. Use implementation="auto", which takes the fastest that can.',
        ),
        (
            {"implementation": "fast"},
            'conv: `implementation` must be one of "auto", "xla", "mosaic", "dense", "reference", '
            "got 'fast'.",
        ),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, dict) else "",
)
def test_options(options, message):
    refused(message, **options)


def test_flags():
    refused("conv: `transpose` must be True or False, got 1.", TypeError, transpose=1)
    refused(
        "conv: `p` must be a BlockPattern, got ArrayImpl: build one with "
        "BlockPattern.from_mask(mask, block=...).",
        TypeError,
        p=ONE.x,
    )
