"""`sampled_matmul`: `x @ w` is a sum of outer products, and only a sample of them is computed."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.ops import _core, _gathered, _mesh, _mosaic, _reference, _sampled_core
from bsjax.ops import _validate as validate
from bsjax.ops._choose import IMPLEMENTATIONS, Implementation, refuse
from bsjax.ops._sampled_core import Spec, of_features, of_tokens, squares
from bsjax.ops._samplers import SAMPLERS, Sampler
from bsjax.pattern._validate import size

type Policy = Literal["forward", "backward", "weight"]
POLICIES = get_args(Policy.__value__)
OP = "sampled_matmul"
# Up to this share it pays to copy what is sampled instead of multiplying the rest by zero: on a CPU
# at 64 to 2048 tokens, blocks of 1 and 64; not measured elsewhere.
BREAK_EVEN = 0.9
# Products of fewer multiplications than this go by copies on a GPU too.
LEAST = 2**30


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
    score_slice: int | None = None,
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
    root of the sum of its squares. `score_slice` estimates the norms from so many neighbours, 10 in
    Adelman et al.: those of features from tokens of x and output features of w, those of tokens
    from features, from a random start. Nothing else is read, so NaN elsewhere is not seen. A tenth
    of the probability is spread evenly, which keeps estimates unbiased where a slice is zero. A
    slice as long as the axis is the exact norm. The samplers are described in `docs/sampling.md`.

    The same key gives the same sample; `key=None` and `fraction=1` are exact. Sums and scales are
    kept in float32; y and the gradients are rounded once, to the dtypes of x and w. (Where a GPU
    multiplies copies of 16 bits, what is scaled is rounded to these first.) Scores that are
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
    if reason := undivided(w.shape, policy, block):
        raise ValueError(f"{OP}: {reason}")
    spec = Spec(
        **options,
        kernel=_kernel(implementation, x, w, options),
        features=w.shape[0],
        x_dtype=x.dtype,
        w_dtype=w.dtype,
        score_slice=_sliced(score_slice, scores, policy, x, w),
    )
    given = None if scores is None else _given(scores, x, policy)
    if key is None:
        x, w = _core.same_axes(x, w)
        return _sampled_core.forward(spec, x, w, None)
    key = validate.key(OP, key)
    if policy == "backward":
        x, w = _core.same_axes(x, w)
        return _sampled_core.exact(spec, x, w, key)

    key, some = spec.reading(key)
    cut = spec.cut(_mesh.tokens(x) if policy == "weight" else spec.features)

    def norms() -> Array:
        if given is not None:
            found = cut.norms(squares(given))
        elif policy == "weight":
            found = cut.norms(of_tokens(some.features(x, 0)))
        else:
            of_x, of_w = of_features(some.tokens(x, 0)), squares(some.features(w, 1)).sum(1)
            found = cut.norms(of_x) * cut.norms(of_w)
        return some.mixed(validate.finite(OP, found, "`x`, `w` and `scores`"))

    weights = spec.weigh(cut, key, norms)
    x, w, weights = _core.same_axes(x, w, weights)
    if implementation == "reference" and weights is not None:
        items = jnp.repeat(weights, cut.block)[: cut.length]
        return _reference.sampled_matmul(x, w, items, policy)
    if spec.kernel and weights is not None:
        with _mosaic.in_words(OP):
            return _gathered.product(spec, "contract", x, w, weights)
    run = _sampled_core.exact if policy == "weight" else _sampled_core.forward
    return run(spec, x, w, weights)


def checked(
    op: str, *, fraction: Any, sampler: Any, block: Any, policy: Any, implementation: Any
) -> dict[str, Any]:
    """The static arguments of a sampled product, as `Spec` keeps them."""
    validate.one_of(op, "sampler", sampler, SAMPLERS)
    validate.one_of(op, "policy", policy, POLICIES)
    validate.one_of(op, "implementation", implementation, IMPLEMENTATIONS)
    share = validate.fraction(op, fraction)
    return {
        "policy": policy,
        "sampler": sampler,
        "fraction": share,
        "block": size(op, "block", block, least=1),
        "compact": compact(op, implementation, sampler, share),
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


def compact(op: str, implementation: str, sampler: str, share: float) -> bool:
    """Whether what is sampled is copied, or the rest multiplied by zero."""
    fixed = sampler != "bernoulli"
    if implementation in ("xla", "mosaic") and not fixed:
        refuse(
            op, implementation, 'the size of a sample of "bernoulli" is random, and shapes are not'
        )
    if implementation == "auto":
        return fixed and share <= BREAK_EVEN
    return implementation in ("xla", "mosaic")


def _kernel(implementation: str, x: Array, w: Array, options: dict[str, Any]) -> str:
    """Whether a kernel runs: "asked", "gpu" (where there is one), or "" for none."""
    reason = _mosaic.why_not_gathered((x.dtype, w.dtype), options["block"], w.shape[0])
    if options["policy"] != "forward":
        reason = 'kernels sample the features of policy="forward" only'
    if implementation == "mosaic":
        if reason:
            refuse(OP, implementation, reason)
        return "asked"
    on_gpu = implementation == "auto" and jax.default_backend() == "gpu"
    worth = options["compact"] and x.size * w.shape[1] >= LEAST
    return "gpu" if on_gpu and worth and not reason else ""


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


def _sliced(length: Any, scores: Any, policy: str, x: Array, w: Array) -> int | None:
    """How many neighbours norms are estimated from, or None where that would be all."""
    if length is None:
        return None
    length = size(OP, "score_slice", length, least=1)
    if scores is not None:
        raise ValueError(
            f"{OP}: `score_slice` estimates norms, and `scores` replace them, got both: leave one "
            "of them out."
        )
    (k, m), n = w.shape, _mesh.tokens(x)
    read = {"forward": (n, m), "backward": (n, k, m), "weight": (k,)}[policy]
    return length if length < max(read) else None
