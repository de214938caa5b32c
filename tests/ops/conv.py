"""What convolutions are compared with: `lax`, and a dense kernel that NumPy fills."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bsjax
from tests.helpers import accumulator, normal

MASK = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]], bool)  # with an empty row and column
SPARE = 2


class Case(NamedTuple):
    """A pattern, an image, values whose spare slots are NaN, and static options of `conv`."""

    p: bsjax.BlockPattern
    x: jax.Array
    values: jax.Array
    options: dict[str, Any]

    @property
    def terms(self) -> int:
        """The most products in one number of y, dx or dvalues."""
        return max(self.x.size // self.x.shape[-1], self.values[0].size * max(self.p.grid))


def case(space, window, *, lead=(2,), block=(2, 4), dtype=jnp.float32, mask=MASK, **options):
    p = bsjax.BlockPattern.from_mask(mask, block, capacity=int(mask.sum()) + SPARE)
    rng = np.random.default_rng(0)
    k = p.shape[1 if options.get("transpose") else 0]
    values = normal(rng, (p.capacity, *window, *p.block), dtype).at[p.nnz :].set(jnp.nan)
    return Case(p, normal(rng, (*lead, *space, k), dtype), values, options)


def cotangent(y):
    """Random, in the dtype of y."""
    return normal(np.random.default_rng(1), y.shape, y.dtype)


@functools.cache
def compiled(name, options):
    """y, dx and dvalues. The pattern is traced."""

    @jax.jit
    def run(p, x, values):
        def f(x, values):
            return bsjax.conv(x, values, p, implementation=name, **dict(options))

        y, pull = jax.vjp(f, x, values)
        return y, *pull(cotangent(y))

    return run


def ours(one, name="auto"):
    return compiled(name, tuple(sorted(one.options.items())))(one.p, one.x, one.values)


def kernel(values, p):
    """The dense kernel `[*window, k, m]`, slot by slot."""
    dense = np.zeros((*values.shape[1:-2], *p.shape), values.dtype)
    for v, at in zip(np.asarray(values), places(p), strict=False):
        dense[at] = v
    return dense


def places(p):
    """Where in a kernel each stored block is."""
    (br, bc), slots = p.block, zip(np.asarray(p.row), np.asarray(p.col), strict=True)
    return [
        np.s_[..., br * i : br * (i + 1), bc * j : bc * (j + 1)]
        for i, j in itertools.islice(slots, int(p.nnz))
    ]


def lax_conv(x, w, *, strides=1, padding="SAME", dilation=1, transpose=False):
    """`lax` on `x[*n, *space, k]` and a dense kernel."""
    axes = w.ndim - 2
    strides, dilation = ((v,) * axes if isinstance(v, int) else v for v in (strides, dilation))
    if isinstance(padding, int):
        padding = ((padding, padding),) * axes
    letters = "DHW"[-axes:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    lead = x.shape[: -axes - 1]
    options = {"rhs_dilation": dilation, "dimension_numbers": numbers, "precision": "highest"}
    if transpose:
        options |= {"transpose_kernel": True}
        run = jax.lax.conv_transpose
    else:
        run = jax.lax.conv_general_dilated
    y = run(x.reshape(-1, *x.shape[-axes - 1 :]), w, strides, padding, **options)
    return y.reshape(*lead, *y.shape[1:])


@functools.cache
def compiled_lax(dtype, options):
    """y, dx and the gradient of the dense kernel, for the cotangent that `dtype` can hold."""

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(lambda x, w: lax_conv(x, w, **dict(options)), x, w)
        return y, *pull(cotangent(y.astype(dtype)).astype(y.dtype))

    return run


def theirs(one):
    """The same three by `lax`, in the dtype that sums are kept in."""
    kept = accumulator(one.x.dtype)
    x, w = one.x.astype(kept), kernel(np.asarray(one.values, kept), one.p)
    y, dx, dw = compiled_lax(one.x.dtype, tuple(sorted(one.options.items())))(x, w)
    dvalues = np.zeros(one.values.shape, kept)
    for i, at in enumerate(places(one.p)):
        dvalues[i] = np.asarray(dw)[at]
    return y, dx, dvalues
