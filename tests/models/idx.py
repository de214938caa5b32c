"""A tiny data set in the files of MNIST."""

import gzip
import struct

import numpy as np


def idx(array):
    """The bytes of an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, compress=False, **changes):
    """Four files in the format of MNIST: 60 images of 4 x 5, and 12 for the test."""
    rng, folder = np.random.default_rng(0), folder / "idx"
    folder.mkdir()
    arrays = {}
    for part, n in (("train", 60), ("t10k", 12)):
        labels = np.arange(n) % 10
        light = rng.integers(0, 100, (n, 4, 5))
        light.reshape(n, 20)[np.arange(n), 2 * labels] = 255  # one pixel tells
        arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"] = light, labels
    for name, array in arrays.items():
        content = changes.get(name.split("-ubyte")[0].replace("-", "_"), idx(array))
        if content is not None:
            suffix = ".gz" if compress else ""
            content = gzip.compress(content) if compress else content
            (folder / (name + suffix)).write_bytes(content)
    return folder, arrays
