"""The floors are those of the formulas, and the cases and goals those of the design."""

import numpy as np
import pytest

from benchmarks import _gpu_cases as gpu_cases
from benchmarks import _gpu_floor as floors
from benchmarks._gpu_cases import FIRST, PRODUCTS, REST, GpuCase, goal, mask, met, predicted, twin
from benchmarks._gpu_floor import (
    Ceilings,
    Sizes,
    best,
    floor,
    groups,
    matmul,
    narrow,
    sddmm,
    unions,
)
from bsjax import patterns

SIDE = 8192
DENSE = floor(floors.dense(SIDE, (SIDE, SIDE)), Ceilings()).seconds


def sizes(block, density, n=SIDE, side=SIDE):
    return Sizes(n, (side, side), (block, block), round(density * (side // block) ** 2))


@pytest.mark.parametrize(
    ("tile", "block", "bytes_per_flop", "tera"),
    [(256, 128, 0.0117, 470), (256, 64, 0.0195, 280), (256, 32, 0.035, 157)],
)
def test_a_tile_that_shares_nothing(tile, block, bytes_per_flop, tera):
    work = matmul(sizes(block, 0.1), tile)
    assert work.l2 / work.flops == pytest.approx(bytes_per_flop, abs=6e-4)
    least = floor(work, Ceilings())
    assert least.by == "l2"
    assert work.flops / least.seconds / 1e12 == pytest.approx(tera, rel=0.01)


def test_few_tokens():
    """64 tokens, 12288 x 12288, 3%: 27 MB in 4.9 microseconds, where dense takes 70."""
    work = matmul(sizes(32, 0.03, n=64, side=12288), 64)
    assert work.l2 == pytest.approx(27e6, rel=0.02)
    assert floor(work, Ceilings()).seconds == pytest.approx(4.9e-6, rel=0.02)
    dense = floor(floors.dense(64, (12288, 12288)), Ceilings())
    assert dense == (pytest.approx(70e-6, rel=0.03), "memory")


def test_dvalues_of_lonely_blocks():
    one = sizes(64, 0.1)
    work = sddmm(one, one.stored)
    assert work.l2 / work.flops == pytest.approx(2 / 64)
    assert sddmm(one, one.stored // 4).l2 == pytest.approx(
        0.625 * work.l2, rel=1e-3
    )  # four share their y
    assert sddmm(one, one.stored, cluster=2).l2 == pytest.approx(0.75 * work.l2)


@pytest.mark.parametrize(
    ("density", "block", "columns", "ceiling"),
    [
        (0.05, 128, 2, 0.73),
        (0.1, 128, 2, 0.74),
        (0.25, 128, 2, 0.79),
        (0.5, 128, 2, 0.89),
        (0.05, 64, 4, 0.42),
        (0.1, 64, 4, 0.45),
        (0.5, 64, 4, 0.75),
    ],
)
def test_columns_that_share_the_tokens_of_their_union(density, block, columns, ceiling):
    """The ceilings over the dense product, of four programs that share weights."""
    union = (1 - (1 - density) ** columns) / density
    work = matmul(sizes(block, density), 128, reads=union / columns, cluster=4)
    assert density * DENSE / floor(work, Ceilings()).seconds == pytest.approx(ceiling, abs=0.01)


def test_unions():
    stored = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0]], bool)
    assert unions(stored, 1) == 1
    assert unions(stored, 2) == pytest.approx(2 * (2 + 1 + 1) / 5)
    assert unions(np.ones((4, 8), bool), 4) == 1
    rng = np.random.default_rng(0)
    assert unions(rng.random((512, 512)) < 0.5, 2) == pytest.approx(1.5, abs=0.01)


def test_groups():
    stored = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0]], bool)
    assert [groups(stored, most) for most in (1, 2, 3)] == [4, 3, 2]


@pytest.mark.parametrize(("width", "share"), [(8, 0.22), (16, 0.4), (32, 0.67), (64, 1), (256, 1)])
def test_narrow_products(width, share):
    assert narrow(width) == share
    work = floors.Work(790e12, width, 0, 0)
    assert floor(work, Ceilings()) == (pytest.approx(1 / share), "flops")


