"""Images for a network: colours, crops, flips and cut-outs, and batches that depend on a number."""

import types

import numpy as np
import pytest

from models import _augment as pictures
from models import _images as images
from models._augment import Augmentation, augment
from models._cli import Mistake
from models._images import Split

RNG = np.random.default_rng(0)
X = RNG.integers(1, 256, (40, 6, 7, 3), dtype=np.uint8)  # no zeros: what is zero was filled in
FILL = np.array([0, 0, 0], np.uint8)
ROUNDED = float(np.finfo(np.float32).eps) / 2  # once, from float64


def test_nothing_changes_nothing():
    np.testing.assert_array_equal(augment(X, Augmentation(), FILL, RNG), X)


def test_a_crop_is_a_window_of_the_bordered_image_and_every_window_occurs():
    found = augment(X, Augmentation(crop=1), FILL, np.random.default_rng(1))
    assert (found.shape, found.dtype) == (X.shape, X.dtype)
    places = set()
    for before, after in zip(X, found, strict=True):
        padded = np.pad(before, ((1, 1), (1, 1), (0, 0)))
        windows = {(y, x): padded[y : y + 6, x : x + 7] for y in range(3) for x in range(3)}
        places |= {at for at, window in windows.items() if (window == after).all()}
    assert places == {(y, x) for y in range(3) for x in range(3)}


def test_a_border_has_the_colour_that_is_given():
    found = augment(X, Augmentation(crop=4), np.array([7, 8, 9], np.uint8), RNG)
    outside = ~(found[..., None, :] == X[:, None].reshape(40, 1, 1, -1, 3)).all(-1).any(-1)
    assert (found[outside] == [7, 8, 9]).all()
    assert 0.2 < outside.mean() < 0.7


def test_about_half_of_the_images_are_flipped_whole():
    found = augment(X, Augmentation(flip=True), FILL, np.random.default_rng(1))
    same, other = ((found == x).all((1, 2, 3)) for x in (X, X[:, :, ::-1]))
    assert (same ^ other).all()
    assert 10 < same.sum() < 30


@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_cutout_is_one_square_that_may_leave_the_image(side):
    found = augment(X, Augmentation(cutout=side), FILL, np.random.default_rng(1))
    areas = set()
    for before, after in zip(X, found, strict=True):
        gone = (after == 0).all(-1)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert gone.sum() == len(rows) * len(columns)  # a rectangle
        assert np.ptp(rows) == len(rows) - 1
        np.testing.assert_array_equal(after[~gone], before[~gone])
        areas.add((len(rows), len(columns)))
    assert max(areas) == (side, side)
    assert all(0 < height <= side and 0 < width <= side for height, width in areas)


def test_moments_are_those_of_all_pixels():
    found = pictures.moments(X)
    np.testing.assert_allclose(found.mean, X.mean((0, 1, 2)), rtol=ROUNDED)
    np.testing.assert_allclose(found.deviation, X.std((0, 1, 2)), rtol=ROUNDED)


# ------------------------------------------------------------------------------------------ batches


def labels(batches, count):
    return [batches[i][1].tolist() for i in range(count)]


@pytest.fixture(scope="module")
def numbered():
    """Eleven images that are told apart by their labels."""
    return Split(X[:11], np.arange(11))


def test_an_epoch_has_every_image_at_most_once_and_the_next_another_order(numbered):
    found = labels(pictures.batches(numbered, 4, Augmentation(), FILL, seed=5), 6)
    epochs = [found[i] + found[i + 1] for i in (0, 2, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == 8
        assert set(epoch) <= set(range(11))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = labels(pictures.batches(numbered, 4, Augmentation(), FILL, seed=6), 6)
    assert found != other


def test_images_go_with_their_labels(numbered):
    x, y = pictures.batches(numbered, 4, Augmentation(), FILL, seed=5)[3]
    np.testing.assert_array_equal(x, X[y])


def test_a_stream_goes_on_from_its_position(numbered):
    how = Augmentation(crop=1, flip=True, cutout=2)
    batches = pictures.batches(numbered, 4, how, FILL, seed=5)
    first = pictures.stream(batches, None)
    before = [next(first) for _ in range(3)]
    position = first.get_state()
    after = [next(first) for _ in range(3)]
    second = pictures.stream(pictures.batches(numbered, 4, how, FILL, seed=5), position)
    for x, y in zip([*before, *after], [batches[i] for i in range(6)], strict=True):
        np.testing.assert_array_equal(x[0], y[0])  # what a batch is depends on its number only
    for x, y in zip(after, second, strict=False):
        np.testing.assert_array_equal(x[0], y[0])
        np.testing.assert_array_equal(x[1], y[1])
    assert (before[0][0] != batches[2][0]).any()
    first.close()
    second.close()


# -------------------------------------------------------------------------------------------- data


def flags(**changes):
    default = {"data": (), "measure": "validation", "images": 0, "measured": 0}
    return types.SimpleNamespace(**(default | changes))


def test_digits_are_bytes_on_black():
    found = pictures.Data.of(flags(images=100, measured=7))
    known = images.load(None, test=False)
    assert (found.images.train.x.shape, found.images.train.x.dtype) == ((100, 8, 8, 1), np.uint8)
    pixels = found.images.train.x.reshape(100, 64) / 255
    # the nearest of 256 levels; some sixteenths lie in the middle of two
    np.testing.assert_allclose(pixels, known.train.x[:100], rtol=1e-15, atol=0.5 / 255)
    assert found.images.measured.y.shape == (7,)
    assert found.fill == 0
    assert found.images.about.endswith("for validation, of which the first 100 and 7")
    assert found.moments.mean == pytest.approx(found.images.train.x.mean(), rel=ROUNDED)


def test_more_images_than_there_are():
    with pytest.raises(Mistake, match="--images 2000 is more than the 1,318 there are: take fewer"):
        pictures.Data.of(flags(images=2000))
    with pytest.raises(Mistake, match="--measured 361 is more than the 360 there are: take fewer"):
        pictures.Data.of(flags(measured=361, measure="test"))
