"""The recipe from flags over Ctrl-C to pictures, bitwise resumed, its data, and its mistakes."""

import functools
import json
import math
import shlex
import types

import numpy as np
import pytest
from sklearn.datasets import load_digits

from models import _pixels as pixels
from models import pixelcnn
from models._cli import INTERRUPTED, Mistake, parse
from models._pixelcnn_train import Run, held_out_bits
from models._report import sheet
from models._train import Checkpoints
from tests.models import stories
from tests.models.idx import idx, write_mnist
from tests.models.stories import ctrl_c_at, one_line, way_back
from tests.models.stories import optax_promotes as optax_promotes  # a fixture of the module

STEPS = 5
TINY = shlex.split(
    f"--steps {STEPS} --batch 4 --filters 8 --block 4 --blocks 1 --scales 1 --mixtures 1 "
    "--rounds 1 --samples 3 --held_images 6 --measure_every 2 --checkpoint_every 2 "
    "--learning_rate 0.02"
)


def few(path, *, test):
    """Colored images of 4 x 4 in four levels: a pixel is like its left neighbour."""
    del path, test
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (40, 4, 1, 3)).repeat(4, 2).astype(np.uint8)
    return pixels.Pixels(x[:30], x[30:], 4, "stripes", "abc")


run_main = functools.partial(stories.run_main, pixelcnn)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Interrupted and gone on with; and the same without an interruption."""
    folder = tmp_path_factory.mktemp("story")
    out, straight = folder / "out", folder / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "load", few)
        with ctrl_c_at(3, pixels, "batch"):
            interrupted, stopped = run_main([*TINY, "--out", str(out)])
        step = Checkpoints(out / "pixelcnn-checkpoint", {}).step()
        again = way_back(pixelcnn, stopped)
        ended, printed = run_main(again)
        run_main([*TINY, "--out", str(straight)])
    return types.SimpleNamespace(**{k: v for k, v in locals().items() if k != "folder"})


def lines(folder):
    """The results, by name of the model."""
    found = [json.loads(one) for one in (folder / "pixelcnn.jsonl").read_text().splitlines()]
    return {one["settings"]["model"]: one for one in found}


def test_ctrl_c_ends_after_the_step_and_tells_the_way_back(story):
    assert story.interrupted == INTERRUPTED
    assert story.step == 3
    assert f"The checkpoint is in {story.out / 'pixelcnn-checkpoint'}" in story.stopped
    assert "--resume" in story.again
    assert "Going on from step 3." in story.printed


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(story):
    one, other = lines(story.out), lines(story.straight)
    for name in ("dense", "block-sparse"):
        for key in ("losses", "held", "bits/dim", "last weights"):
            assert one[name]["result"][key] == other[name]["result"][key]
        assert len(one[name]["result"]["losses"]) == STEPS
        assert [step for step, _ in one[name]["result"]["held"]] == [2, 4, 5]


def test_it_learns_and_says_what_it_found(story):
    assert story.ended == 0
    found = lines(story.out)
    dense, sparse = found["dense"]["result"], found["block-sparse"]["result"]
    assert sparse["pairs"] == 2 * dense["pairs"] == 4
    assert (dense["stored"], sparse["stored"]) == (1, 0.5)
    assert sparse["MFLOP/image"] == dense["MFLOP/image"] > 0
    assert 1 < sparse["parameters"] / dense["parameters"] < 1.1
    for result in (dense, sparse):
        assert result["losses"][-1] < result["losses"][0]
        assert result["bits/dim"] != result["last weights"]
    assert found["uniform"]["result"]["bits/dim"] == math.log2(4)
    where = found["dense"]["where"]
    assert "models.pixelcnn --out" in where["command"]
    assert {"commit", "jax", "numpy", "device"} <= where.keys()
    assert found["dense"]["settings"]["--seed"] == 0
    for part in ("stripes", "bits/dim", "images/s", "each place for itself", "lzma"):
        assert part in story.printed
    pictures = {path.name: path.read_bytes() for path in story.out.glob("*.png")}
    assert set(pictures) == {"pixelcnn-curves.png", "pixelcnn-samples.png"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_all_held_out_images_count_once(story):
    """Ten images in batches of four, averaged with the weight of each."""
    config = parse(pixelcnn.Config, TINY, command="it")
    data = few(None, test=True)
    config = config.settled(data)
    run = Run.start(pixelcnn.sizes(config, data)["dense"], config.training())
    model = run.model(averaged=True)
    each = [held_out_bits(model, data.held[i : i + 1], 4) for i in range(10)]
    eps = float(np.finfo(np.float32).eps)  # of sums of 48 numbers
    assert held_out_bits(model, data.held, 4) == pytest.approx(np.mean(each), rel=48 * eps)


def test_going_on_with_something_else_is_refused(story, monkeypatch):
    monkeypatch.setattr(pixels, "load", few)
    with pytest.raises(Mistake, match=r"has --seed 0, this run 1: "):
        pixelcnn.main([*TINY, "--out", str(story.out), "--resume", "--seed", "1"])


MISTAKES = {
    "batch": ("--batch 31", r"--batch 31 is more than the 30 images: take fewer"),
    "block": ("--filters 10", r"--filters 10 is no multiple of --block \(4\): try 8 or 12"),
    "groups": ("--deeper 3", r"--deeper 3 groups do not divide the 2 blocks of 4 channels in"),
    "density": (
        "--deeper 5 --pattern balanced",
        r"--deeper 5 stores less than one of the 4 blocks in a column: take a smaller --block",
    ),
    "scales": ("--scales 4", r"--scales 4 halves images of 4 x 4 3 times, .*: take at most 3"),
    "resume": ("--resume", r"no checkpoint in .*: start without --resume"),
    "deeper": ("--deeper 1", r"--deeper must be at least 2, got 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "load", few)
    monkeypatch.setattr(Run, "start", lambda *_: types.SimpleNamespace(state={}, rest={}))
    flags, message = MISTAKES[name]
    with one_line(message):
        pixelcnn.main([*TINY, "--out", str(tmp_path), *flags.split()])


# ------------------------------------------------------------------------------------ the data


def test_digits_have_the_levels_of_scikit_learn():
    found = pixels.load(None, test=True)
    assert found.levels == 17
    assert found.train.shape == (1437, 8, 8, 1)
    ours = np.concatenate([found.train, found.held]).reshape(-1, 64)
    theirs = np.asarray(load_digits(return_X_y=True)[0])
    np.testing.assert_array_equal(np.sort(ours, 0), np.sort(theirs, 0))  # they are shuffled


def test_mnist_is_read_byte_for_byte(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 4))
    folder, _ = write_mnist(tmp_path, train_images_idx3=idx(x), t10k_images_idx3=idx(x[:12]))
    found = pixels.load(folder, test=True)
    assert found.levels == 256
    np.testing.assert_array_equal(found.train[..., 0], x)
    np.testing.assert_array_equal(found.held[..., 0], x[:12])


def test_images_must_be_square(tmp_path):
    folder, _ = write_mnist(tmp_path)
    with pytest.raises(Mistake, match=r"^images of 20 pixels are no squares: give square ones$"):
        pixels.load(folder, test=True)


def test_cifar_is_read_by_path(tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
    records[:, 0] = 1
    for part in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / f"{part}.bin").write_bytes(records.tobytes())
    found = pixels.load(tmp_path, test=True)
    assert (found.levels, found.train.shape) == (256, (15, 32, 32, 3))
    expected = records[:, 1:].reshape(3, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found.held, expected)
    with pytest.raises(Mistake, match=r"nowhere does not exist: check the path given with --data"):
        pixels.load(tmp_path / "nowhere", test=True)


def test_each_place_for_itself():
    """Counts by hand, one more of each level."""
    train = np.array([0, 0, 1], np.uint8).reshape(3, 1, 1, 1)
    held = np.array([0, 2], np.uint8).reshape(2, 1, 1, 1)
    expected = -(np.log2(3 / 6) + np.log2(1 / 6)) / 2
    bound = 2 * np.finfo(float).eps  # a logarithm, twice, their sum, and its half
    assert pixels.by_position_bits(train, held, 3) == pytest.approx(expected, rel=bound, abs=0)


def test_batches_are_drawn_without_repetition_and_again_alike():
    images = np.arange(9)
    batches = [pixels.batch(images, step, seed=1, size=9) for step in (0, 0, 1)]
    assert all(sorted(one) == list(range(9)) for one in batches)
    np.testing.assert_array_equal(batches[0], batches[1])
    assert (batches[0] != batches[2]).any()


def test_a_sheet_of_images():
    x = np.arange(1, 4, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2)
    expected = [[1, 1, 0, 2, 2], [1, 1, 0, 2, 2], [0] * 5, [3, 3, 0, 0, 0], [3, 3, 0, 0, 0]]
    np.testing.assert_array_equal(sheet(x)[..., 0], expected)
