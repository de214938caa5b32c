"""What `BlockAttention` means: `jax.nn.dot_product_attention` with the element mask and the same
weights. Persistent memory is more keys; a sink is a key of its own logit, whose value is zero."""

import jax
import jax.numpy as jnp
import numpy as np

import bsjax


def assert_close(got, want, terms, roundings=0, least=0.0):
    """The largest number of `want` is the size of what was summed on the way to it, in one float32
    sum after another, of `terms` products together, with so many `roundings` to the dtype of `got`.

    Each addition rounds by half a unit in the last place, and the sizes of partial sums grow like
    the root of their number: `eps32 / 2 * sqrt(terms)` of the result, in whatever order. A factor 8
    is for the largest of many results, and because `want` has such an error too. A rounding to
    another dtype errs by `eps / 2` of what is rounded, at most.
    """
    eps, eps32 = (float(jnp.finfo(d).eps) for d in (got.dtype, jnp.float32))
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    size = max(least, float(np.abs(want).max()))
    atol = size * (4 * eps32 * terms**0.5 + roundings * eps / 2)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def weight(layer):
    """The dense matrix of a projection of any kind."""
    if hasattr(layer, "values"):
        dense = bsjax.todense(layer.values[...], layer.pattern.get_value())
        return dense[: layer.in_features, : layer.out_features]
    return layer.kernel[...]


def linear(layer, x):
    y = jnp.matmul(x, weight(layer), precision="highest")
    return y if layer.bias is None else y + layer.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


def rotated(x, base, positions=None):
    """Each pair of features as a complex number that turns with its position."""
    half = x.shape[-1] // 2
    turns = base ** -(np.arange(half) / half)
    positions = np.arange(x.shape[-3]) if positions is None else positions
    angle = positions[:, None, None] * turns
    turn = jnp.asarray(np.exp(1j * angle)[None], jnp.complex64)
    z = jax.lax.complex(x[..., :half], x[..., half:]) * turn
    return jnp.concatenate([z.real, z.imag], axis=-1).astype(x.dtype)


def attention(layer, x, encoded=None, *, seen=None, positions=None, bias=0.0):
    """`seen` and `bias` broadcast to `[n, h, q, s]`."""
    o, keys = layer.options, x if encoded is None else encoded
    q, k, v = (
        linear(one, inputs).reshape(*inputs.shape[:-1], -1, o.head_dim)
        for one, inputs in ((layer.query, x), (layer.key, keys), (layer.value, keys))
    )
    if o.rotary:
        q, k = (rotated(a, o.rotary_base, positions) for a in (q, k))
    n, length, s = x.shape[0], x.shape[1], keys.shape[1]
    seen = jnp.ones((1, 1, 1, 1), bool) if seen is None else jnp.asarray(seen)
    seen = jnp.broadcast_to(seen, (n, o.num_heads, length, s))
    bias, share = jnp.broadcast_to(bias, seen.shape), o.num_heads // o.num_kv_heads
    k, v = (jnp.repeat(a, share, axis=2) for a in (k, v))

    def more(key, value, logit):
        nonlocal k, v, seen, bias
        key, value = (jnp.broadcast_to(a[None], (n, *a.shape)) for a in (key, value))
        k, v = jnp.concatenate([k, key], axis=1), jnp.concatenate([v, value], axis=1)
        logit = jnp.broadcast_to(logit, (n, o.num_heads, length, key.shape[1]))
        bias = jnp.concatenate([bias, logit], axis=-1)
        seen = jnp.concatenate([seen, jnp.ones(logit.shape, bool)], axis=-1)

    if layer.persistent_key is not None:
        key, value = (
            jnp.repeat(a[...], share, axis=1)
            for a in (layer.persistent_key, layer.persistent_value)
        )
        more(key * o.head_dim**0.5, value * o.persistent**0.5, jnp.zeros((1, 1, 1, 1)))
    if layer.sinks is not None:
        zero = jnp.zeros((1, o.num_heads, o.head_dim))
        more(zero, zero, layer.sinks[...].reshape(1, -1, 1, 1))
    with jax.default_matmul_precision("highest"):
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=seen)
    y = jnp.where(seen.any(-1).swapaxes(1, 2)[..., None], y, 0)  # of no key: zeros, not the mean
    return linear(layer.out, y.reshape(n, length, -1))


def elements(mask, heads, length, s=None):
    """`[1, h, q, s]`: what a mask says of every query and key."""
    s = length if s is None else s
    head, q, k = np.arange(heads)[:, None, None], np.arange(length)[:, None], np.arange(s)[None]
    with jax.numpy_rank_promotion("allow"):
        return jnp.broadcast_to(jnp.asarray(mask(head, q, k)), (heads, length, s))[None]
