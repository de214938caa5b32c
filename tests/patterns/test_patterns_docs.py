"""docs/patterns.md: its code runs, its table is what the code says, no public name is missing."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest

from bsjax import patterns, plot

TEXT = (Path(__file__).parents[2] / "docs" / "patterns.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `([^`]+)` \| ([\d.]+% .*) \|$", TEXT, re.MULTILINE)

READS = re.findall(
    r"^\| (\d+)% \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE
)


def test_code_runs():
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    assert len(plt.get_fignums()) == 4
    plt.close("all")


def numbers(cell):
    return [float(number) for number in re.findall(r"[\d.]+", cell)]


@pytest.mark.parametrize(("call", "cells"), TABLE, ids=[call for call, _ in TABLE])
def test_table(call, cells):
    """Within what another random stream (another numpy) may change."""
    density, profile, length, clustering, imbalance = map(numbers, cells.split("|"))
    made = eval(call, vars(patterns))
    mask = made[0] if isinstance(made, list) else made
    assert [100 * mask.mean()] == pytest.approx(density, abs=0.005)
    percent = [100 * share for share in patterns.mixing_profile(made)]
    assert percent == pytest.approx(profile, abs=3)
    if not isinstance(made, list):
        assert [patterns.average_path_length(mask)] == pytest.approx(length, abs=0.05)
        assert [patterns.clustering(mask)] == pytest.approx(clustering, abs=0.03)
    assert [patterns.degree_balance(mask).columns.imbalance] == pytest.approx(imbalance, rel=0.3)


@pytest.mark.parametrize("row", READS, ids=[f"{d}% in groups of {g}" for d, g, *_ in READS])
def test_reads(row):
    """Within what another random stream may change."""
    percent, group, *numbers = map(float, row)
    grid, density, group = (128, 128), percent / 100, int(group)
    mask = patterns.random(grid, density)
    order = patterns.similar_columns(mask, group)
    masks = [mask, mask[:, order], patterns.grouped(grid, density, group=(1, group))]
    found = [patterns.reads_per_block(one, group) for one in masks]
    assert found == pytest.approx(numbers, abs=0.015)


def test_nothing_is_missing():
    assert len(TABLE) == 8
    assert len(READS) == 6
    drawn = {name for name, thing in vars(plot).items() if callable(thing) and name[0].islower()}
    ours = {name for name in drawn if getattr(plot, name).__module__ == "bsjax.plot"}
    for name in {*patterns.__all__, *ours} - {"Degrees", "DegreeBalance"}:
        assert re.search(rf"\b{name}\(", TEXT), name
