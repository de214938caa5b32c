"""The recipe from flags over Ctrl-C to pictures, bitwise resumed, and its mistakes."""

import functools
import json
import re
import shlex
import types

import numpy as np
import pytest

from models import _resnet_plan as plan
from models import _resnet_report as reports
from models import _resnet_train as net
from models import resnet
from models._cli import INTERRUPTED, Mistake, parse
from models._train import Checkpoints
from tests.models import stories
from tests.models.lstm_runs import leaves
from tests.models.stories import ctrl_c_at, one_line, way_back
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module
from tests.models.test_cifar import records, write  # noqa: F401 - a fixture

TINY = shlex.split(
    "--network tiny --block 4 --images 45 --batch 15 --measured 20 --epochs 2 --average 0.5 "
    "--augment crop cutout --statistics_batches 2 --rounds 0"
)
SMALLEST = ["--network", "resnet-8"]
STEPS = 6  # of each network: two epochs of three batches


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """A network of one residual block, which no name has."""
    named = plan.named

    def smaller(name):
        return plan.Size("basic", (1,), (16,)) if name == "tiny" else named(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "named", smaller)
        yield


run_main = functools.partial(stories.run_main, resnet)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Stopped in the second epoch of the second network, gone on with; and without a stop."""
    folder = tmp_path_factory.mktemp("story")
    out, straight = folder / "out", folder / "straight"
    flags = [*TINY, "--double-depth", "--statistics", "re-estimated"]
    with ctrl_c_at(STEPS + 4, net, "train_step"):  # of all networks
        interrupted, stopped = run_main([*flags, "--out", str(out)])
    step = Checkpoints(out / "resnet-checkpoint" / "twice-as-deep-0", {}).step()
    again = way_back(resnet, stopped)
    with ctrl_c_at(-1, net, "train_step") as steps:  # never: it counts
        ended, printed = run_main(again)
    run_main([*flags, "--out", str(straight)])
    return types.SimpleNamespace(**{k: v for k, v in locals().items() if k != "folder"})


def test_ctrl_c_ends_after_the_step_and_tells_the_way_back(story):
    assert story.interrupted == INTERRUPTED
    assert story.step == 4
    assert f"The checkpoint is in {story.out / 'resnet-checkpoint'}" in story.stopped
    assert "--resume" in story.again


def test_going_on_trains_only_what_is_missing(story):
    assert story.ended == 0
    assert len(story.steps) == 2
    assert "twice as deep, seed 0: going on from step 4." in story.printed


def lines(folder):
    return [json.loads(line) for line in (folder / "resnet.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(story):
    for one, other in zip(lines(story.out), lines(story.straight), strict=True):
        assert one["settings"] == other["settings"]
        for result in (one["result"], other["result"]):
            assert result.pop("seconds") > 0
        assert one["result"] == other["result"]
    found = []
    for folder in (story.out, story.straight):
        config = parse(resnet.Config, [*TINY, "--double-depth", "--out", str(folder)], command="")
        config = config.settled()
        size = resnet.sizes(config)["twice as deep"]
        _, like = net.start(size, config.training(STEPS), 1, 10, 0)
        where = folder / "resnet-checkpoint" / "twice-as-deep-0"
        saved = Checkpoints(where, {})
        saved.about = everything()
        found.append(saved.restore(like))
        saved.close()
    (one, state, log), (other, same, log_too) = found
    assert one == other == STEPS
    assert log["position"] == log_too["position"]
    assert log["losses"] == log_too["losses"]
    for a, b in zip(leaves(state), leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


class everything(dict):
    """Flags that fit whatever a checkpoint was made with."""

    def get(self, key, default=None):
        return Anything()


class Anything:
    def __eq__(self, other):
        return True

    __hash__ = None


def test_it_says_what_it_found(story):
    dense, deep = (line["result"] for line in lines(story.out))
    assert (dense["depth"], deep["depth"]) == (4, 6)
    more = deep["parameters"] - dense["parameters"]
    assert more == 2 * 2 * 16  # gains and offsets of two more normalisations
    assert deep["flops"] == dense["flops"]
    assert deep["stored"] == [0.5]
    for result in (dense, deep):
        assert len(result["training losses"]) == 2
        assert result["training losses"][1] < 4
        assert [epoch for epoch, _ in result["measured"]] == [1, 2]
        assert 0 <= result["accuracy"] <= 1
        assert result["loss"] != result["loss, last weights"]
    where = lines(story.out)[1]["where"]
    assert "--double_depth" in where["command"]
    assert {"commit", "jax", "flax", "grain", "device"} <= where.keys()
    assert "of which the first 45 and 20" in story.printed
    assert re.search(r"twice as deep: \+\d\.\d\d% parameters and [+-]\d\.\d\d% oper", story.printed)
    assert re.search(r"it is better with [01] of 1 seed", story.printed)
    assert "tiny, 2 epochs in batches of 15" in story.printed
    names = ("resnet-curves.png", "resnet-patterns.png")
    assert all((story.out / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert json.loads((story.out / "resnet.json").read_text())["models"].keys() == {
        "dense",
        "twice as deep",
    }


def test_a_second_run_puts_the_first_aside(story):
    """Nothing is left to train: with --resume everything is known already."""
    with ctrl_c_at(-1, net, "train_step") as steps:
        code, _ = run_main(story.again)
    assert (code, len(steps)) == (0, 0)


KINDS = ("--fold --density 0.5", "--density 1 --fraction 0.5", "--fold --network wrn-10-1")


@pytest.mark.slow
@pytest.mark.parametrize("flags", KINDS)
def test_other_networks(tmp_path, flags):
    flags = [*TINY, *SMALLEST, "--out", str(tmp_path), "--epochs", "1", *flags.split()]
    code, printed = run_main(flags)
    assert code == 0
    (line,) = lines(tmp_path)
    assert line["settings"]["model"] in ("block-sparse", "sampled")
    assert line["settings"]["model"] in printed


def test_photographs_by_path(tmp_path, records, monkeypatch):  # noqa: F811
    """What is chosen for them, and that they reach the network; the network itself is elsewhere."""
    seen = {}

    def train(config, job, data):
        seen[job.name] = (config, job, data)

    monkeypatch.setattr(resnet, "train", train)
    path = write(tmp_path, records[0], "targz python")
    flags = ["--data", str(path), "--out", str(tmp_path / "out"), "--batch", "8"]
    assert resnet.main([*flags, "--double-depth"]) == INTERRUPTED
    config, job, data = seen["dense"]
    assert (config.network, config.epochs, config.block) == ("wrn-16-4", 200, 16)
    assert config.augmentation() == (4, True, 0)
    assert job.size.densities == ()
    assert data.images.train.x.shape == (18, 32, 32, 3)
    np.testing.assert_array_equal(data.fill, data.moments.mean.round())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name"), [("--double-depth", "twice as deep"), ("--density 0.5", "block-sparse")]
)
def test_steps_are_timed_beside_dense_ones(tmp_path, flags, name):
    code, printed = run_main([*TINY, "--rounds", "2", "--out", str(tmp_path), *flags.split()])
    assert code == 0
    assert re.search(rf"{name}: \d+ ms for a training step, \d\.\d\dx \(.*\) as fast as", printed)
    seconds = json.loads((tmp_path / "resnet.json").read_text())["seconds of steps"]
    assert len(seconds) == 2
    assert all(len(each) == 2 for each in seconds.values())


def result(accuracy):
    return {"accuracy": accuracy, "parameters": 100, "flops": 1000}


def test_the_difference_is_by_seed():
    results = {"a": [result(0.5), result(0.6)], "b": [result(0.52), result(0.59)]}
    results["b"][0] |= {"parameters": 101, "flops": 990}
    said = reports.compare(results, "a", "b")
    assert said["size"] == "b: +1.00% parameters and -1.00% operations, compared with a"
    assert said["accuracy"] == "+0.50 points (+2.00, -1.00); it is better with 1 of 2 seed(s)"


MISTAKES = {
    "network": ("--network vgg-16", "--network vgg-16 is not known: give resnet-20"),
    "pattern": (
        "--pattern balanced balanced",
        "--pattern has 2 values, but the network 3 stages",
    ),
    "density": ("--density 0.5 0.5", "--density has 2 values, but the network 3 stages"),
    "block": ("--block 64", "--block 64 leaves no convolution with enough blocks of channels"),
    "divide": ("--block 6", "--block 6 does not divide the 16 channels into a convolution of st"),
    "room": ("--double-depth --block 16", "stage 1, 16 channels wide, has no room for twice"),
    "fraction": ("--fraction 0.5", "--fraction 0.5 samples the channels of dense convolutions"),
    "sampled": (
        "--fraction 0.5 --density 1 --sampled_block 5",
        "--sampled_block 5 does not divide 16 channels: give a divisor of them",
    ),
    "batch": ("--batch 46", "--batch 46 is more than the 45 images: take fewer"),
    "images": ("--images 9999", "--images 9999 is more than the 1,318 there are: take fewer"),
    "none": ("--augment crop none", "--augment crop none is nothing and something: leave out"),
    "data": ("--data nowhere", "nowhere does not exist: check the path given with --data"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, tmp_path):
    flags, message = MISTAKES[name]
    with one_line(re.escape(message)):
        resnet.main([*TINY, *SMALLEST, "--out", str(tmp_path), *flags.split()])


def test_diverging_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(net, "train_step", lambda graph, how, state, *_: (state, np.float32("nan")))
    with pytest.raises(Mistake, match=r"^the block-sparse model diverged, its loss is nan: lower"):
        resnet.main([*TINY, "--out", str(tmp_path)])
