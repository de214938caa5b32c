"""What the tests of recurrent networks share."""

import jax
import pytest

from bsjax.ops import _core


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick_compilations):
    """All of them."""


@pytest.fixture
def x64():
    """Cells and sequences of `tests.recurrent.cells` are in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def sums(monkeypatch):
    """The leading axes of x in every sddmm that is traced."""
    seen, run = [], _core._run_sddmm
    spy = lambda spec, x, y, p: seen.append(x.shape[:-1]) or run(spec, x, y, p)  # noqa: E731
    monkeypatch.setattr(_core, "_run_sddmm", spy)
    return seen
