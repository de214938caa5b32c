"""What the tests of a recipe share."""

import numpy as np
import pytest

from models import _text as texts
from tests.models.tiny import write_words


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick_compilations):
    """All recipes."""


@pytest.fixture(scope="session")
def text():
    draw = np.random.default_rng(0).choice(np.frombuffer(b"abcde \n", np.uint8), 3000)
    return texts.Text(draw[:2500], draw[2500:], "letters")


@pytest.fixture
def words(tmp_path, text):
    return write_words(tmp_path, text)
