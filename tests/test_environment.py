"""How `make` finds an interpreter and makes an environment, shown with fake interpreters.

A fake is the interpreter that runs this test with another version painted on: it answers `-c`
truthfully, `-m venv` by copying itself, and `-m pip` by noting down what it was asked for.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
FAKE = """#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        echo "$*" >>"$CALLS"
        if [ "$PIP" = killed ]; then kill -9 $PPID; fi
        echo "pip is talking"
        if [ "$PIP" = fails ]; then echo "no route to host" >&2; exit 1; fi ;;
    -V*) echo "Python {version}" ;;
    *) exec "{python}" -I -c 'import sys
sys.version_info, sys.version = {info}, "{version}"
{paint}
exec(sys.argv[1])' "$2" ;;
esac
"""


def fake(path, version, paint=""):
    info = tuple(map(int, version.split(".")))
    text = FAKE.format(python=sys.executable, version=version, info=info, paint=paint)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def shim(path):
    """What a version manager leaves for an interpreter that is not installed."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n", encoding="utf-8")
    path.chmod(0o755)


def find(*folders, python="", goal="demo"):
    env = {"PATH": ":".join(map(str, folders)), "PYTHON": str(python), "GOAL": goal}
    command = ["/bin/sh", str(HOUSE / "scripts" / "find_python.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_python3_comes_first(tmp_path):
    fake(tmp_path / "python3.13", "3.13.1")
    wanted = fake(tmp_path / "python3", "3.12.0")
    assert find(tmp_path) == (0, f"{wanted}\n", "")


def test_an_old_python3_and_broken_shims_are_passed_over(tmp_path):
    fake(tmp_path / "a" / "python3", "3.11.9")
    shim(tmp_path / "a" / "python3.14")
    shim(tmp_path / "a" / "python3.13")
    wanted = fake(tmp_path / "b" / "python3.13", "3.13.2")
    assert find(tmp_path / "a", tmp_path / "b") == (0, f"{wanted}\n", "")


def test_two_digits_are_more_than_one(tmp_path):
    fake(tmp_path / "python3", "3.9.2")
    wanted = fake(tmp_path / "python", "3.100.0")
    assert find(tmp_path) == (0, f"{wanted}\n", "")


def test_a_named_interpreter_is_the_only_one_tried(tmp_path):
    fake(tmp_path / "python3", "3.13.0")
    old = fake(tmp_path / "snake", "3.10.4")
    assert find(tmp_path, python="snake", goal="test") == (
        1,
        "",
        f"make test: Python 3.12 or newer is needed, but {old} is 3.10.4; "
        "name another: make test PYTHON=python3.13\n",
    )
    wanted = fake(tmp_path / "cobra", "3.12.4")
    assert find(tmp_path, python="cobra") == (0, f"{wanted}\n", "")
    assert find("nowhere", python=wanted) == (0, f"{wanted}\n", "")


def test_every_interpreter_that_is_too_old_is_named(tmp_path):
    a = fake(tmp_path / "python3", "3.11.2")
    b = fake(tmp_path / "python", "2.7.18")
    shim(tmp_path / "python3.12")
    status, out, error = find(tmp_path)
    assert (status, out) == (1, "")
    assert error == (
        f"make demo: Python 3.12 or newer is needed, but {a} is 3.11.2, {b} is 2.7.18; "
        "name another: make demo PYTHON=python3.13\n"
    )


@pytest.mark.parametrize(
    ("python", "complaint"),
    [
        ("", "Python 3.12 or newer is needed, but none was found; install it, or name another"),
        ("nothing", "PYTHON=nothing is not a command here; name another"),
        ("python3.12", "PYTHON=python3.12 does not run as a Python interpreter; name another"),
    ],
)
def test_no_interpreter_at_all(tmp_path, python, complaint):
    shim(tmp_path / "python3.12")
    status, out, error = find(tmp_path, python=python)
    assert (status, out) == (1, "")
    assert error == f"make demo: {complaint}: make demo PYTHON=python3.13\n"


def test_the_scripts_and_the_project_file_want_the_same_python():
    wanted = re.search(r'requires-python = ">=3\.(\d+)"', (HOUSE / "pyproject.toml").read_text())
    for script in (HOUSE / "scripts").glob("*.sh"):
        assert f"sys.version_info < (3, {wanted[1]})" in script.read_text(), script


@pytest.fixture
def checkout(tmp_path):
    """A folder with nothing but the scripts and a project file, and a space in its name."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(HOUSE / "scripts", checkout / "scripts")
    (checkout / "pyproject.toml").write_text("one = 1\n", encoding="utf-8")
    fake(checkout / "bin" / "python3", "3.12.7")
    return checkout


def environment(checkout, python="", pip="works", path=""):
    """Makes the environment; returns the exit status, the errors and what pip was asked for."""
    calls = checkout / "calls"
    calls.write_text("", encoding="utf-8")
    done = subprocess.run(
        ["scripts/environment.sh", ".venv", "demo", "-e", ".[recipes]"],
        cwd=checkout,
        env={
            "PATH": f"{path}{checkout}/bin:/usr/bin:/bin",
            "PYTHON": str(python),
            "GOAL": "demo",
            "CALLS": str(calls),
            "PIP": pip,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    asked = [line.removeprefix("-m pip install ") for line in calls.read_text().splitlines()]
    return done.returncode, done.stderr, asked


INSTALLED = ["pip>=25.1", "-e .[recipes]"]


def witness(checkout):
    """A file that disappears when the environment is made anew."""
    path = checkout / ".venv" / "witness"
    path.touch()
    return path


def test_the_second_call_does_nothing(checkout):
    assert environment(checkout) == (0, "", INSTALLED)
    assert environment(checkout) == (0, "", [])


def test_a_changed_project_file_installs_on_top(checkout):
    environment(checkout)
    kept = witness(checkout)
    (checkout / "pyproject.toml").write_text("two = 2\n", encoding="utf-8")
    assert environment(checkout) == (0, "", INSTALLED)
    assert kept.exists()


def test_another_interpreter_starts_over(checkout):
    other = fake(checkout / "bin" / "other", "3.13.0")
    environment(checkout)
    kept = witness(checkout)
    assert environment(checkout, python=checkout / "bin" / "python3") == (0, "", [])
    assert kept.exists()
    assert environment(checkout, python=other) == (0, "", INSTALLED)
    assert not kept.exists()
    assert environment(checkout) == (0, "", []), "unnamed, the one in use stays"


def test_an_interpreter_that_is_gone_starts_over(checkout):
    environment(checkout)
    (checkout / ".venv" / "bin" / "python").unlink()
    assert environment(checkout) == (0, "", INSTALLED)


def test_an_activated_environment_is_not_made_from_itself(checkout):
    environment(checkout)
    (checkout / ".venv.unfinished").touch()
    shutil.copy(checkout / "bin" / "python3", checkout / ".venv" / "bin" / "python3")
    assert environment(checkout, path=f"{checkout}/.venv/bin:") == (0, "", INSTALLED)


@pytest.mark.parametrize("how", ["fails", "killed"])
def test_an_unfinished_environment_is_not_taken_for_good(checkout, how):
    status, _, _ = environment(checkout, pip=how)
    assert status != 0
    left = witness(checkout)
    assert environment(checkout) == (0, "", INSTALLED)
    assert not left.exists()


def test_pips_complaints_are_one_line_and_a_log(checkout):
    status, error, _ = environment(checkout, pip="fails")
    assert status == 1
    assert error == (
        "make demo: pip could not install what .venv needs (no network?); "
        "the reason is in .venv/pip.log\n"
    )
    assert "no route to host" in (checkout / ".venv" / "pip.log").read_text()


def test_without_network_what_worked_before_still_does(checkout):
    environment(checkout)
    (checkout / "pyproject.toml").write_text("two = 2\n", encoding="utf-8")
    assert environment(checkout, pip="fails")[0] == 1
    (checkout / "pyproject.toml").write_text("one = 1\n", encoding="utf-8")
    assert environment(checkout, pip="fails") == (0, "", [])


def test_an_interrupted_update_starts_over(checkout):
    environment(checkout)
    left = witness(checkout)
    (checkout / "pyproject.toml").write_text("two = 2\n", encoding="utf-8")
    assert environment(checkout, pip="killed")[0] != 0
    assert environment(checkout) == (0, "", INSTALLED)
    assert not left.exists()


def test_a_python_without_venv(checkout):
    bare = fake(checkout / "bin" / "python3", "3.12.7", paint='sys.modules["ensurepip"] = None')
    status, error, asked = environment(checkout)
    assert (status, asked) == (1, [])
    assert error == (
        f"make demo: {bare} lacks the venv module: install it (Debian, Ubuntu: "
        "apt install python3-venv) or name another: make demo PYTHON=python3.13\n"
    )


def test_a_folder_that_cannot_be_written(checkout):
    (checkout / ".venv.unfinished").symlink_to("/nowhere/at/all")  # root may write anything else
    status, error, _ = environment(checkout)
    assert status == 1
    assert error == (
        f"make demo: cannot write .venv in {checkout}: "
        "make the folder writable, or clone to another place\n"
    )


def test_make_says_one_line(tmp_path):
    old = fake(tmp_path / "old", "3.9.1")
    done = subprocess.run(
        ["make", "--no-print-directory", "test", f"PYTHON={old}"],
        cwd=HOUSE,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    ours, makes = done.stderr.splitlines()
    assert ours.startswith(f"make test: Python 3.12 or newer is needed, but {old} is 3.9.1")
    assert makes.startswith("make: ***")
