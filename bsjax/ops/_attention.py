"""`attention`: what users call, with every argument checked before anything runs."""

import math
from typing import Any

from jaxtyping import Array, Float

from bsjax.ops import _attention_args as args
from bsjax.ops import _attention_core as core
from bsjax.ops import _attention_dropout as dropout
from bsjax.ops import _attention_validate as validate
from bsjax.ops._attention_choose import check
from bsjax.ops._attention_tile import Operands, Spec
from bsjax.ops._choose import Implementation
from bsjax.pattern import BlockPattern


def attention(
    q: Any,
    k: Any,
    v: Any,
    p: BlockPattern,
    *,
    mask: Any = None,
    full: Any = None,
    bias: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    kv_lengths: Any = None,
    dropout_rate: float = 0.0,
    key: Any = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*n q h f"]:
    """`softmax(score(q k^T)) v` over the stored blocks of `p`, for every head.

    `q[..., q, h, d]`, `k[..., s, g, d]`, `v[..., s, g, f]`, as in `jax.nn.dot_product_attention`:
    g heads of keys, a divisor of h, each for h / g neighbouring heads of queries. Block-rows of `p`
    are blocks of `br` queries, block-columns blocks of `bc` keys, and the grid is
    `(ceil(q / br), ceil(s / bc))`; lengths need not be multiples. One pattern for all heads has
    leaves `[e]`; one for each head `[h, e]`; one for each batch element and head `[..., h, e]`.

    `score(x) = softcap * tanh(scale * x / softcap) + bias`, by default `x / sqrt(d)`, and -inf
    where a key is not seen. A query that sees no key gives zeros, and gets a zero gradient.

    * `mask`: which keys of its stored blocks a query sees. A function
      `mask(head, q_index, k_index)` of index arrays `[]`, `[br, 1]` and `[1, bc]` that returns bool
      (`bsjax.masks` has those with a name); or a bool array that broadcasts to
      `[..., h, e, br, bc]`, a block for each slot; or a tuple of these, all of which must hold.
    * `full[e]`: slots in which the mask is known to hold everywhere, where it is not evaluated
      (`bsjax.masks` tells them).
    * `bias`: a function of the same indices, which may close over parameters, or an array that
      broadcasts to `[..., h, e, br, bc]`.
    * `sinks[h]`: logits that join the denominator of each query's softmax, of keys without a value.
    * `q_segment_ids[..., q]`, `kv_segment_ids[..., s]`: a query sees keys of its own segment.
    * `kv_lengths[...]`: how many keys there are, the rest is padding. (All three may also be the
      same for all leading axes.)
    * `dropout_rate`, `key`: each probability is dropped with this chance, and the others are scaled
      up. The gradient drops the same ones. Which those are depends on the key, the batch element,
      the head, the query and the key, and on nothing else: neither on the pattern and its blocks
      nor on the implementation. The rate is rounded to a multiple of 2^-32.

    Softmax and sums are kept in float32 (float64 for float64); the result has the dtype of q,
    rounded once. Scores are computed again, block by block, in the backward pass: no array over all
    queries and keys exists, and what is kept beside the operands is the result, before it is
    rounded, and a number per query. (For few queries and keys, `auto` may take "dense".) Reverse
    mode only, and once: for second derivatives take implementation="reference", which is dense.

    Differentiable in q, k, v, bias, what a function `bias` closes over, and sinks. Masks and
    patterns are data: others of equal shapes and capacity compile nothing (inside `jit`).

    After Child, Gray, Radford and Sutskever 2019, "Generating Long Sequences with Sparse
    Transformers"; the softmax and its gradient block by block after Dao, Fu, Ermon, Rudra and Ré
    2022, "FlashAttention". Softcap comes before bias, as there.
    """
    validate.heads(q, k, v)
    *lead, length, h, d = q.shape
    s = k.shape[-3]
    p = validate.pattern(p, q, s)
    fixed = args.fixed(q, s, p, full, q_segment_ids, kv_segment_ids, kv_lengths)
    functions, mask_consts, arrays = args.masks(mask, q, p)
    function, bias, floats, others = args.bias_of(bias, q, p)
    fixed = fixed._replace(masks=arrays, mask_consts=mask_consts, bias_consts=others)
    if rate := validate.rate(dropout_rate):
        fixed = fixed._replace(seeds=dropout.seeds(validate.key(key), math.prod(lead), h))
    spec = Spec(
        name=implementation,
        grid=p.grid,
        block=p.block,
        lengths=(length, s),
        scale=d**-0.5 if scale is None else validate.number("scale", scale),
        softcap=None if softcap is None else validate.number("softcap", softcap, positive=True),
        dropout_rate=rate,
        masks=functions,
        bias=function,
    )
    x = Operands(
        q=args.blocks_of(q, 3, p.block[0]),
        k=args.blocks_of(k, 3, p.block[1]),
        v=args.blocks_of(v, 3, p.block[1]),
        bias=bias,
        bias_consts=floats,
        sinks=None if sinks is None else validate.sinks(sinks, h),
    )
    check(spec, x, fixed)
    out = core.attention(spec, x, fixed)
    return out[:, :length].reshape(*lead, length, h, v.shape[-1])
