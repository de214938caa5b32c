"""Greedy and beam search over a decoder with a cache, each one compiled program.

A decoder is `step(cache, tokens[n]) -> (logits[n, v], cache)`: it reads one more token of each
sequence. Leaves of a cache have the sequences as their first axis, or no axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models._parallel_text import BOS, EOS, PAD

type Step = Callable[[Any, jax.Array], tuple[jax.Array, Any]]
NEVER = -jnp.inf


class Found(NamedTuple):
    """The best sequences, best first: EOS is their last token, PAD is behind it."""

    tokens: jax.Array  # int32 [n, beam, length]
    scores: jax.Array  # float32 [n, beam], of log p / penalty; -inf where nothing was found


def penalty(length: Any, alpha: Any) -> jax.Array:
    """`((5 + length) / 6) ** alpha`, what log p is divided by; EOS counts as a token.

    Wu et al. 2016, "Google's Neural Machine Translation System", formula 14.
    """
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def log_p(logits: jax.Array) -> jax.Array:
    """Of the next token, float32. PAD and BOS are none."""
    banned = jnp.arange(logits.shape[-1]) < EOS
    shape = (1,) * (logits.ndim - 1) + banned.shape
    logits = jnp.where(banned.reshape(shape), NEVER, logits.astype(jnp.float32))
    return jax.nn.log_softmax(logits, axis=-1)


def greedy(step: Step, cache: Any, n: int, *, length: int, limits: jax.Array) -> jax.Array:
    """The likeliest token after each, int32 [n, length], PAD behind EOS; token `limits[n]` of a
    sequence is EOS if none was before."""

    def goes_on(state: Any) -> jax.Array:
        i, _, ended, _ = state
        return (i < length) & ~ended.all()

    def body(state: Any) -> Any:
        i, tokens, ended, cache = state
        logits, cache = step(cache, tokens[:, i])
        likeliest = jnp.argmax(log_p(logits), axis=-1).astype(jnp.int32)
        token = jnp.where(i + 1 >= limits, EOS, likeliest)
        token = jnp.where(ended, PAD, token)
        return i + 1, tokens.at[:, i + 1].set(token), ended | (token == EOS), cache

    tokens = jnp.full((n, length + 1), PAD, jnp.int32).at[:, 0].set(BOS)
    state = jnp.int32(0), tokens, jnp.zeros(n, bool), cache
    return lax.while_loop(goes_on, body, state)[1][:, 1:]


class State(NamedTuple):
    """Of a beam search after `i` tokens."""

    i: jax.Array
    live: jax.Array  # [n, beam, 1 + length], BOS first
    live_log_p: jax.Array  # [n, beam]
    found: jax.Array  # like `live`
    scores: jax.Array  # [n, beam]
    done: jax.Array  # [n]
    cache: Any


def search(
    step: Step,
    cache: Any,
    n: int,
    *,
    beam: int,
    length: int,
    limits: jax.Array,
    alpha: Any = 0.6,
) -> Found:
    """Beam search for `n` sources; the cache is for `n * beam` sequences, those of a source beside
    each other.

    Of all continuations of the live sequences the `beam` likeliest are kept; those that end are
    found, the others are live in the next step. A source is done when nothing live can have a
    better score than the best one found, whatever follows, so that beam 1 is greedy search. Token
    `limits[n]` of a sequence can only be EOS. What is found is ordered by log p / penalty.
    """

    def goes_on(s: State) -> jax.Array:
        return (s.i < length) & ~s.done.all()

    def body(s: State) -> State:
        logits, cache = step(s.cache, s.live[:, :, s.i].reshape(n * beam))
        more = log_p(logits).reshape(n, beam, -1)
        v = more.shape[-1]
        last = (s.i + 1 >= limits)[:, None, None] & (jnp.arange(v) != EOS)[None, None]
        total = s.live_log_p[..., None] + jnp.where(last, NEVER, more)
        best, at = lax.top_k(total.reshape(n, beam * v), beam)
        parent, token = at // v, (at % v).astype(jnp.int32)
        live = jnp.take_along_axis(s.live, parent[..., None], axis=1)
        live = live.at[:, :, s.i + 1].set(token)

        ends = token == EOS
        scores = jnp.where(ends & ~s.done[:, None], best / penalty(s.i + 1, alpha), NEVER)
        scores, order = lax.top_k(jnp.concatenate([s.scores, scores], axis=1), beam)
        found = jnp.concatenate([s.found, live], axis=1)
        found = jnp.take_along_axis(found, order[..., None], axis=1)

        rows = (parent + beam * jnp.arange(n)[:, None]).reshape(-1)
        cache = jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, cache)
        # log p only falls, and no penalty is greater than that of the longest sequence
        live_log_p = jnp.where(ends, NEVER, best)
        done = s.done | (scores[:, 0] >= live_log_p.max(1) / penalty(limits, alpha))
        return State(s.i + 1, live, live_log_p, found, scores, done, cache)

    live = jnp.full((n, beam, length + 1), PAD, jnp.int32)
    start = State(
        i=jnp.int32(0),
        live=live.at[:, :, 0].set(BOS),
        live_log_p=jnp.full((n, beam), NEVER).at[:, 0].set(0.0),
        found=live,
        scores=jnp.full((n, beam), NEVER),
        done=jnp.zeros(n, bool),
        cache=cache,
    )
    end = lax.while_loop(goes_on, body, start)
    return Found(end.found[:, :, 1:], end.scores)
