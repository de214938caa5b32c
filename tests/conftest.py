"""The machine that the tests run on: eight CPU devices, strict JAX, hardware gated by markers."""

import os

import hypothesis
import jax
import pytest

# Two test processes may share one GPU, and JAX would give all of its memory to the first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Eight CPU devices, so that meshes are tested anywhere. Set through the configuration and not
# through XLA_FLAGS, which the processes that tests start would inherit.
jax.config.update("jax_num_cpu_devices", 8)
# A silent promotion is a wrong dtype or a forgotten axis.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a shape compiles. Under CI the same examples every time, so
# that red means that the code has changed.
hypothesis.settings.register_profile(
    "house", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail at once if JAX finds no GPU")


def pytest_configure(config):
    if config.getoption("--require-gpu") and jax.default_backend() != "gpu":
        raise pytest.UsageError("--require-gpu: JAX found no GPU")


def pytest_collection_modifyitems(items):
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: the address differs between processes, so xdist would refuse to "
                "run anything: give this parameter an id of its own"
            )
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def quick_compilations():
    """Most programs of a test run once, and are small: LLVM would take longest, to no avail. What
    XLA does with a program, its memory and its collectives are the same."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
