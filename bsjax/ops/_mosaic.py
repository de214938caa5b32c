"""The one door to the GPU kernels: padding, pointers and configurations belong here."""

from typing import Any


def why_not(problem: Any) -> str | None:
    """The reason why no kernel can run `problem`, or None if one can."""
    return f"this release has no Mosaic GPU kernel for {problem.op} yet"
