"""`sampled_matmul`: `x @ w` is a sum of outer products, and only a sample of them is computed."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bsjax.ops import _core, _mesh, _reference, _sampled_core
from bsjax.ops import _validate as validate
from bsjax.ops._choose import IMPLEMENTATIONS, Implementation
from bsjax.ops._sampled_core import Cut, Spec, of_features, of_tokens, squares
from bsjax.ops._samplers import SAMPLERS, Sampler
from bsjax.pattern import is_concrete
from bsjax.pattern._validate import size

type Policy = Literal["forward", "backward", "weight"]
POLICIES = get_args(Policy.__value__)
OP = "sampled_matmul"
# Up to this share it pays to copy what is sampled instead of multiplying the rest by zero: on a CPU
# at 64 to 2048 tokens, blocks of 1 and 64; not measured elsewhere.
BREAK_EVEN = 0.9


def sampled_matmul(
    x: Any,
    w: Any,
    *,
    key: Any,
    fraction: float | int,
    sampler: Sampler = "systematic",
    block: int = 1,
    policy: Policy = "forward",
    scores: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*n m"]:
    """An estimate of `y[..., m] = x[..., k] @ w[k, m] = sum_i x[..., i] w[i, :]` from a sample.

    An axis is cut into groups of `block` neighbours; `max(1, round(fraction * groups))` of them are
    taken, and scaled such that the estimate is unbiased (except by "top_k"). Three policies:

    * "forward": one sample of the features k, for y and for both gradients: dx is zero in the
      features, and dw in the rows, that were not taken. Scores are `||x_g||_F ||w_g||_F`.
    * "backward": y is exact. dx is a sum over a sample of the features m, by scores
      `||dy_g||_F ||w_g||_F`, and dw over a sample of the tokens, by `||x_g||_F ||dy_g||_F`.
    * "weight": y and dx are exact. dw is a sum over a sample of the tokens, drawn in the forward
      pass by `||x_g||_F`, and of x only these tokens are kept for the backward pass.

    `block` must divide the features that are sampled; the last group of tokens may be smaller.
    `scores`, one for each feature k ("forward") or token ("weight"), replace the norms, for example
    by those of the weights alone, which are the same on every device; the score of a group is the
    root of the sum of its squares. The samplers are described in `docs/sampling.md`.

    The same key gives the same sample; `key=None` and `fraction=1` are exact. Sums and scales are
    kept in float32; y and the gradients are rounded once, to the dtypes of x and w. Scores that are
    not finite are an error where they can be seen; under jit they make what is sampled NaN. Samples
    are constants to derivatives, of which only reverse mode exists.

    After Drineas, Kannan and Mahoney 2006, "Fast Monte Carlo Algorithms for Matrices I"; Adelman,
    Levy, Hakimi and Silberstein 2018, "Faster Neural Network Training with Approximate Tensor
    Operations" ("forward"); Liu et al. 2023, "Winner-Take-All Column Row Sampling" ("weight").
    """
    x, w = validate.array(OP, "x", x), validate.array(OP, "w", w, ndim=2)
    if x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"{OP}: `x` of shape {x.shape} cannot multiply `w` of shape {w.shape}: expected "
            f"(..., {w.shape[0]})."
        )
    options = checked(
        OP,
        fraction=fraction,
        sampler=sampler,
        block=block,
        policy=policy,
        implementation=implementation,
    )
    spec = Spec(**options, features=w.shape[0], x_dtype=x.dtype, w_dtype=w.dtype)
    if reason := undivided(w.shape, policy, block):
        raise ValueError(f"{OP}: {reason}")
    given = None if scores is None else _given(scores, x, policy)
    if key is None:
        x, w = _core.same_axes(x, w)
        return _sampled_core.forward(spec, x, w, None)
    key = validate.key(OP, key)
    if policy == "backward":
        x, w = _core.same_axes(x, w)
        return _sampled_core.exact(spec, x, w, key)

    cut = spec.cut(_mesh.tokens(x) if policy == "weight" else spec.features)

    def norms() -> Array:
        if given is not None:
            found = cut.norms(squares(given))
        elif policy == "weight":
            found = cut.norms(of_tokens(x))
        else:
            found = cut.norms(of_features(x)) * cut.norms(squares(w).sum(1))
        return _finite(found, cut)

    weights = spec.weigh(cut, key, norms)
    x, w, weights = _core.same_axes(x, w, weights)
    if implementation == "reference" and weights is not None:
        items = jnp.repeat(weights, cut.block)[: cut.length]
        return _reference.sampled_matmul(x, w, items, policy)
    run = _sampled_core.exact if policy == "weight" else _sampled_core.forward
    return run(spec, x, w, weights)


def checked(
    op: str, *, fraction: Any, sampler: Any, block: Any, policy: Any, implementation: Any
) -> dict[str, Any]:
    """The static arguments of a sampled product, as `Spec` keeps them."""
    named(op, "sampler", sampler, SAMPLERS)
    named(op, "policy", policy, POLICIES)
    named(op, "implementation", implementation, IMPLEMENTATIONS)
    share = _share(op, fraction)
    return {
        "policy": policy,
        "sampler": sampler,
        "fraction": share,
        "block": size(op, "block", block, least=1),
        "compact": _compact(op, implementation, sampler, share),
    }


def undivided(shape: tuple[int, ...], policy: str, block: int) -> str | None:
    """The reason why blocks cannot cut what a policy samples of weights, or None if they can."""
    sampled = {"forward": shape[0], "backward": shape[1], "weight": 0}[policy]
    if sampled % block == 0:
        return None
    return (
        f'`block` must divide the features that policy="{policy}" samples, {sampled} for weights '
        f"of shape {shape}, got {block}: take a divisor of them, or pad with zeros."
    )


def named(op: str, name: str, got: Any, names: tuple[str, ...]) -> None:
    """One of some names."""
    if got not in names:
        wanted = ", ".join(f'"{one}"' for one in names)
        raise ValueError(f"{op}: `{name}` must be one of {wanted}, got {got!r}.")


def _share(op: str, fraction: Any) -> float:
    """What is computed of the whole: known when Python runs, since shapes depend on it."""
    if not isinstance(fraction, int | float | np.floating) or isinstance(fraction, bool):
        raise TypeError(
            f"{op}: `fraction` must be a number that is known when Python runs, since shapes "
            f"depend on it, got {fraction!r}: under jit make it a static argument."
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"{op}: `fraction` must be over 0 and at most 1, got {fraction}.")
    return float(fraction)


def _compact(op: str, implementation: str, sampler: str, share: float) -> bool:
    """Whether what is sampled is copied, or the rest multiplied by zero."""
    fixed = sampler != "bernoulli"
    reason = None
    if implementation == "mosaic":
        reason = "there is no kernel yet"
    elif implementation == "xla" and not fixed:
        reason = 'the size of a sample of "bernoulli" is random, and shapes are not'
    if reason:
        raise ValueError(
            f'{op}: implementation="{implementation}" cannot run here: {reason}. '
            'Use implementation="auto", which takes the fastest that can.'
        )
    if implementation == "auto":
        return fixed and share <= BREAK_EVEN
    return implementation == "xla"


def _given(scores: Any, x: Array, policy: str) -> Array:
    """Scores by the caller, one for each item that is sampled."""
    if policy == "backward":
        raise ValueError(
            f'{OP}: `scores` are for policy="forward" and policy="weight", got policy="backward", '
            "whose samples are drawn by the norms of dy: leave them out."
        )
    scores = validate.array(OP, "scores", scores)
    wanted = x.shape[:-1] if policy == "weight" else x.shape[-1:]
    meaning = "token" if policy == "weight" else "feature"
    validate.shape(OP, "scores", scores, wanted, f"one number for each {meaning} of `x`")
    return scores.reshape(scores.size)


def _finite(scores: Array, cut: Cut) -> Array:
    """Scores without NaN, where they can be seen."""
    if is_concrete(scores) and getattr(scores, "is_fully_addressable", True):
        wrong = cut.groups - int(np.isfinite(np.asarray(scores)).sum())
        if wrong:
            raise ValueError(
                f"{OP}: {wrong} of {cut.groups} scores are NaN or infinite, expected finite "
                "norms: look for NaN, or numbers over 1e19, in `x`, `w` and `scores`."
            )
    return scores
