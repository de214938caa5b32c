"""`python -m benchmarks.conv` on layers so small that nothing takes long."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from benchmarks import _conv_cases as cases
from benchmarks import conv
from benchmarks._products import PRODUCTS, Programs

SMALL = cases.Layer(network="small", images=2, side=5, channels=(16, 24), strides=2)
OPTIONS = {"seed": 0, "budget": 0.01, "rounds": 2}


def small(**options):
    given = {"blocks": (8,), "densities": (0.5,), "dtypes": ("float32",), "seed": 0}
    names = ("xla", "auto")
    return list(cases.cases((SMALL,), implementations=names, **given | options))


@pytest.fixture(scope="module")
def records():
    (case,) = small()
    return list(conv.measure(case, Programs(), **OPTIONS))


def test_a_record_for_each_product_and_implementation(records):
    assert [(one["product"], one["implementation"]) for one in records] == [
        (product, name) for product in PRODUCTS for name in ("xla", "auto")
    ]
    for one in records:
        json.dumps(one, allow_nan=False)
        assert one["refused"] is None
        assert one["clock"] == "wall"
        assert one["ratio_low"] <= one["ratio"] <= one["ratio_high"]
        assert one["program"] in ("xla", "dense")
        assert (one["channels"], one["density"], one["block"]) == ([16, 24], 0.5, [8, 8])
    assert records[0]["flops"] == 2 * 2 * 9 * 9 * 16 * 24


def test_what_people_read(records):
    first, second = conv.lines(records)
    assert first.startswith("small 3x3/2 16->24 2x5x5 b=8 0.500 xla:  forward ")
    assert "[dense]" in second
    text = "\n".join(conv.summary(records))
    assert "xla   more taps b=8   0.5  forward time / dense time: median" in text
    assert "goals met: " in text


@pytest.mark.slow
def test_a_wrong_result_is_not_timed(monkeypatch):
    (case,) = small()
    right = bsjax.conv

    def wrong(x, values, p, **options):
        y = right(x, values, p, **options)
        return y if options["implementation"] != "xla" else y * 1.01

    monkeypatch.setattr(bsjax, "conv", wrong)
    found = list(conv.measure(case, Programs(), **OPTIONS))
    for one in found:
        assert ("ratio" in one) == (one["refused"] is None) == (one["program"] == "dense")
    assert any("WRONG, not timed" in text for text in conv.lines(found))


def test_what_blocks_do_not_divide_is_left_out():
    assert small(blocks=(16,)) == []
    assert len(small(blocks=(8, 16), densities=(0.1, 0.5))) == 2


def test_values_are_cut_out_of_the_kernel():
    p = bsjax.BlockPattern.from_mask(np.array([[True, False], [True, True]]), 2)
    w = jnp.arange(3 * 3 * 4 * 4.0).reshape(3, 3, 4, 4)
    values = conv.stored(w, p)
    assert values.shape == (3, 3, 3, 2, 2)
    np.testing.assert_array_equal(values[2], w[..., 2:, 2:])


def test_goals():
    half, sixth = small(densities=(0.5, 0.2))
    assert [cases.goal(half, name) for name in ("xla", "auto")] == [None, 1.08]
    assert cases.goal(sixth, "xla") == 1


@pytest.mark.slow
def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conv, "QUICK", (SMALL,))
    path = tmp_path / "conv.jsonl"
    flags = ["--quick", "--block", "8", "--density", "0.25", "--rounds", "1", "--json", str(path)]
    assert conv.main(flags) == 0
    assert len(path.read_text().splitlines()) == 6
    assert "1 cases on " in capsys.readouterr().out
