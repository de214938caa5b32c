"""`matmul` with the gradient of its values from a sample of the tokens.

y and dx are what they always are. A probe, which stands for the sums `x @ S`, takes their cotangent
to a product with values of the taken tokens only: nothing else of x is kept for it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bsjax.ops import _core, _gate, _mesh, _reference, _sampled_core, _scan
from bsjax.ops import _validate as validate
from bsjax.ops._sampled_core import Cut, Index, Spec, of_tokens, squares
from bsjax.ops._samplers import SAMPLERS
from bsjax.pattern import BlockPattern
from bsjax.pattern._validate import size


class Sample(NamedTuple):
    """Which tokens are taken, and the weight of each group of them."""

    spec: Spec
    cut: Cut
    weights: Float[Array, " g"]


def draw(
    op: str, x: Array, key: Any, fraction: Any, sampler: Any, block: Any, scores: Any
) -> Sample | None:
    """A sample of the tokens of `x[..., features]`, or None if all are taken."""
    validate.one_of(op, "sampler", sampler, SAMPLERS)
    share, block = validate.fraction(op, fraction), size(op, "sample_block", block, least=1)
    if scores is not None:
        scores = validate.array(op, "scores", scores)
        validate.shape(op, "scores", scores, x.shape[:-1], "one number for each token of `x`")
    if key is None:
        return None
    key = validate.key(op, key)
    if share == 1:
        return None
    spec = Spec(
        policy="weight",
        sampler=sampler,
        fraction=share,
        block=block,
        compact=sampler != "bernoulli",  # the size of whose samples is random
        features=x.shape[-1],
        x_dtype=x.dtype,
        w_dtype=x.dtype,
    )
    cut = spec.cut(_mesh.tokens(x))

    def norms() -> Array:
        each = of_tokens(x) if scores is None else squares(scores).reshape(scores.size)
        return validate.finite(op, cut.norms(each), "`x` and `scores`")

    weights = spec.weigh(cut, key, norms)
    return None if weights is None else Sample(spec, cut, weights)


def product(
    spec: _core.Spec,
    transpose: bool,
    x: Array,
    values: Array,
    gate: Array | None,
    p: BlockPattern,
    sample: Sample,
) -> tuple[Array, BlockPattern, Array]:
    """Values and pattern to multiply with, and the probe that takes the gradients of values and
    gate from the cotangent of the sums."""
    x, values, gate, p, weights = _core.same_axes(x, values, gate, p, sample.weights)
    cut = sample.cut
    index, scale = sample.spec.sample(cut, weights)
    # rounded, so that kernels of 16 bits take it, and no more is kept than of x
    taken = _sampled_core.times(_sampled_core.tokens(cut, x, index), cut, scale).astype(x.dtype)
    if gate is not None:
        values, p, probe = _gate.applied(spec, transpose, taken, values, gate, p)
    else:
        probe = _scan.probe(spec, transpose, taken, values, p, spec.out_dtype)
        if probe is None:
            probe = _late(spec, transpose, taken, values, p)
    return values, p, _spread(cut, x, index, probe)


def reference(
    spec: _core.Spec, transpose: bool, x: Array, values: Array, p: BlockPattern, sample: Sample
) -> Array:
    """What it means: of a sum that is `x @ S` and a zero, only the zero has a gradient in S."""
    items = jnp.repeat(sample.weights, sample.cut.block)[: sample.cut.length]
    constant = lax.stop_gradient(values)
    tokens = lax.stop_gradient(x).astype(_reference.accumulator(x))
    tokens = tokens * items.astype(tokens.dtype).reshape(*x.shape[:-1], 1)
    y = _core.matmul(spec, transpose, x, constant, p)
    return y + _core.matmul(spec, transpose, tokens, values - constant, p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _late(spec: _core.Spec, transpose: bool, x: Array, values: Array, p: BlockPattern) -> Array:
    """Zeros in the place of `x @ S`, whose cotangent gives the gradient of the values."""
    return _mesh.zeros(x, p.shape[0 if transpose else 1], spec.out_dtype)


def _late_fwd(spec, transpose, x, values, p):
    like = jnp.zeros(0, values.dtype)
    return _late(spec, transpose, x, values, p), _core.saved(x, like, p)


def _late_bwd(spec, transpose, residuals, dsums):
    x, like, p = residuals
    pair = (dsums, x) if transpose else (x, dsums)
    return None, _core.sddmm(_core.to(spec, like), *pair, p), None


_late.defvjp(_late_fwd, _late_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(cut: Cut, x: Array, index: Index, probe: Array) -> Array:
    """The probe of the taken tokens as one of all of them: zeros, whatever it is."""
    return _mesh.zeros(x, probe.shape[-1], probe.dtype)


def _spread_fwd(cut, x, index, probe):
    return _spread(cut, x, index, probe), _core.saved(index)


def _spread_bwd(cut, residuals, dsums):
    (index,) = residuals
    return None, None, _sampled_core.tokens(cut, jnp.asarray(dsums), index)


_spread.defvjp(_spread_fwd, _spread_bwd)
