"""CIFAR-10: every form of its files gives the same images, and of others is said what is wrong."""

import gzip
import io
import lzma
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from models import _cifar as cifar
from models._cli import Mistake

EACH = 4  # images in a part


@pytest.fixture(scope="module")
def records():
    """The bytes of each part, and what they mean: built pixel by pixel."""
    rng = np.random.default_rng(0)
    parts, images, labels = {}, {}, {}
    for part in cifar.PARTS:
        x = rng.integers(0, 256, (EACH, 32, 32, 3), dtype=np.uint8)
        y = rng.integers(0, 10, EACH)
        content = bytearray()
        for image, label in zip(x, y, strict=True):
            content.append(label)
            for channel in range(3):
                content += image[:, :, channel].tobytes()
        parts[part], images[part], labels[part] = bytes(content), x, y
    return parts, images, labels


def python_batch(content):
    """As the Python version has it: protocol 2, and names that are bytes."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    batch = {b"batch_label": b"it", b"labels": rows[:, 0].tolist(), b"data": rows[:, 1:]}
    return pickle.dumps(batch, protocol=2)


def write(folder, parts, form):
    """What --data is given."""
    if form.startswith("tar"):
        python, inside = form.endswith("python"), "cifar-10-batches-py/" * form.endswith("python")
        path = folder / f"cifar-10-{'python' if python else 'binary'}.tar.{form[3:5]}"
        with tarfile.open(path, f"w:{form[3:5]}") as archive:
            for part, content in {"readme.html": b"hello", **parts}.items():
                content = python_batch(content) if python and part in parts else content
                name = inside + part + ("" if python or part not in parts else ".bin")
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path
    make = {"plain": bytes, "gz": gzip.compress, "xz": lzma.compress, "python": python_batch}[form]
    suffix = {"plain": ".bin", "gz": ".bin.gz", "xz": ".bin.xz", "python": ""}[form]
    for part, content in parts.items():
        (folder / f"{part}{suffix}").write_bytes(make(content))
    return folder


FORMS = ("plain", "gz", "xz", "python", "targz binary", "tarxz binary", "targz python")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(tmp_path, records, form):
    parts, images, labels = records
    found = cifar.load(write(tmp_path, parts, form), test=True)
    np.testing.assert_array_equal(
        found.train.x, np.concatenate([images[p] for p in cifar.PARTS[:5]])
    )
    np.testing.assert_array_equal(
        found.train.y, np.concatenate([labels[p] for p in cifar.PARTS[:5]])
    )
    np.testing.assert_array_equal(found.measured.x, images["test_batch"])
    np.testing.assert_array_equal(found.measured.y, labels["test_batch"])
    assert (found.train.x.dtype, found.train.y.dtype) == (np.uint8, np.int32)
    assert "20 to train on, 4 for test" in found.about


@pytest.mark.parametrize("inside", ["cifar-10-batches-bin", "cifar-10-batches-py", "."])
def test_a_folder_around_what_was_unpacked_or_downloaded(tmp_path, records, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    form = {"cifar-10-batches-bin": "plain", "cifar-10-batches-py": "python", ".": "targz python"}
    write(tmp_path / inside, records[0], form[inside])
    found = cifar.load(tmp_path, test=True)
    np.testing.assert_array_equal(found.measured.x, records[1]["test_batch"])


def test_one_of_two_forms_is_read(tmp_path, records):
    write(write(tmp_path, records[0], "xz"), records[0], "python")
    assert len(cifar.load(tmp_path, test=True).train.y) == 5 * EACH


def test_files_by_name_may_be_fewer(tmp_path, records):
    write(tmp_path, records[0], "xz")
    paths = [tmp_path / f"{name}.bin.xz" for name in ("test_batch", "data_batch_3", "data_batch_2")]
    found = cifar.load(paths, test=True)
    both = np.concatenate([records[1][f"data_batch_{i}"] for i in (2, 3)])
    np.testing.assert_array_equal(found.train.x, both)


def test_validation_never_looks_at_the_test(tmp_path, records):
    parts, images, _ = records
    found = cifar.load(write(tmp_path, parts, "plain"), test=False)
    assert (len(found.train.y), len(found.measured.y)) == (18, 2)
    whole = np.concatenate([images[p] for p in cifar.PARTS[:5]])
    np.testing.assert_array_equal(np.concatenate([found.train.x, found.measured.x]), whole)
    assert found.digest != cifar.load(tmp_path, test=True).digest


class Stranger:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path, records):
    write(tmp_path, records[0], "python")
    made = tmp_path / "made by the pickle"
    stranger = pickle.dumps({b"data": Stranger(made), b"labels": [1]}, protocol=2)
    (tmp_path / "data_batch_2").write_bytes(stranger)
    with pytest.raises(Mistake, match=r"data_batch_2 wants to run posix.mkdir, which no batch of"):
        cifar.load(tmp_path, test=True)
    assert not made.exists()


def damaged(batch):
    return pickle.dumps(batch, protocol=2)


PIXELS = np.zeros((2, 3072), np.uint8)
MISTAKES = {
    "short": ("plain", lambda c: c[:-1], r"has 12,291 bytes, no multiple of a record .* \(3,073\)"),
    "empty": ("plain", lambda c: b"", "has 0 bytes, no multiple of a record"),
    "label": ("plain", lambda c: b"\x0a" + c[1:], "a label in .*_2.bin is 10: expected 0 to 9"),
    "gz": ("gz", lambda c: c[:-9], "data_batch_2.bin.gz cannot be read .*: download it again"),
    "xz": ("xz", lambda c: c[:-9], "data_batch_2.bin.xz cannot be read .*: download it again"),
    "cut": ("python", lambda c: c[:-50], r"data_batch_2 is no Python batch .*\(UnpicklingError"),
    "key": (
        "python",
        lambda c: damaged({b"data": PIXELS}),
        r"no Python batch .*KeyError: 'labels'",
    ),
    "list": ("python", lambda c: damaged([1]), "is no Python batch of CIFAR-10"),
    "size": (
        "python",
        lambda c: damaged({b"data": PIXELS[:, :5], b"labels": [1, 2]}),
        r"data of the shape \(2, 5\) \(uint8\) and labels of the shape \(2,\)",
    ),
    "negative": (
        "python",
        lambda c: damaged({b"data": PIXELS, b"labels": [1, -2]}),
        "a label in .*data_batch_2 is -2",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_broken_part_is_named(tmp_path, records, name):
    form, damage, message = MISTAKES[name]
    write(tmp_path, records[0], form)
    path = next(tmp_path.glob("data_batch_2*"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Mistake, match=message):
        cifar.load(tmp_path, test=True)


def test_what_is_missing_is_named(tmp_path, records):
    with pytest.raises(Mistake, match="nowhere does not exist: check the path given with --data"):
        cifar.load(tmp_path / "nowhere", test=True)
    with pytest.raises(Mistake, match=r"has no data_batch_1, .*, test_batch of CIFAR-10: expected"):
        cifar.load(tmp_path, test=True)
    write(tmp_path, records[0], "plain")
    with pytest.raises(Mistake, match="has no test_batch of CIFAR-10: expected data_batch_1 to 5"):
        cifar.load(tmp_path / "data_batch_1.bin", test=True)
    with pytest.raises(Mistake, match="has no data_batch_1 of CIFAR-10"):
        cifar.load(tmp_path / "test_batch.bin", test=True)
    with pytest.raises(Mistake, match="data_batch_1 was given twice"):
        cifar.load([tmp_path, tmp_path / "data_batch_1.bin"], test=True)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(Mistake, match="has no data_batch_4 of CIFAR-10"):
        cifar.load(tmp_path, test=True)
    (tmp_path / "notes.txt").write_bytes(b"hello")
    with pytest.raises(Mistake, match=r"notes.txt is not named like a part of CIFAR-10: expected"):
        cifar.load(tmp_path / "notes.txt", test=True)


def test_an_archive_of_something_else(tmp_path):
    path: Path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(Mistake, match=r"tar.gz cannot be read .*: download it again"):
        cifar.load(path, test=True)
