"""Runs of the pruning recipe that take a second or two."""

import shlex

from models import prune
from tests.models import stories
from tests.models.tiny import optax_promotes

SIZES = "--block 8 --length 16 --batch 2 --heldout 64 --rounds 1 --densities 0.5"
TINY = shlex.split(  # as many steps of both kinds, at one rate: they compile once
    f"{SIZES} --train_steps 15 --train_learning_rate 0.02 --steps 15 --learning_rate 0.02 "
    "--width 16 --heads 2 --layers 1"
)


def run_main(flags):
    """(exit code, what was printed)."""
    with optax_promotes():
        return stories.run_main(prune, flags)
