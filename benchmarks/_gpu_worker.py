"""`python -m benchmarks._gpu_worker STEP`: the process that a step of the run book runs in.

A kernel that hangs or faults takes its process along, and nothing else: what happens is told line
by line on the standard output, and the run book writes it down.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

MARK = "@@"  # begins a line that is an event
LOST = 3  # exit status: the device answers nothing any more


def tell(event: str, item: str, **more: Any) -> None:
    """A line for the run book."""
    sys.stdout.write(f"\n{MARK}{json.dumps({'event': event, 'item': item} | more)}\n")
    sys.stdout.flush()


def heard(line: str) -> dict[str, Any] | None:
    """The event that a line is, if it is one."""
    if not line.startswith(MARK):
        return None
    try:
        return json.loads(line.removeprefix(MARK))
    except json.JSONDecodeError:  # cut off
        return None


def answers() -> bool:
    """Whether the device still computes: after a fault in a kernel it does not."""
    import jax.numpy as jnp

    try:
        return int(jnp.arange(3).sum()) == 3
    except Exception:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks._gpu_worker")
    parser.add_argument("step")
    parser.add_argument("--until", type=float, required=True, help="as time.time()")
    parser.add_argument("--implementation", default="mosaic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="benchmarks._gpu_steps")
    args = parser.parse_args(argv)
    told = json.load(sys.stdin)  # items, and the records of ceilings

    from benchmarks import _gpu_floor
    from benchmarks._gpu_kernels import said
    from benchmarks._gpu_steps import Context
    from benchmarks._products import Programs
    from benchmarks._record import environment

    (step,) = (
        step for step in importlib.import_module(args.steps).ordered() if step.name == args.step
    )
    todo = [item for item in step.items() if item.name in told["items"]]
    tell("environment", "", record=environment())
    at = Context(
        _gpu_floor.ceilings_from(told["ceilings"]), Programs(), args.implementation, args.seed
    )
    for item in todo:
        if time.time() + item.seconds > args.until:
            tell("no time", item.name)
            continue
        tell("start", item.name, seconds=item.seconds)
        start, records = time.monotonic(), []
        try:
            for record in item.run(at):
                records.append(record)
        except Exception as error:
            tell("failed", item.name, records=records, why=said(error))
            if not answers():
                os._exit(LOST)  # an orderly end would wait for the device
            continue
        lines = list(item.lines(records)) if item.lines else []
        took = round(time.monotonic() - start, 2)
        tell("done", item.name, records=records, lines=lines, took=took)
    return 0


if __name__ == "__main__":
    sys.exit(main())
