"""Which implementation of attention runs: pure functions of shapes."""

from typing import Any, get_args

from bsjax.ops import _choose, _mosaic_attention
from bsjax.ops._attention_tile import Fixed, Operands, Spec
from bsjax.ops._choose import Implementation

# On a CPU a tile costs what its share of all scores costs densely, or less; only with few scores,
# and many of them stored, is it worth to have them all at once. Measured with `xla` and `dense`,
# forward and backward, on two busy cores of an AMD EPYC.
CPU_SCORES, CPU_BREAK_EVEN = 1 << 19, 0.4  # queries times keys, and density
# Elsewhere loops over tiles are slow, so all scores at once, in arrays of at most so many numbers.
ELSEWHERE_SCORES = 1 << 28


def check(spec: Spec, x: Operands, p: Fixed) -> None:
    """An explicit request is kept or refused, never replaced."""
    if spec.name not in (known := get_args(Implementation.__value__)):
        names = ", ".join(f'"{name}"' for name in known)
        raise ValueError(f"attention: `implementation` must be one of {names}, got {spec.name!r}.")
    if spec.name == "mosaic" and (reason := _mosaic_attention.why_not(spec, x, p)):
        _choose.refuse("attention", spec.name, reason)


def fastest(spec: Spec, x: Operands, p: Fixed, platform: str) -> str:
    """What `auto` runs on a platform."""
    (r, c), scores = spec.grid, x.q.shape[1] * x.k.shape[1]
    if platform == "cpu":
        many = p.row.shape[-1] > CPU_BREAK_EVEN * r * c
        return "dense" if many and scores <= CPU_SCORES else "xla"
    return "dense" if x.q.shape[0] * x.q.shape[2] * scores <= ELSEWHERE_SCORES else "xla"


def runs(spec: Spec, x: Operands, p: Fixed) -> dict[str, Any]:
    """What runs on each platform, where the platform decides. Kernels run if they are asked for."""
    return {platform: fastest(spec, x, p, platform) for platform in ("cpu", "default")}
