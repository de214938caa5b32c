"""Which probabilities an attention drops: a hash of a seed, a query and a key, element by element.

The seed of a batch element and head is drawn from the key of the call. The rest is a few steps on
whole numbers, on each element by itself, the same in every implementation and inside the kernels:
what is dropped depends on the key, the batch element, the head, the query and the key, and neither
on blocks and slots nor on where it is computed. (A generator with a counter, as in Salmon, Moraes,
Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", but far shorter than theirs.)

Multiplication, xor and shift as in the finalizer of MurmurHash3, with the constants that Wellons'
hash-prospector (github.com/skeeto/hash-prospector) found to mix best: each input bit changes each
output bit half of the time, nearly. 32-bit arithmetic wraps around.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

# From key to key: 2^32 over the golden ratio (Knuth, volume 3, 6.4), so neighbours are far apart.
STEP = np.int32(0x9E3779B9 - 2**32)
FIRST, SECOND = np.int32(0x21F0AAAD), np.int32(0xD35A2D97 - 2**32)


def seeds(key: Any, n: int, heads: int) -> Int32[Array, "n h 2"]:
    """Two numbers for each batch element and head."""
    # all kinds of keys give the same numbers under vmap as alone, but for one kind ("rbg")
    data = jax.random.bits(key, (2,), jnp.uint32)
    key = jax.random.wrap_key_data(data, impl="threefry2x32")
    each = jnp.arange(n * heads, dtype=jnp.uint32)
    bits = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (2,), jnp.uint32))(each)
    return lax.bitcast_convert_type(bits, jnp.int32).reshape(n, heads, 2)


def words(seed: Array, query: Array) -> tuple[Array, Array]:
    """What queries bring along: two numbers each. `seed[..., 2]`, and `query` of a shape that
    broadcasts with one of its numbers."""
    return _mixed(query ^ seed[..., 0]), _mixed(query ^ seed[..., 1])


def kept(first: Array, second: Array, key: Array, rate: float) -> Array:
    """Whether a query with these words keeps its keys; arrays that broadcast, or of equal shape.

    With two words no two of a head's queries have the same bits at keys some distance apart, as
    they would where first words differ by a multiple of `STEP`.
    """
    bits = _folded(key * STEP + first, 16)
    bits = _folded(bits * FIRST + second, 15) * SECOND
    return bits >= threshold(rate)


def threshold(rate: float) -> np.int32:
    """Of signed bits, of which a share of `rate` is below it."""
    return np.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def _mixed(x: Array) -> Array:
    x = _folded(x, 16) * FIRST
    x = _folded(x, 15) * SECOND
    return _folded(x, 15)


def _folded(x: Array, shift: int) -> Array:
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, shift))
