"""A recipe from its flags to the end, as a user runs it: its output, Ctrl-C, and mistakes."""

import contextlib
import io
import re
import shlex
import signal

import jax
import pytest

from models._cli import Mistake


@pytest.fixture(autouse=True, scope="module")
def optax_promotes():
    """Adam raises a float to the power of an integer step, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run_main(recipe, flags):
    """(exit code, what was printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return recipe.main([str(flag) for flag in flags]), printed.getvalue()


@contextlib.contextmanager
def ctrl_c_at(wanted, owner, name):
    """A signal as from the keyboard, in the call of that number of `owner.name`; yields calls."""
    call, seen = getattr(owner, name), []

    def interrupting(*args, **kwargs):
        seen.append(args)
        if len(seen) == wanted:
            signal.raise_signal(signal.SIGINT)
        return call(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupting)
        yield seen


def way_back(recipe, printed):
    """The flags that a stopped run says it goes on with."""
    found = re.search(rf"{re.escape(recipe.__name__)} (.*)", printed)
    assert found
    return shlex.split(found[1])


@contextlib.contextmanager
def one_line(message):
    """A mistake is made, and it is a line that matches `message`."""
    with pytest.raises(Mistake, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
