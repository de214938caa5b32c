"""What attention means, once more: NumPy in float64, a row at a time, gradients by hand."""

from typing import Any, NamedTuple

import numpy as np


class Grads(NamedTuple):
    """The result, and the gradient of each operand; those of scores as a whole `[n, h, q, s]`."""

    out: Any
    q: Any
    k: Any
    v: Any
    bias: Any
    sinks: Any


def oracle(q, k, v, dout, seen, *, bias=0.0, sinks=None, scale=None, softcap=None, kept=1.0):
    """`seen`, `bias` and `kept` (what dropout multiplies by) broadcast to `[n, h, q, s]`."""
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    (n, length, h, d), (_, s, g, f) = q.shape, v.shape
    scale = d**-0.5 if scale is None else scale
    shape = (n, h, length, s)
    seen, kept = np.broadcast_to(seen, shape), np.broadcast_to(np.asarray(kept, float), shape)
    bias = np.broadcast_to(np.asarray(bias, np.float64), shape)
    grads = Grads(
        np.zeros((n, length, h, f)),
        np.zeros(q.shape),
        np.zeros(k.shape),
        np.zeros(v.shape),
        np.zeros(shape),
        np.zeros(h),
    )
    for b, i, t in np.ndindex(n, h, length):
        j = i * g // h  # the head of keys
        (see,) = np.nonzero(seen[b, i, t])
        if not see.size:
            continue
        keys, values, drop = k[b, see, j], v[b, see, j], kept[b, i, t, see]
        raw = scale * keys @ q[b, t, i]
        soft = raw if softcap is None else softcap * np.tanh(raw / softcap)
        slope = 1.0 if softcap is None else 1 - (soft / softcap) ** 2
        logits = soft + bias[b, i, t, see]
        extra = [] if sinks is None else [float(sinks[i])]
        top = max([*logits, *extra])
        weights, sink = np.exp(logits - top), np.exp(np.array(extra) - top)
        total = weights.sum() + sink.sum()
        probs, sink = weights / total, sink.sum() / total
        grads.out[b, t, i] = (probs * drop) @ values
        do = dout[b, t, i]
        dprobs = drop * (values @ do)
        mean = probs @ dprobs
        dlogits = probs * (dprobs - mean)
        grads.bias[b, i, t, see] = dlogits
        grads.sinks[i] -= sink * mean
        draw = dlogits * slope * scale
        grads.q[b, t, i] = draw @ keys
        grads.k[b, see, j] += draw[:, None] * q[b, t, i]
        grads.v[b, see, j] += (probs * drop)[:, None] * do
    return grads


def kept(seeds, queries, keys, rate):
    """`[n, h, q, s]`: what dropout multiplies by. The hash of `_attention_dropout`, in Python's own
    whole numbers, from the seeds of each batch element and head `[n, h, 2]`."""
    a, b, wrap = 0x21F0AAAD, 0xD35A2D97, 2**32 - 1

    def mixed(x):
        x = (x ^ x >> 16) * a & wrap
        x = (x ^ x >> 15) * b & wrap
        return x ^ x >> 15

    seeds = np.asarray(seeds).astype(np.int64) & wrap
    query, key = np.arange(queries), np.arange(keys)
    first, second = (mixed(query ^ seeds[..., i, None])[..., None] for i in (0, 1))
    x = (key * 0x9E3779B9 & wrap) + first & wrap
    x = (x ^ x >> 16) * a + second & wrap
    signed = (x ^ x >> 15) * b + 2**31 & wrap  # as the bits of signed numbers are ordered
    return (signed >= round(rate * 2**32)).astype(float) / (1 - rate)


def elements(mask, block, lengths):
    """A mask of blocks `[..., r, c]` as one of elements `[..., q, s]`."""
    whole = np.repeat(np.repeat(np.asarray(mask), block[0], -2), block[1], -1)
    return whole[..., : lengths[0], : lengths[1]]


def choices(q, k, block, count, *, causal=True, among=True):
    """`[n, h, q, c]`: the blocks of keys that each query chooses, one query after another. No
    choice hangs on a rounding."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (n, length, heads, _), (_, s, g, _) = q.shape, k.shape
    starts = range(0, s, block)
    chosen = np.zeros((n, heads, length, len(starts)), bool)
    among = np.broadcast_to(among, chosen.shape)
    for b, h, t in np.ndindex(chosen.shape[:3]):
        may = [j for j in range(len(starts)) if among[b, h, t, j]]
        if causal:
            may = [j for j in may if starts[j] <= t]
        means = {j: k[b, starts[j] : starts[j] + block, h * g // heads].mean(0) for j in may}
        score = {j: float(means[j] @ q[b, t, h]) for j in may}
        if causal and t // block in may:
            score[t // block] = np.inf
        best = sorted(may, key=lambda j: -score[j])
        if 0 < count < len(best):
            assert score[best[count - 1]] - score[best[count]] > 1e-5
        chosen[b, h, t, best[:count]] = True
    return chosen