def test_a_floor_is_the_largest_time():
    ceilings = Ceilings(flops=10, memory=10, l2=10)
    for by, work in (("flops", (9, 64, 1, 1)), ("l2", (1, 64, 9, 1)), ("memory", (1, 64, 1, 9))):
        assert floor(floors.Work(*work), ceilings) == (pytest.approx(0.9), by)


def test_measured_ceilings_replace_what_was_assumed():
    some = [{"ceiling": "l2", "value": 7e12}, {"benchmark": "matmul gpu"}]
    assert floors.ceilings_from(some) == Ceilings(l2=7e12)
    every = [{"ceiling": name, "value": 1.0} for name in ("flops", "memory", "l2", "launch")]
    assert floors.ceilings_from(every) == Ceilings(flops=1, memory=1, l2=1, measured=True)
    twice = [{"ceiling": "l2", "value": 1.0}, {"ceiling": "l2", "value": 2.0}]
    assert floors.ceilings_from(twice).l2 == 2


def tiles(tile, columns=1):
    return {"tile": tile, "columns": columns, "cluster": 1}


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_best_floor_is_below_that_of_any_tile(product):
    case = GpuCase(block=(64, 64), density=0.25)
    for tile in (64, 128, 256):
        one = predicted(case, product, tiles(tile), Ceilings())
        assert one["floor_ms"] <= one["tile_floor_ms"]
        assert one["ceilings"] == "assumed"
        assert one["dense_floor_ms"] == pytest.approx(1e3 * DENSE)
        assert one["floor_efficiency"] == pytest.approx(0.25 * 1e3 * DENSE / one["floor_ms"])


