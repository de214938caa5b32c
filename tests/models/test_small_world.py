"""The comparison asks for the right runs, keeps each, goes on from them, and says what they say."""

import functools
import json
import math
import shlex
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from models import _recurrent as recurrent
from models import _small_world_report as reporting
from models import small_world
from models._cli import INTERRUPTED, Mistake, parse
from models._recurrent import DENSE, SPARSE, Size
from models._small_world_report import Found
from tests.models import stories
from tests.models.lstm_runs import letters
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module
from tests.models.stories import way_back

TINY = shlex.split(
    "--parameters 200000 --block 8 --links 1 --embedding 4 --depth 2 --bytes 177 --batch 2 "
    "--length 8 --valid 0.1 --test 0.1 --heldout_bytes 40 --rounds 1 "
    "--learning_rates 0.01 0.02 0.04 --seeds 2 --depths 1 3"
)
STEPS = 11


class Pretended:
    """A run whose loss falls at a speed that its rate, seed and kind decide, and no model."""

    made: list = []  # noqa: RUF012 - of the tests below, which empty it
    step_seconds: dict = {SPARSE: 2.0, DENSE: 1.0}  # noqa: RUF012
    diverges: float = math.inf

    def __init__(self, size, training, seed):
        self.size, self.training, self.seed, self.steps = size, training, seed, 0
        self.made.append(self)

    @classmethod
    def start(cls, size, training, seed):
        return cls(size, training, seed)

    @property
    def bits(self):
        best = 0.02 if self.size.dense else 0.01  # rates differ
        away = abs(math.log2(self.training.learning_rate / best))
        return 8 - self.steps / 5 + away + 0.01 * self.seed + 0.1 * self.size.dense

    def step(self, window, count):
        self.steps += 1
        diverged = self.training.learning_rate >= self.diverges
        return jnp.float32(jnp.nan if diverged else self.bits)

    def rewind(self):
        pass

    def averaged(self):
        return self

    @property
    def model(self):
        return self


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(Pretended, "made", [])
    monkeypatch.setattr(small_world, "Run", Pretended)
    monkeypatch.setattr(small_world, "evaluated", lambda run: run)
    monkeypatch.setattr(small_world, "heldout_bits", lambda run, streams: run.bits)
    times = {kind: np.array([s]) for kind, s in Pretended.step_seconds.items()}
    monkeypatch.setattr(small_world, "step_seconds", lambda *_: times)
    return Pretended


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(small_world, "report", lambda *_: None)


@pytest.fixture
def flags(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_bytes(letters(1200).tobytes())
    return [*TINY, "--data", str(path), "--out", str(tmp_path / "out")]


run_main = functools.partial(stories.run_main, small_world)


def lines(tmp_path):
    return (tmp_path / "out" / "small-world.jsonl").read_text().splitlines()


def test_a_grid_then_seeds_at_the_rate_that_validation_chose(flags, pretended, tmp_path):
    code, printed = run_main(flags)
    assert code == 0
    done = [(r.size.dense, r.training.learning_rate, r.seed, r.size.depth) for r in pretended.made]
    grid = {(dense, rate, 0, 2) for dense in (False, True) for rate in (0.01, 0.02, 0.04)}
    assert set(done[:6]) == grid
    assert done[6:8] == [(False, 0.01, 1, 2), (True, 0.02, 1, 2)]  # seed 0 is known
    depths = [(dense, (0.01, 0.02)[dense], 0, d) for d in (1, 3) for dense in (False, True)]
    assert done[8:] == depths
    assert all(r.steps == STEPS for r in pretended.made)
    # equal parameters, at each depth
    for depth in (1, 2, 3):
        one, other = (
            next(r.size for r in pretended.made if r.size[2] == depth and r.size.dense == dense)
            for dense in (False, True)
        )
        counts = [recurrent.parameters(size) for size in (one, other)]
        assert abs(counts[1] / counts[0] - 1) <= 0.01
        assert counts[0] <= 200_000
    assert "* the best of the learning rates is their smallest or largest" in printed
    assert (
        "small-world minus dense -0.1000 bits/byte (-0.1000, -0.1000); the small-world" in printed
    )
    assert "is better with 2 of 2 seeds" in printed
    record = json.loads(lines(tmp_path)[0])
    assert {"command", "commit", "jax", "flax", "device"} <= set(record["where"])
    assert record["settings"]["seed"] == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        f"small-world-{name}.png" for name in ("curves", "seeds", "depths")
    }
    found = json.loads((tmp_path / "out" / "small-world.json").read_text())
    assert found["learning rates"][SPARSE]["0.01"] < found["learning rates"][SPARSE]["0.02"]
    assert found["models"][DENSE]["rate"] == "0.02"
    assert found["models"][SPARSE]["rate"] == "0.01*"


