"""Named cases of the attention kernels."""

import jax.numpy as jnp

from tests.kernels.attention import Case

CAUSAL = {"mask": lambda head, q, k: q >= k}
BEFORE = lambda head, q, k: q > k  # noqa: E731  the first query has a block, and sees nothing
SEGMENTS = {"lengths": True, "segments": True}

CASES = {
    "causal, shared heads": Case(heads=(2, 1), blocks=(3, 3), scores=CAUSAL, sinks=True),
    "large blocks, per head": Case(
        blocks=(2, 2), block=(128, 128), d=128, lists="head", scores={"softcap": 3.0}
    ),
    "segments, per element": Case(
        n=2, blocks=(2, 3), block=(64, 128), lists="element", scores=SEGMENTS
    ),
    "split, ragged keys": Case(
        heads=(2, 1), blocks=(2, 2), d=192, scores={"keys": 100, "mask": BEFORE}
    ),
}
ALIBI = lambda head, q, k: jnp.exp2(-(head + 1).astype(jnp.float32)) * (k - q).astype(jnp.float32)  # noqa: E731
FEATURES = {
    "dropout and bias": Case(
        heads=(2, 1),
        blocks=(2, 2),
        rate=0.3,
        sinks=True,
        scores={"bias": ALIBI, "softcap": 4.0, "keys": 100},
    ),
    "masks by slot": Case(
        blocks=(2, 2), block=(64, 128), lists="head", masks=("rows", "columns", "all")
    ),
}
ALL = {"bias": ALIBI, "mask": CAUSAL["mask"], **SEGMENTS}
MORE_FEATURES = {
    "dropout alone": Case(heads=(2, 1), blocks=(2, 2), rate=0.3, sinks=True, scores=CAUSAL),
    "bias alone": Case(blocks=(2, 2), scores={"bias": ALIBI}),
    "numbers by slot": Case(
        blocks=(2, 2), block=(128, 64), lists="head", numbers=True, scores={"softcap": 4.0}
    ),
    "all at once": Case(
        n=2,
        heads=(4, 2),
        lists="element",
        masks=("rows", "all"),
        numbers=True,
        rate=0.1,
        scores=ALL,
        sinks=True,
    ),
    "all at once, heads of 128": Case(
        blocks=(2, 3), block=(128, 128), d=128, masks=("rows",), numbers=True, rate=0.5, scores=ALL
    ),
    "all at once, split": Case(d=192, blocks=(2, 2), masks=("all",), rate=0.5, scores=ALL),
    "dropout in blocks without a mask": Case(heads=(4, 1), block=(64, 128), rate=0.9),
}
MORE = {
    "heads of 32": Case(blocks=(2, 3), block=(128, 64), d=32, scores=CAUSAL),
    "heads of 96": Case(blocks=(3, 2), block=(64, 128), d=96, scores=CAUSAL, sinks=True),
    "heads of 256": Case(blocks=(2, 2), block=(128, 64), d=256, scores=CAUSAL),
    "blocks of 192 x 256": Case(blocks=(3, 2), block=(192, 256), scores=CAUSAL),
    "negative scale": Case(scores={"softcap": 2.0, "mask": lambda head, q, k: (q + k) % 3 != head}),
    "many batch elements": Case(n=3, heads=(6, 2), blocks=(4, 4), d=128, scores=SEGMENTS),
    "dense": Case(density=1.0, blocks=(4, 4)),
    "nothing but the first": Case(density=0.0, sinks=True),
}
