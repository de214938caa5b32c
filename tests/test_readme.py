"""What the README and the documentation show runs, leads somewhere and was measured."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent


PAGES = ("products", "sampling", "modules", "kernels", "attention")


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
@pytest.mark.usefixtures("quick_compilations")
def test_the_examples_run(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    # a reader's JAX promotes dtypes and ranks, and so does optax
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, name, "exec"), scope)  # with asserts of their own


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name
)
def test_the_links_lead_somewhere(path):
    prose = re.sub(
        r"```.*?```", "", path.read_text(), flags=re.DOTALL
    )  # code calls what it indexes
    for link in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (path.parent / link).exists(), link


def test_the_times_are_those_of_the_records():
    """The table of the README and the JSON lines that it was made from."""
    times = {}
    for text in (ROOT / "benchmarks" / "results" / "cpu-matmul.jsonl").read_text().splitlines():
        one = json.loads(text)
        case = one["shape"], one["tokens"], one["pattern"], one["implementation"]
        if case == ([2048, 2048], 2048, "random", "auto"):
            where = one["block"][0], one["density_asked"]
            times.setdefault(where, {})[one["product"]] = f"{one['ratio']:.2f}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in (16, 32, 64, 128):
        cells = [" / ".join(times[block, density].values()) for density in (0.05, 0.1, 0.25, 0.5)]
        assert f"| {block} | {' | '.join(cells)} |" in readme
