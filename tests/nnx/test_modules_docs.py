"""docs/modules.md: its code runs, as a reader would run it, and names every initialiser."""

import inspect
import re
from pathlib import Path

import jax

from bsjax import inits

TEXT = (Path(__file__).parents[2] / "docs" / "modules.md").read_text(encoding="utf-8")


def test_code_runs():
    scope = {}
    # a reader's JAX promotes dtypes and ranks, and so does optax
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(compile(block, "docs/modules.md", "exec"), scope)


def test_names_every_initialiser():
    written_here = {
        name
        for name, f in vars(inits).items()
        if inspect.isfunction(f) and f.__module__ == inits.__name__ and not name.startswith("_")
    }
    assert {f for f in written_here - {"initialize"} if f"`inits.{f}" not in TEXT} == set()
