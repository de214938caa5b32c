"""`benchmarks.lstm`: what is compared is equal, a wrong cell has no speed, goals are not moved."""

import dataclasses
import json

import numpy as np
import pytest

import bsjax.nnx
from benchmarks import _lstm_cases as cases
from benchmarks import lstm
from benchmarks._lstm_cases import CELLS, Case
from bsjax import _recurrent

SMALL = Case(state=32, density=0.4, block=8, depth=2, inputs=4, batch=3, length=2)


@pytest.mark.parametrize(("n", "density"), [(64, 0.05), (10, 0.37), (5, 0.1), (3, 1.0)])
def test_density_counts_the_diagonal(n, density):
    mask = cases.graph(n, 0, density)
    assert mask.sum() == max(n, round(density * n * n))
    assert mask.diagonal().all()


@pytest.mark.parametrize("cell", CELLS)
def test_equal_parameters(cell):
    """One feature more would be more than the sparse cell has."""
    case = dataclasses.replace(SMALL, cell=cell, state=256, block=32, density=0.1)
    wanted = cases.parameters(lambda: cases.sparse(case))
    width = cases.narrower(case)
    ours, wider = (cases.parameters(lambda w=w: cases.dense(case, w)) for w in (width, width + 1))
    assert 0.98 * wanted <= ours <= wanted < wider


def test_wrong_cells_have_no_speed(monkeypatch):
    assert cases.check(SMALL) is None
    step = _recurrent.step

    def wrong(cell, carry, inputs):
        sparse = cell.gates.pattern.get_value().grid != (1, 1)
        (c, h), y = step(cell, carry, inputs)
        return (c, h), y * (1.01 if sparse else 1)

    monkeypatch.setattr(_recurrent, "step", wrong)
    # a function of its own, or what was compiled before would run
    monkeypatch.setattr(cases, "outputs", lambda rnn, x: rnn(x))
    (record,) = lstm.measure(SMALL, rounds=1)
    assert "differs from the dense cell by" in record["refused"]
    assert next(lstm.table(record)).startswith("refused: differs")


@pytest.mark.usefixtures("quick_compilations")
def test_command(tmp_path, capsys):
    """One line for each part, with the machine, the sizes and the ratios."""
    path = tmp_path / "lstm.jsonl"
    flags = [f"--{n}={getattr(SMALL, n)}" for n in ("state", "density", "block", "depth", "batch")]
    flags += ["--length=2", "--inputs=4", "--rounds=1", f"--json={path}"]
    assert lstm.main([*flags, "--parts=train,product"]) == 0
    train, product = map(json.loads, path.read_text().splitlines())
    assert list(train["of"]) == [lstm.SPARSE, lstm.WIDE, lstm.EQUAL, lstm.STEP_BY_STEP]
    assert list(product["of"]) == [lstm.SPARSE, lstm.WIDE]
    assert train["of"][lstm.WIDE]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    ours = train["of"][lstm.SPARSE]
    assert ours["bytes_per_second"] == pytest.approx(3 * 2 / ours["ms"] * 1e3)
    assert ours["width"] == 32
    assert train["clock"] == product["clock"] == "wall"
    assert (train["goal"], train["met"]) == (None, None)  # not the size that has one
    assert (train["commit"], train["device"]) != (None, None)
    assert "bytes/s" in capsys.readouterr().out


def test_goals_belong_to_their_sizes():
    assert lstm.CASES["cpu"] == Case(state=4096, density=0.05, block=64, batch=64)
    gpu = lstm.CASES["gpu"]
    assert (gpu.state, gpu.density, gpu.block, gpu.batch) == (18432, 0.03, 64, 64)
    assert lstm.GOALS == {"cpu": {"train": 4.0}, "gpu": {"product": 15.0}}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--state=100", "--block=64"], "--state 100 is no multiple of --block 64"),
        (["--density=0"], "a density above 0"),
        (["--parts=run"], "expected one of train, infer, product"),
    ],
)
def test_flags(flags, text, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        lstm.main([*flags, f"--json={tmp_path / 'lstm.jsonl'}"])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_dense_weights_are_no_zeros():
    cell = cases.dense(SMALL, 16)
    values = np.asarray(cell.steps[0].values[...])
    assert values.shape == (1, 16, 16)
    assert values.all()
    assert isinstance(cell, bsjax.nnx.SmallWorldLSTMCell)
