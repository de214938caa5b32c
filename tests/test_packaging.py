"""The wheel: what is in it, and that it works away from the checkout."""

import email
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
EXAMPLE = """
import pathlib, sys
import jax.numpy as jnp
import bsjax, pallas_kernels
here = pathlib.Path(sys.prefix)
assert here in pathlib.Path(bsjax.__file__).parents, bsjax.__file__
assert here in pathlib.Path(pallas_kernels.__file__).parents, pallas_kernels.__file__
p = bsjax.BlockPattern.from_mask(jnp.eye(2, dtype=bool), block=8)
y = bsjax.matmul(jnp.ones((4, 16)), jnp.ones((2, 8, 8)), p)
assert (y == 8).all(), y
print("works")
"""


def command(*args, cwd=HOUSE):
    done = subprocess.run(args, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as for a release: the wheel from the source distribution, that from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command(sys.executable, "-m", "build", "--outdir", str(folder), str(HOUSE))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def clean(tmp_path):
    """The interpreter of an environment without packages, in a folder away from the checkout."""
    venv.create(tmp_path / "clean", with_pip=False, symlinks=True)
    return tmp_path / "clean" / "bin" / "python"


def install(python, wheel, *options):
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    command(*pip, *options, str(wheel))


def test_the_wheel_holds_the_library_and_works_away_from_the_checkout(wheel, clean, tmp_path):
    # one test, because two would build the wheel in each of xdist's processes
    holds_two_typed_packages_and_nothing_else(zipfile.ZipFile(wheel))
    asks_for_three_packages(zipfile.ZipFile(wheel))
    install(clean, wheel, "--no-deps")
    # jax and numpy from the environment of the tests, but not its link to the checkout: a .pth
    # file adds a folder, and the .pth files inside that folder are not read
    ours = sysconfig.get_path("purelib")
    theirs = command(clean, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(theirs.strip(), "dependencies.pth").write_text(ours, encoding="utf-8")
    assert command(clean, "-I", "-c", EXAMPLE, cwd=tmp_path) == "works\n"


def holds_two_typed_packages_and_nothing_else(archive):
    names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bsjax", "pallas_kernels"}
    assert {"bsjax/py.typed", "pallas_kernels/py.typed"} <= set(names)
    sources = {
        path.relative_to(HOUSE).as_posix()
        for package in ("bsjax", "pallas_kernels")
        for path in (HOUSE / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def asks_for_three_packages(archive):
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    wanted = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    always = [line for line in wanted if "extra ==" not in line]
    assert [line.partition(">")[0] for line in always] == ["jax", "jaxtyping", "numpy"]


@pytest.mark.slow
def test_the_wheel_brings_what_it_needs(wheel, clean, tmp_path):
    install(clean, wheel)
    assert command(clean, "-I", "-c", EXAMPLE, cwd=tmp_path) == "works\n"
