"""A discretised mixture of logistics: what PixelCNN++ says of a pixel (Salimans et al. 2017).

A pixel has c channels, each a level of 0 to L - 1 that lies at `v = 2 x / (L - 1) - 1`, within -1
and 1. With mixing logits, means m, log scales s and weights w of k components:

    P(x) = sum_k softmax(logits)_k prod_c ( F((v_c + h - mu_c) / e^s) - F((v_c - h - mu_c) / e^s) )
    mu_c = m_c + sum_(d < c) tanh(w_cd) v_d,    h = 1 / (L - 1),    F the logistic function

and the lowest level holds all that lies below it, the highest all above: the sum over all levels is
one. The authors take a density for the difference where it is small; here it is exact everywhere,
since `F(a) - F(b) = F(a) F(-b) (1 - e^(b - a))`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LEAST_LOG_SCALE = -7.0


class Mixture(NamedTuple):
    """Of pixels of c channels, with p = c (c - 1) / 2 pairs of an earlier and a later one."""

    logits: Array  # [..., k]
    means: Array  # [..., c, k]
    log_scales: Array  # [..., c, k]
    weights: Array  # [..., p, k], of (1, 0), (2, 0), (2, 1), ...


def numbers(channels: int, mixtures: int) -> int:
    """How many numbers say all of a pixel's mixture."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def mixture(raw: Array, channels: int) -> Mixture:
    """From `raw[..., numbers(channels, k)]`."""
    parts = numbers(channels, 1)
    raw = raw.reshape(*raw.shape[:-1], parts, raw.shape[-1] // parts)
    logits, means, log_scales, weights = jnp.split(raw, [1, 1 + channels, 1 + 2 * channels], -2)
    return Mixture(
        logits[..., 0, :], means, jnp.maximum(log_scales, LEAST_LOG_SCALE), jnp.tanh(weights)
    )


def positions(x: Array, levels: int, dtype: jax.typing.DTypeLike) -> Array:
    """Where levels lie, within -1 and 1."""
    return x.astype(dtype) * (2 / (levels - 1)) - 1


def mean_of(channel: int, of: Mixture, v: Array) -> Array:
    """`mu[..., k]` of a channel, given the positions `v[..., c]` of the channels before it."""
    first, mean = channel * (channel - 1) // 2, of.means[..., channel, :]
    for d in range(channel):
        mean = mean + of.weights[..., first + d, :] * v[..., d, None]
    return mean


def log_probability(raw: Array, x: Array, levels: int) -> Array:
    """Natural logarithms `[...]` of the probabilities of pixels `x[..., c]`, of integer levels."""
    channels = x.shape[-1]
    of, v = mixture(raw, channels), positions(x, levels, raw.dtype)
    total = jax.nn.log_softmax(of.logits)
    for c in range(channels):
        sharpness = jnp.exp(-of.log_scales[..., c, :])
        off = (v[..., c, None] - mean_of(c, of, v)) * sharpness
        half = sharpness / (levels - 1)
        below_top = jax.nn.log_sigmoid(off + half)  # of F at the upper end of the level
        above_bottom = jax.nn.log_sigmoid(half - off)  # of 1 - F at its lower end
        between = below_top + above_bottom + jnp.log(-jnp.expm1(-2 * half))
        lowest, highest = (x[..., c, None] == end for end in (0, levels - 1))
        total += jnp.where(lowest, below_top, jnp.where(highest, above_bottom, between))
    return jax.nn.logsumexp(total, axis=-1)


def sample(key: Array, raw: Array, channels: int, levels: int) -> Array:
    """Pixels `[..., c]`, int32, with the probabilities that `log_probability` says.

    A logistic number is rounded to the next level before a later channel looks at it.
    """
    of, (pick, *keys) = mixture(raw, channels), jax.random.split(key, 1 + channels)
    chosen = jax.random.categorical(pick, of.logits)
    one = Mixture(*(_component(part, chosen) for part in of))
    x = jnp.zeros((*raw.shape[:-1], channels), jnp.int32)
    for c in range(channels):
        noise = jax.random.logistic(keys[c], raw.shape[:-1], raw.dtype)
        mean = mean_of(c, one, positions(x, levels, raw.dtype))[..., 0]
        v = mean + jnp.exp(one.log_scales[..., c, 0]) * noise
        level = jnp.clip(jnp.round((v + 1) * ((levels - 1) / 2)), 0, levels - 1)
        x = x.at[..., c].set(level.astype(jnp.int32))
    return x


def bits_per_dimension(raw: Array, x: Array, levels: int) -> Array:
    """Of each image `x[n, h, w, c]`: what its channels of pixels cost on average."""
    nats = -log_probability(raw, x, levels).sum(axis=(1, 2))
    return nats / (math.log(2) * math.prod(x.shape[1:]))


def _component(part: Array, chosen: Array) -> Array:
    """`part[..., k]` of the chosen component of each pixel, `[..., 1]`."""
    index = chosen.reshape(*chosen.shape, *[1] * (part.ndim - chosen.ndim))
    return jnp.take_along_axis(part, index, axis=-1)
