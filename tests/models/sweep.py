"""A width sweep that takes seconds, and what a traced program does."""

import shlex

from models import widths
from models._cli import parse
from models._widths import Kind

TINY = shlex.split(
    "--widths 16 --fractions 0.5 --learning_rates 0.02 0.01 --steps 2 --batch 2 --length 16 "
    "--layers 2 --head 8 --block 4 --measured 32 --at_once 2"
)
DENSE, SAMPLED = Kind(16, None), Kind(16, 0.5)


def config(*more):
    return parse(widths.Config, [*TINY, *more], command="it")


def equations(jaxpr, times=1):
    """Every primitive operation with how often it runs."""
    for e in jaxpr.eqns:
        yield e, times
        repeat = e.params["length"] if e.primitive.name == "scan" else 1
        for value in e.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, times * repeat)
