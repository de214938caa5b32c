"""Steps for a run book that need no GPU: items that work, fail, fault, hang and take long."""

import os
import sys
import time

from benchmarks._gpu_floor import Ceilings
from benchmarks._gpu_steps import Item, Step


def item(name, run, seconds=0.1):
    return Item(name, seconds, run, lambda records: iter([f"{len(records)} records"]))


def works(_):
    yield {"benchmark": "fake", "value": 1}
    yield {"benchmark": "fake", "value": 2}


def measures(_):
    yield {"benchmark": "ceilings", "ceiling": "flops", "value": 7.0, "unit": "FLOP/s"} | {
        "clock": "wall"
    }


def fails(_):
    yield {"benchmark": "fake", "value": 0}
    raise ValueError("as it was told to")


def faults(_):
    sys.stdout.write("the last words of a kernel\n")
    sys.stdout.flush()
    os._exit(9)
    yield


def hangs(_):
    time.sleep(60)
    yield


def knows(at):
    yield {"benchmark": "fake", "value": at.ceilings.flops, "rest": at.ceilings.l2 == Ceilings().l2}


STEPS = [
    Step("last", 90, lambda: [item("last", knows)], warm_up=0.1),
    Step("ceilings", 10, lambda: [item("ceilings flops", measures)], warm_up=0.1),
    Step(
        "bad",
        20,
        lambda: [
            item("fails", fails),
            item("faults", faults),
            item("works", works),
            item("hangs", hangs),
            item("works after all", works),
            item("takes too long", works, seconds=9999),
        ],
        warm_up=0.1,
    ),
]


def ordered():
    return sorted(STEPS, key=lambda step: step.priority)
