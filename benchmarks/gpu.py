"""`python -m benchmarks.gpu`: the run book for a machine with a GPU, the best evidence first.

Ceilings of the machine, GPU tests, products, tuner, peers: each step in a process of its own, so
that a kernel that hangs or faults costs its own result only. Results are written as they come;
`--resume` skips what is there. `--dry-run` prints the plan and the floors, and needs no GPU.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import _gpu_kernels, _gpu_table
from benchmarks._gpu_watch import SLACK, Event, watch
from benchmarks._gpu_worker import LOST
from benchmarks._record import commit

type Record = dict[str, Any]

CHECKOUT = Path(__file__).parent.parent
RESERVE = 6.0  # seconds, for the table
LEAST = 5.0  # seconds for which a step is worth starting
LOSSES = 4  # processes that a step may lose before it is given up; one that hangs counts twice
# a test process and PyTorch want memory of the same GPU
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4", "PYTHONUNBUFFERED": "1"}


class Book:
    """What is known so far, on the disk as soon as it is."""

    def __init__(self, out: Path, resume: bool, common: Record) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = list(_lines_of(out)) if resume and out.exists() else []
        self.common = common
        self._file = out.open("a" if resume else "w", encoding="utf-8")
        if resume and self.records:
            self._file.write("\n")  # the last line may have been cut off

    @property
    def done(self) -> set[str]:
        """Items with a result, and those that failed at this very commit."""
        known = {}
        for one in self.records:  # in the order in which they were written
            same = one.get("commit") == self.common["commit"]
            known[one.get("item")] = same or not one.get("failed")
        return {name for name, done in known.items() if name and done}

    def write(self, step: str, item: str, records: Sequence[Record]) -> None:
        lines = [self.common | {"step": step, "item": item} | one for one in records]
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        self.records += lines

    def close(self) -> None:
        self._file.close()


def _lines_of(path: Path) -> Iterator[Record]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:  # empty, or cut off
            continue


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if something failed or was wrong, or 2 if there is no GPU."""
    args = _parser().parse_args(argv)
    start = time.time()
    registry = importlib.import_module(args.steps)
    steps = registry.ordered()
    if args.only:
        steps = [step for step in steps if step.name in args.only.split(",")]
    if args.dry_run:
        for text in plan(steps, 60 * args.minutes):
            print(text)
        return 0
    device, driver = _nvidia()
    today = datetime.now(UTC).date().isoformat()
    name = f"{device.removeprefix('NVIDIA ').replace(' ', '-').lower()}-{today}.jsonl"
    out = args.out or CHECKOUT / "benchmarks" / "results" / name
    common = {"nvidia_driver": driver, "commit": args.commit or commit()}
    book = Book(out, args.resume, common)
    runner = Runner(book, args, until=start + 60 * args.minutes - RESERVE, log=out)
    for step in steps:
        if runner.no_gpu:
            break
        runner.step(step)
    book.close()
    if any(one.get("benchmark") == "tune" for one in book.records):
        _gpu_kernels.keep_table(out.with_suffix(".tuned.json"))
    for text in _gpu_table.table(book.records):
        print(text, flush=True)
    print(f"written: {out} ({time.time() - start:.0f} s)")
    if runner.no_gpu:
        print(f"benchmarks.gpu: JAX found no GPU ({runner.no_gpu}); --dry-run needs none.")
        return 2
    return int(any(one.get("failed") or one.get("refused") for one in book.records))


