"""Which implementation of attention runs: pure functions of shapes."""

from typing import Any

from bsjax.ops._attention_tile import Fixed, Operands, Spec


def fastest(spec: Spec, x: Operands, p: Fixed, platform: str) -> str:
    """What `auto` runs on a platform."""
    return "xla"


def check(spec: Spec, q: Any) -> None:
    """An explicit request is kept or refused, never replaced."""
