"""`sample`: what `sampled_matmul` draws, for those who need to know it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from bsjax.ops import _samplers
from bsjax.ops import _validate as validate
from bsjax.ops._sampled_core import Spec, squares
from bsjax.ops._samplers import SAMPLERS, Sampler
from bsjax.pattern._validate import size

OP = "sample"


def sample(
    scores: Any,
    *,
    key: Any,
    fraction: float | int,
    sampler: Sampler = "systematic",
    block: int = 1,
) -> tuple[Int32[Array, " t"], Float[Array, " t"]]:
    """The groups of `block` neighbours that are drawn by `scores[i]`, and what each of them counts.

    `index[t]` are distinct groups, `t = max(1, round(fraction * groups))` of them: group g is
    items `g * block` to `(g + 1) * block` (the last may be smaller). `scale[t]`, in float32, makes
    the estimate `sum_t scale[t] X[index[t]]` of `sum_g X[g]` unbiased. Samplers that draw
    with replacement fill up with groups of scale 0. "bernoulli" has no fixed size: it is refused.

    The score of a group is the root of the sum of the squares of its items. This is the sample of
    `sampled_matmul(x, w, scores=scores, ...)` and `sampled_conv` for the same key and options, for
    policy "forward" and for "weight", where items are tokens. With `key=None` and `fraction=1` all
    groups are taken, at scale 1.
    """
    scores = validate.array(OP, "scores", scores, ndim=1)
    validate.one_of(OP, "sampler", sampler, SAMPLERS)
    if sampler == "bernoulli":
        raise ValueError(
            f'{OP}: the size of a sample of "bernoulli" is random, and shapes are not: take '
            'sampler="systematic", which has the same probabilities.'
        )
    spec = Spec(
        policy="forward",
        sampler=sampler,
        fraction=validate.fraction(OP, fraction),
        block=size(OP, "block", block, least=1),
        compact=True,
        features=scores.size,
        x_dtype=scores.dtype,
        w_dtype=scores.dtype,
    )
    cut, weights = spec.cut(scores.size), None
    if key is not None:
        key = validate.key(OP, key)
        found = cut.norms(squares(scores))
        weights = spec.weigh(cut, key, lambda: validate.finite(OP, found, "`scores`"))
    if weights is None:
        return jnp.arange(cut.groups, dtype=jnp.int32), jnp.ones(cut.groups, jnp.float32)
    return _samplers.chosen(weights, cut.taken)