class Runner:
    """Runs steps in processes of their own, and writes down what they tell."""

    def __init__(self, book: Book, args: argparse.Namespace, *, until: float, log: Path) -> None:
        self.book, self.args, self.until = book, args, until
        self.log = log.with_suffix(".log")
        self.no_gpu = ""
        self.say: Callable[[str], None] = lambda text: print(text, flush=True)

    def step(self, step: Any) -> None:
        items = [item.name for item in step.items()]
        losses = 0
        while losses < LOSSES and self.until - time.time() > LEAST:
            todo = [name for name in items if name not in self.book.done]
            if not (todo or step.tests):
                return
            self.say(f"-- {step.name}: {self.until - time.time():.0f} s left")
            last = self._process(step, todo)
            if self.no_gpu or last["event"] == "cut":
                return
            if last["event"] == "ended" and not last["item"] and last["status"] in (0, 1, 5):
                return  # 1 and 5: some tests failed, and there are none
            losses += 2 if last["event"] == "hung" else 1
            if last["item"]:
                why = (
                    "hung: nothing was heard for too long"
                    if last["event"] == "hung"
                    else f"took its process along (exit status {last['status']})"
                )
                self._failed(step, last["item"], f"{why}\n{last['tail']}"[-2000:])
            elif last.get("status") != LOST:
                self._failed(step, "", f"{last['event']}\n{last['tail']}"[-2000:])
                return
        if losses >= LOSSES:
            self.say(f"   {step.name}: given up after what hung and faulted")

    def _process(self, step: Any, todo: list[str]) -> Event:
        """Runs one process; what the watch said last."""
        ceilings = [one for one in self.book.records if one.get("benchmark") == "ceilings"]
        told = json.dumps({"items": todo, "ceilings": ceilings})
        command = self._pytest(step) if step.tests else self._worker(step)
        memory = MEMORY | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if step.tests else {})
        last: Event = {"event": "cut", "item": "", "tail": ""}
        for event in watch(
            command,
            told,
            until=self.until,
            warm_up=step.warm_up,
            log=self.log,
            slack=self.args.slack,
            environment=memory,
        ):
            last = event
            self._heard(step, event)
            if self.no_gpu:
                break
        return last

    def _heard(self, step: Any, event: Event) -> None:
        name = event["item"]
        match event["event"]:
            case "environment":
                found = event["record"]
                self.book.common = found | self.book.common
                if found["platform"] != "gpu" and not self.args.any_device:
                    self.no_gpu = found["device"]
            case "done":
                records = event["records"] or [{"benchmark": "nothing"}]
                self.book.write(step.name, name, records)
                for text in event["lines"]:
                    self.say(f"   {name}: {text}" if len(event["lines"]) == 1 else f"   {text}")
            case "failed":
                self.book.write(step.name, name, event["records"])
                self._failed(step, name, event["why"])
            case "no time":
                self.say(f"   {name}: no time")

    def _failed(self, step: Any, name: str, why: str) -> None:
        self.book.write(step.name, name, [{"benchmark": step.name, "failed": why}])
        self.say(f"   {name or step.name}: FAILED: {why}")

    def _worker(self, step: Any) -> list[str]:
        args = self.args
        return [
            *(sys.executable, "-m", "benchmarks._gpu_worker", step.name),
            *("--until", str(self.until), "--implementation", args.implementation),
            *("--steps", args.steps, "--seed", str(args.seed)),
        ]

    def _pytest(self, step: Any) -> list[str]:
        """Without the options of the development environment, which may not be installed."""
        skip = [f"--deselect={one}" for one in sorted(self.book.done) if "::" in one]
        gpu = [] if self.args.any_device else ["--require-gpu"]
        return [
            *(sys.executable, "-m", "pytest", "-p", "benchmarks._gpu_pytest", *step.tests, *gpu),
            *("-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider"),
            *("-q", "--tb=short", *skip),
        ]


def plan(steps: Sequence[Any], seconds: float) -> Iterator[str]:
    """What would be done, when, and the floors that are predicted with the assumed ceilings."""
    from benchmarks._gpu_floor import Ceilings

    at = 0.0
    for step in steps:
        items = list(step.items())
        took = step.warm_up + step.seconds + sum(item.seconds for item in items)
        yield f"{at:5.0f} s  {step.name}: some {took:.0f} s" + (
            f", pytest {' '.join(step.tests)}" if step.tests else f", {len(items)} items"
        )
        at += step.warm_up + step.seconds
        for item in items:
            late = "  (beyond --minutes)" if at + item.seconds > seconds else ""
            yield f"{at:5.0f} s    {item.name}{late}"
            for text in item.predict(Ceilings()) if item.predict else ():
                yield f"             {text}"
            at += item.seconds
    yield f"{at:5.0f} s  the end; {seconds:.0f} s were given"


def _nvidia() -> tuple[str, str | None]:
    """Name and driver of the first GPU, without starting JAX."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        name, driver = said.splitlines()[0].split(",")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return "gpu", None
    return name.strip(), driver.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="until the table is printed")
    add("--out", type=Path, help="default: benchmarks/results/DEVICE-DATE.jsonl")
    add("--resume", action="store_true", help="go on with --out: skip what is there")
    add("--dry-run", action="store_true", help="print the plan and the predicted floors")
    add("--only", help="names of steps, with commas")
    add("--commit", help="what was checked out, where git cannot tell")
    add("--seed", type=int, default=0, help="of inputs and patterns")
    add("--implementation", default="mosaic", help="what is measured")
    add("--any-device", action="store_true", help="run without a GPU, to try the book itself")
    add("--slack", type=float, default=SLACK, help="seconds of patience with what hangs")
    add("--steps", default="benchmarks._gpu_steps", help="the module with the steps")
    return parser


if __name__ == "__main__":
    sys.exit(main())