def test_columns_that_store_the_same_rows_share_them():
    hub = np.zeros((8, 8), bool)
    hub[0] = True  # one block-row: eight columns share it
    across = Sizes(4096, (512, 512), (64, 64), 8)
    shared = best("forward", across, hub, Ceilings(memory=1e30))
    assert best("forward", across, hub.T, Ceilings(memory=1e30)).seconds > shared.seconds


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_a_launch_reads_what_columns_share_once(columns):
    """Bytes of tokens by the definition, at 256 columns of 64 blocks; those of weights are left."""
    rng = np.random.default_rng(0)
    stored = rng.random((64, 16)) < 0.5
    stored[:, 4:8] = stored[:, 4:5]  # one group of four that is alike
    reads = 0
    for group in np.split(stored, 16 // columns, axis=1):
        for row in group:
            halves = [row] if columns < 4 else np.split(row, 2)
            each = [1 if half.all() else half.sum() for half in halves]
            reads += 1 if row.all() else sum(each)
    size = Sizes(256, (4096, 1024), (64, 64), int(stored.sum()))
    for product in ("forward", "dx"):
        work = floors.launched(product, size, stored, 128, columns)
        weights = 2 * stored.sum() * 64 * 64
        assert work.l2 == pytest.approx(2 * (256 * 64 * reads + weights))
        assert work[:2] == matmul(size, 128)[:2]
    assert floors.launched("forward", size, stored, 128).l2 == matmul(size, 128).l2
    lonely = floors.launched("dvalues", size, stored, 128)
    assert floors.launched("dvalues", size, stored, 128, columns) == lonely


@pytest.mark.parametrize(("pattern", "group"), [("kind 2", 2), ("kind 4", 4)])
def test_kind_patterns_share_what_they_store(pattern, group):
    case = GpuCase(block=(64, 64), density=0.25, pattern=pattern)
    stored = mask(case)
    assert stored.mean() == 0.25
    assert not np.array_equal(stored, mask(case, 1))
    shared = np.repeat(stored[:, ::group], group, axis=1)
    np.testing.assert_array_equal(stored, shared)
    assert patterns.reads_per_block(stored, 2 * group) > 0.8 / group  # and groups differ
    for product, less in (("forward", True), ("dx", False), ("dvalues", False)):
        alone, ours = (
            predicted(case, product, tiles(128, columns), Ceilings())["tile_floor_ms"]
            for columns in (1, group)
        )
        assert (ours < 0.8 * alone) == less
    for columns in (1, 2, 4):  # as many as two warpgroups hold sums for
        one = predicted(case, "forward", tiles(128, columns), Ceilings())
        assert one["floor_ms"] <= one["tile_floor_ms"]


def test_dx_is_the_product_with_the_transpose(monkeypatch):
    """Blocks of 64 x 256 are 64 columns wide for dx, and its columns are their rows."""
    stored = np.zeros((64, 16), bool)
    stored[:, 3] = True  # one block-column: for dx, columns that share their row
    monkeypatch.setattr(gpu_cases, "mask", lambda case, seed: stored)
    case = GpuCase(block=(64, 256), density=1 / 16, shape=(4096, 4096))
    forward, dx = (predicted(case, product, tiles(128), Ceilings()) for product in PRODUCTS[:2])
    flops = 2 * case.tokens * stored.sum() * 64 * 256
    for one, width in ((forward, 256), (dx, 64)):
        tile_ms = 1e3 * flops * (128 + width) / (128 * width) / Ceilings().l2
        assert one["tile_floor_ms"] == pytest.approx(tile_ms)
    turned = GpuCase(block=(256, 64), density=1 / 16, shape=(4096, 4096))
    monkeypatch.setattr(gpu_cases, "mask", lambda case, seed: stored.T)
    assert predicted(turned, "forward", tiles(128), Ceilings()) == dx


def test_the_cases_are_those_of_the_design():
    every = FIRST + REST
    assert len({case.name for case in every}) == len(every)
    square = {(case.block, case.density) for case in every if case.shape == (8192, 8192)}
    assert {((b, b), d) for b in (16, 32, 64, 128) for d in (0.05, 0.1, 0.25, 0.5)} <= square
    assert {case.block[0] for case in FIRST if not case.few} == {64, 128}
    few = {(case.tokens, case.shape, case.density) for case in every if case.few}
    assert few == {(64, (12288, 12288), 0.03)}
    assert any(case.pattern == "hub" for case in every)
    assert any(case.block == (64, 256) for case in every)
    kind = {(case.pattern, case.density) for case in every if case.pattern.startswith("kind")}
    assert kind == {(f"kind {g}", d) for g in (2, 4) for d in (0.1, 0.25, 0.5)}
    assert {case.pattern for case in FIRST} >= {"random", "kind 4"}


def test_goals():
    def of(block, density, product, **more):
        return goal(GpuCase(block=block, density=density, **more), product)

    assert of((64, 64), 0.25, "dx") == {"of_floor": 0.8, "efficiency": 0.55}
    assert of((16, 16), 0.5, "dvalues") == {"of_floor": 0.8, "efficiency": 0.15}
    assert of((64, 256), 0.1, "forward") == {"of_floor": 0.8, "efficiency": 0.85}
    assert of((64, 256), 0.05, "forward") == {"of_floor": 0.8}
    assert of((64, 64), 0.1, "dx", pattern="hub") == {"of_floor": 0.8, "over_twin": 1.15}
    kind = {"pattern": "kind 4"}
    assert of((64, 64), 0.1, "forward", **kind) == {"of_floor": 0.8, "efficiency": 0.85}
    assert of((64, 64), 0.1, "dx", **kind) == {"of_floor": 0.8, "efficiency": 0.42}
    assert of((64, 64), 0.05, "forward", **kind) == {"of_floor": 0.8, "efficiency": 0.38}
    assert of((64, 64), 0.1, "forward", pattern="kind 2") == {"of_floor": 0.8, "efficiency": 0.42}
    few = {"tokens": 64, "shape": (12288, 12288)}
    assert of((32, 32), 0.03, "forward", **few) == {"of_floor": 0.8, "speedup": 10}
    assert of((64, 64), 0.1, "dx", dtype="float16") == {"of_floor": 0.8}


def test_what_is_met():
    wanted = {"of_floor": 0.8, "over_twin": 1.15, "efficiency": 0.5}
    assert met(wanted, {"of_floor": 0.8, "over_twin": 1.2}) == {
        "of_floor": True,
        "over_twin": False,
    }


def test_a_twin_has_as_many_blocks_and_no_hub():
    case = GpuCase(block=(64, 64), density=0.1, pattern="hub", shape=(2048, 2048))
    hub, even = mask(case), np.asarray(twin(case).mask())
    assert hub.sum() == even.sum()
    assert hub.sum(0).max() > 2 * even.sum(0).max()
    assert np.ptp(even.sum(0)) <= 1


def test_a_pattern_that_does_not_exist():
    case = GpuCase(block=(64, 64), density=0.001, pattern="hub", shape=(2048, 2048))
    with pytest.raises(ValueError, match="no Barabasi-Albert graph has such a density"):
        gpu_cases.mask(case)