def test_what_is_there_is_not_run_again_but_for_other_settings(
    flags, pretended, tmp_path, no_report
):
    run_main(flags)
    before, count = lines(tmp_path), len(pretended.made)
    code, printed = run_main([*flags, "--resume"])
    assert code == 0
    assert lines(tmp_path) == before
    assert len(pretended.made) == count
    assert (
        f"learning rates: 6 of 6 runs are in {tmp_path / 'out' / 'small-world.jsonl'} " in printed
    )
    run_main([*flags, "--resume", "--seeds", "3"])
    assert len(pretended.made) == count + 2
    run_main([*flags, "--resume", "--clip", "0.5"])
    assert len(pretended.made) > count + 10


def test_ctrl_c_leaves_whole_runs_and_the_way_back(
    flags, pretended, tmp_path, monkeypatch, no_report
):
    def interrupted(self, window, count):
        self.steps += 1
        if len(self.made) == 3 and self.steps == 4:
            signal.raise_signal(signal.SIGINT)
        return jnp.float32(self.bits)

    with monkeypatch.context() as patch:
        patch.setattr(Pretended, "step", interrupted)
        code, printed = run_main(flags)
    assert code == INTERRUPTED
    assert len(lines(tmp_path)) == 2
    code, printed = run_main(way_back(small_world, printed))
    assert code == 0
    assert "learning rates: 2 of 6 runs are in" in printed
    assert len(pretended.made) == 3 + 4 + 2 + 4


def test_equal_time_trains_the_slower_one_in_the_time_of_the_other(flags, pretended):
    _, printed = run_main([*flags, "--equal_time", "--depths", "1"])
    again = [r for r in pretended.made if r.training.steps == round(STEPS / 2)]
    assert [(r.size.dense, r.seed, r.steps) for r in again] == [(False, 0, 6), (False, 1, 6)]
    assert f"with 6 steps of the {SPARSE} model, as long as the other takes: " in printed


def test_rates_that_diverge_are_out(flags, pretended, monkeypatch, no_report):
    monkeypatch.setattr(Pretended, "diverges", 0.02)
    run_main(flags)
    assert {r.training.learning_rate for r in pretended.made[6:]} == {0.01}
    monkeypatch.setattr(Pretended, "diverges", 0.0)
    with pytest.raises(Mistake, match=r"^the small-world model diverged at every rate: give lower"):
        run_main(flags)


def found_with(curves, seconds):
    """Results of one seed each."""
    seeds = {
        kind: [{"valid": 1.0, "test": 1.0, "valid curve": c, "loss curve": [[c[-1][0], 1.0]]}]
        for kind, c in curves.items()
    }
    times = {kind: np.array([s]) for kind, s in seconds.items()}
    size = Size(8)
    return Found({SPARSE: size, DENSE: size}, {}, {}, seeds, times, {}, None)


def test_equal_time_is_when_the_faster_one_ends():
    curves = {SPARSE: [[10, 4.0], [20, 2.0]], DENSE: [[10, 5.0], [20, 3.0]]}
    found = found_with(curves, {SPARSE: 4.0, DENSE: 3.0})
    # dense ends after 60 s, when the other has done 15 steps
    assert reporting.at_equal_time(found) == {SPARSE: [3.0], DENSE: [3.0]}


def test_a_difference_by_seed_in_words():
    seeds = {
        SPARSE: [{"test": t} for t in (2.0, 2.2, None)],
        DENSE: [{"test": t} for t in (2.1, 2.1, 2.0)],
    }
    gaps = reporting.difference(seeds, "test")
    assert gaps == [pytest.approx(-0.1), pytest.approx(0.1), None]
    assert reporting._in_words(gaps).endswith("is better with 1 of 2 seeds")
    assert reporting._in_words([None]) == "a model diverged with every seed"


@pytest.mark.slow
def test_with_models(flags, tmp_path):
    """Nothing pretended."""
    fewer = ["--learning_rates", "0.02", "--seeds", "1", "--depths", "1", "--equal_time"]
    code, printed = run_main([*flags, *fewer])
    assert code == 0
    assert "bits/byte" in printed
    for line in lines(tmp_path):
        result = json.loads(line)["result"]
        assert "test" not in result or 0 < result["test"] < 9


def test_flags_that_fit_no_graph():
    config = parse(small_world.Config, [*TINY, "--parameters", "9"], command="it")
    with pytest.raises(
        Mistake, match=r"smallest model of blocks of 8 has .* take a smaller --block"
    ):
        config.sizes(2)
