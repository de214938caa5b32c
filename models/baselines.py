"""What sampled products are compared with: other cheap or noisy ways to train a network.

    meprop                      most of the gradient of a layer's output is left out
    input_noise, weight_noise   noise on what a product multiplies
    gradient_noise              noise on what it gives back, as an optax transformation
    direct_feedback_alignment   no backward pass through the layers above

Small functions on plain arrays. Shapes: tokens n, features in k, features out m.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def meprop(x: jax.Array, w: jax.Array, *, keep: int, unified: bool = True) -> jax.Array:
    """`x[n, k] @ w[k, m]`, exact, whose gradients see only a part of the cotangent dy[n, m].

    With `unified`, the `keep` columns of dy with the largest `sum_n |dy[n, m]|`: they are copied,
    and both products of the backward pass shrink to `keep / m`. Without, in each row the `keep`
    numbers that are largest in magnitude; the others are multiplied as zeros, so that this form
    saves no time here. Ties go to the lower index. A bias that is added to the result keeps its
    exact gradient, as in the authors' code. The gradients are biased.

    Raises ValueError unless 1 <= keep <= m and the shapes fit.

    Sun, Ren, Ma and Wang 2017, "meProp: Sparsified Back Propagation for Accelerated Deep Learning
    with Reduced Overfitting".
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"meprop: `x` of shape {x.shape} cannot multiply `w` of shape {w.shape}: expected "
            "[n, k] and [k, m]."
        )
    if not 1 <= keep <= w.shape[1]:
        raise ValueError(
            f"meprop: `keep` must be at least 1 and at most the {w.shape[1]} columns of `w`, got "
            f"{keep}."
        )
    return _meprop(keep, unified, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _meprop(keep: int, unified: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def _meprop_fwd(keep: int, unified: bool, x: jax.Array, w: jax.Array) -> Any:
    return x @ w, (x, w)


def _meprop_bwd(keep: int, unified: bool, residuals: Any, dy: jax.Array) -> Any:
    x, w = residuals
    if unified:
        columns = jax.lax.top_k(jnp.abs(dy).sum(0), keep)[1]
        kept = dy[:, columns]
        return kept @ w[:, columns].T, jnp.zeros_like(w).at[:, columns].set(x.T @ kept)
    index = jax.lax.top_k(jnp.abs(dy), keep)[1]
    row = jnp.arange(dy.shape[0])[:, None]
    kept = jnp.zeros_like(dy).at[row, index].set(dy[row, index])
    return kept @ w.T, x.T @ kept


_meprop.defvjp(_meprop_fwd, _meprop_bwd)


def input_noise(key: jax.Array, x: jax.Array, *, deviation: float) -> jax.Array:
    """`x + deviation * normal`: training with it is, for small noise, Tikhonov regularisation.

    Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization".
    """
    return x + deviation * jax.random.normal(key, x.shape, x.dtype)


def weight_noise[Tree](key: jax.Array, parameters: Tree, *, deviation: float) -> Tree:
    """Every array plus `deviation * normal`, to be drawn afresh for each step.

    The noise is a constant to derivatives: differentiate the loss of the noisy parameters, and
    apply the gradient to the clean ones.

    Murray and Edwards 1994, "Enhanced MLP Performance and Fault Tolerance Resulting from Synaptic
    Weight Noise During Training"; Graves 2011, "Practical Variational Inference for Neural
    Networks".
    """
    leaves, structure = jax.tree.flatten(parameters)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        input_noise(k, leaf, deviation=deviation) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def gradient_noise(key: jax.Array, *, eta: float) -> optax.GradientTransformation:
    """Adds normal noise of variance `eta / (1 + t)^0.55` to the gradient of step t = 0, 1, ...

    The authors take eta from {0.01, 0.3, 1}. This is `optax.add_noise` with their exponent; chain
    it before the optimizer.

    Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks".
    """
    return optax.add_noise(eta, 0.55, key)


def feedback_matrices(key: jax.Array, out: int, widths: Sequence[int]) -> list[jax.Array]:
    """The fixed random matrices `B_l[out, width_l]`, uniform within `1 / sqrt(width_l)`."""
    keys = jax.random.split(key, len(widths))
    return [
        jax.random.uniform(k, (out, width), jnp.float32, -1, 1) / width**0.5
        for k, width in zip(keys, widths, strict=True)
    ]


def direct_feedback_alignment(
    layers: Sequence[Callable[[Any, jax.Array], jax.Array]],
    parameters: Sequence[Any],
    x: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    feedback: Sequence[jax.Array],
) -> tuple[jax.Array, list[Any]]:
    """The loss of `h_l = layers[l](parameters[l], h_(l-1))`, `h_0 = x`, and what DFA puts in the
    place of its gradient.

    With e the gradient of `loss(h_L)` by the last output h_L, a layer below the last gets
    `e @ feedback[l]` instead of the gradient by its output h_l, and differentiates itself by that:
    for `h_l = f(a_l)`, `a_l = h_(l-1) W_l`, that is `dW_l = h_(l-1)^T ((e B_l) * f'(a_l))`. The
    last layer gets e itself. No layer waits for the one above.

    Nokland 2016, "Direct Feedback Alignment Provides Learning in Deep Neural Networks".
    """
    if not len(layers) == len(parameters) == len(feedback) + 1:
        raise ValueError(
            f"direct_feedback_alignment: {len(layers)} layers need as many `parameters` and one "
            f"`feedback` less, got {len(parameters)} and {len(feedback)}."
        )
    backs, h = [], x
    for layer, own in zip(layers, parameters, strict=True):
        h, back = jax.vjp(functools.partial(_at, layer, h), own)
        backs.append(back)
    value, error = jax.value_and_grad(loss)(h)
    signals = [*(error @ b for b in feedback), error]
    return value, [back(signal)[0] for back, signal in zip(backs, signals, strict=True)]


def _at(layer: Callable[[Any, jax.Array], jax.Array], h: jax.Array, parameters: Any) -> jax.Array:
    return layer(parameters, h)
