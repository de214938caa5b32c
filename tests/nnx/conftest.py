"""Programs of these tests compile quickly."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _quickly(quick_compilations):
    pass
