"""IDX files: what is read from them, and what is said of broken ones."""

import numpy as np
import pytest

from models import _images as images
from models._cli import Mistake
from tests.models.idx import idx, write_mnist


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_plain_or_compressed(tmp_path, compress):
    folder, arrays = write_mnist(tmp_path, compress)
    found = images.load(folder, test=True)
    light = arrays["train-images-idx3-ubyte"].reshape(60, 20) / 255
    np.testing.assert_allclose(found.train.x, light, rtol=1e-6)
    np.testing.assert_array_equal(found.train.y, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(found.measured.y, arrays["t10k-labels-idx1-ubyte"])
    assert "60 to train on, 12 for test" in found.about


def test_validation_never_looks_at_the_test(tmp_path):
    folder, arrays = write_mnist(tmp_path)
    found = images.load(folder, test=False)
    assert (len(found.train.y), len(found.measured.y)) == (55, 5)
    light = arrays["train-images-idx3-ubyte"].reshape(60, 20) / 255
    np.testing.assert_allclose(np.concatenate([found.train.x, found.measured.x]), light, rtol=1e-6)


IDX_MISTAKES = {
    "gone": (
        {"t10k_labels_idx1": None},
        "has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz",
    ),
    "text": ({"train_labels_idx1": b"hello world"}, "is no IDX file of bytes: it begins with 6865"),
    "short": (
        {"train_labels_idx1": idx(np.zeros(60))[:-3]},
        "says that it holds 60 bytes and holds 57: download it again",
    ),
    "count": (
        {"train_labels_idx1": idx(np.zeros(59))},
        r"shape \(60, 4, 5\) and its labels \(59,\)",
    ),
    "label": ({"t10k_labels_idx1": idx(np.full(12, 11))}, "is 11: expected 0-9"),
    "size": ({"t10k_images_idx3": idx(np.zeros((12, 4, 4)))}, "they belong to different data"),
}


@pytest.mark.parametrize("name", IDX_MISTAKES)
def test_a_wrong_file_is_named(tmp_path, name):
    changes, message = IDX_MISTAKES[name]
    folder, _ = write_mnist(tmp_path, **changes)
    with pytest.raises(Mistake, match=message):
        images.load(folder, test=True)


def test_a_broken_archive_is_named(tmp_path):
    folder, _ = write_mnist(tmp_path, compress=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Mistake, match=r"train-images-idx3-ubyte.gz cannot be read .*: download it"):
        images.load(folder, test=True)
