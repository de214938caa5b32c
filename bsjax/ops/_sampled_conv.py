"""`sampled_conv`: a convolution is a sum over its input channels, and only a sample is computed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops import _core, _mesh, _reference
from bsjax.ops import _validate as validate
from bsjax.ops._choose import Implementation, refuse
from bsjax.ops._conv_form import Form, Padding, each, forward, pads
from bsjax.ops._sampled import Policy, compact
from bsjax.ops._sampled_core import Cut, Index, Spec, of_features, squares, times
from bsjax.ops._samplers import SAMPLERS, Sampler
from bsjax.pattern._validate import size

OP = "sampled_conv"
IMPLEMENTATIONS = ("auto", "xla", "dense", "reference")


def sampled_conv(
    x: Any,
    w: Any,
    *,
    key: Any,
    fraction: float | int,
    strides: int | tuple[int, ...] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, ...] = 1,
    sampler: Sampler = "systematic",
    block: int = 1,
    policy: Policy = "forward",
    scores: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "..."]:
    """An estimate of the convolution `y = sum_c x[..., c] * w[..., c, :]` from a sample of it.

    `x[*n, *space, k]` and `w[*window, k, m]` as Flax's `Conv` stores them, with one to three axes
    of space and any leading axes; y is `[*n, *space, m]`. `strides`, `padding` ("SAME", "VALID",
    "SAME_LOWER", or how much on both sides, or before and after, for each axis of space) and
    `dilation` of the kernel are those of `jax.lax.conv_general_dilated`, which this is without a
    key or at fraction 1.

    Channels in are cut into groups of `block` neighbours and drawn as the features of
    `sampled_matmul` with policy "forward" are, by scores `||x_g||_F ||w_g||_F`: x over batch and
    space, w over taps and channels out. `scores`, one for each channel in, replace them. The
    gradients share the sample: dx and dw are zero in the channels that were not taken. There are no
    other policies. A convolution with one tap is `sampled_matmul`, with the same sample.

    Scales are kept in float32; y and the gradients have the dtypes of x and w. Samples are
    constants to derivatives, of which only reverse mode exists.

    After Adelman, Levy, Hakimi and Silberstein 2018, "Faster Neural Network Training with
    Approximate Tensor Operations".
    """
    x, w = validate.array(OP, "x", x), validate.array(OP, "w", w)
    if not 3 <= w.ndim <= 5:
        raise ValueError(
            f"{OP}: `w` of shape {w.shape} must have shape (*window, k, m), with one to three axes "
            "of space."
        )
    *window, k, m = w.shape
    axes = len(window)
    if x.ndim <= axes or x.shape[-1] != k:
        space = ", ".join("space" for _ in window)
        raise ValueError(
            f"{OP}: `x` of shape {x.shape} cannot be convolved with `w` of shape {w.shape}: "
            f"expected (..., {space}, {k})."
        )
    validate.one_of(OP, "sampler", sampler, SAMPLERS)
    validate.one_of(OP, "policy", policy, ("forward",))
    share = validate.fraction(OP, fraction)
    spec = Spec(
        policy=policy,
        sampler=sampler,
        fraction=share,
        block=size(OP, "block", block, least=1),
        compact=_compact(implementation, sampler, share),
        features=k,
        x_dtype=x.dtype,
        w_dtype=w.dtype,
    )
    if k % spec.block:
        raise ValueError(
            f"{OP}: `block` must divide the channels in, {k} for `w` of shape {w.shape}, got "
            f"{block}: take a divisor of them, or pad with zeros."
        )
    scores = validate.optional(OP, "scores", scores, (k,), "one number for each channel of `x`")
    lead, space = x.shape[: -axes - 1], x.shape[-axes - 1 : -1]
    form = forward(
        space,
        tuple(window),
        each(OP, "strides", strides, axes),
        pads(OP, padding, axes),
        each(OP, "dilation", dilation, axes),
    )
    weights = None if key is None else _weights(spec, validate.key(OP, key), x, w, scores)
    if implementation == "reference":
        items = jnp.ones(k) if weights is None else jnp.repeat(weights, spec.block)
        images = x.reshape(math.prod(lead), *space, k)
        y = _reference.sampled_conv(images, w, items, form.conv)
    else:
        x, w, weights = _core.same_axes(x, w, weights)
        y = _conv(spec, form, x.reshape(*lead, math.prod(space) * k), w, weights)
    return y.reshape(*lead, *form.target, m)


# Images are rows [n, space * channels] here, so that they are placed over a mesh as tokens are.


def _rows(form: Form, spec: Spec, x: Float[Array, "n i"], w: Float[Array, "..."]) -> Array:
    """The convolution of images in rows with `w[*window, k, m]`, in the dtype that holds both."""
    dtype = _reference.common_dtype(x.dtype, w.dtype)
    full = _reference.common_dtype(spec.x_dtype, spec.w_dtype).itemsize > 2
    precision = lax.Precision.HIGHEST if full else lax.Precision.DEFAULT
    images = x.astype(dtype).reshape(x.shape[0], *form.source, w.shape[-2])
    y = form.conv(images, w.astype(dtype), precision=precision)
    return y.reshape(x.shape[0], math.prod(y.shape[1:]))


def _channels(form: Form, cut: Cut, x: Float[Array, "n i"], index: Index) -> Array:
    """The channels that are taken of images in rows."""
    if index is None:
        return x
    pixels = x.reshape(x.shape[0] * math.prod(form.source), cut.length)
    taken = cut.features(pixels, index)
    return taken.reshape(x.shape[0], math.prod(form.source) * taken.shape[1])


def _channels_back(form: Form, cut: Cut, x: Float[Array, "n s"], index: Index) -> Array:
    """Channels where they came from, and zeros elsewhere."""
    if index is None:
        return x
    pixels = x.reshape(x.shape[0] * math.prod(form.source), index.size * cut.block)
    whole = cut.features_back(pixels, index)
    return whole.reshape(x.shape[0], math.prod(form.source) * cut.length)


def _by_channel(w: Float[Array, "..."]) -> Float[Array, "k i"]:
    """A kernel `[*window, k, m]` with a row for each channel in."""
    return jnp.moveaxis(w, -2, 0).reshape(w.shape[-2], math.prod(w.shape) // max(1, w.shape[-2]))


def _as_kernel(rows: Float[Array, "s i"], window: tuple[int, ...], m: int) -> Float[Array, "..."]:
    return jnp.moveaxis(rows.reshape(rows.shape[0], *window, m), 0, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(spec: Spec, form: Form, x: Array, w: Array, weights: Array | None) -> Array:
    """Images in rows, convolved with the channels that are taken."""
    return _conv_fwd(spec, form, x, w, weights)[0]


def _conv_fwd(spec, form, x, w, weights):
    cut = spec.cut(spec.features)
    index, scale = spec.sample(cut, weights)
    xs = _mesh.per_token(lambda x, index: _channels(form, cut, x, index), x, index)
    rows = times(cut.rows(_by_channel(w), index), cut, scale)
    ws = _as_kernel(rows, form.window, w.shape[-1])
    y = _mesh.per_token(lambda xs, ws: _rows(form, spec, xs, ws).astype(spec.x_dtype), xs, ws)
    return y, (*_core.saved(xs, ws), index, scale)


def _conv_bwd(spec, form, residuals, dy):
    xs, ws, index, scale = residuals
    dy = jnp.asarray(dy)  # a cotangent may be a NumPy array
    cut, dtype = spec.cut(spec.features), _reference.common_dtype(xs.dtype, ws.dtype)

    def transposed(run: Callable[[Array], Array], shape: tuple[int, ...], dy: Array) -> Array:
        like = _mesh.vary(jnp.zeros(shape, dtype), _mesh.varying(dy))
        return jax.linear_transpose(run, like)(dy.astype(dtype))[0]

    def to_x(dy: Array, weights: Any) -> Array:
        ws, index = weights
        dxs = transposed(lambda xs: _rows(form, spec, xs, ws), (dy.shape[0], xs.shape[-1]), dy)
        return _channels_back(form, cut, dxs.astype(spec.x_dtype), index)

    def to_w(xs: Array, dy: Array, _: Any) -> Array:
        return _by_channel(transposed(lambda ws: _rows(form, spec, xs, ws), ws.shape, dy))

    dx = _mesh.per_token(to_x, dy, (ws, index))
    rows = times(_mesh.over_tokens(to_w, xs, dy), cut, scale).astype(spec.w_dtype)
    dw = _as_kernel(cut.rows_back(rows, index), form.window, ws.shape[-1])
    return dx, dw, None


_conv.defvjp(_conv_fwd, _conv_bwd)


def _weights(spec: Spec, key: Array, x: Array, w: Array, scores: Array | None) -> Array | None:
    """The weight of every group of channels, or None if all are taken."""
    cut = spec.cut(spec.features)

    def norms() -> Array:
        if scores is not None:
            found = cut.norms(squares(scores))
        else:
            found = cut.norms(of_features(x)) * cut.norms(squares(_by_channel(w)).sum(1))
        return validate.finite(OP, found, "`x`, `w` and `scores`")

    return spec.weigh(cut, key, norms)


def _compact(implementation: str, sampler: str, share: float) -> bool:
    """Whether what is sampled is copied, or the rest multiplied by zero."""
    if implementation == "mosaic":
        refuse(OP, implementation, "there is no kernel for sampled convolutions")
    validate.one_of(OP, "implementation", implementation, IMPLEMENTATIONS)
    return compact(OP, implementation, sampler, share)
