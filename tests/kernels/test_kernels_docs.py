"""docs/kernels.md: its code runs, and its promises about blocks are those of the code."""

import re
from pathlib import Path

import jax

from pallas_kernels import config
from pallas_kernels.epilogue import ACTIVATIONS

TEXT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_code_runs():
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(compile(block, "docs/kernels.md", "exec"), scope)


def test_says_what_the_code_says():
    *most, last = config.SIDES
    assert f"sides of {', '.join(map(str, most))} and {last}" in TEXT
    assert config.BLOCK == 128 * 256
    assert "up to 128 x 256" in TEXT
    assert ", ".join(f'"{name}"' for name in ACTIVATIONS) in TEXT
