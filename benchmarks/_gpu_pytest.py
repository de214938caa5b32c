"""A plugin of pytest that tells the run book of every test: when it starts, and how it ended."""

import os
from typing import Any

from benchmarks._gpu_worker import LOST, answers, tell
from benchmarks._record import environment

PATIENCE = 10.0  # seconds, a guess: a test compiles a few kernels


def pytest_sessionstart() -> None:
    tell("environment", "", record=environment())


def pytest_collection_finish(session: Any) -> None:
    tell("collected", "", count=len(session.items))


def pytest_runtest_logstart(nodeid: str) -> None:
    tell("start", nodeid, seconds=PATIENCE)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.passed:
        return
    why = ""
    if report.failed:
        text = str(report.longrepr).strip()
        errors = [line for line in text.splitlines() if line.startswith("E ")]
        why = "\n".join(errors)[:1500] or text[-1500:]
    elif report.skipped:
        why = str(report.longrepr)[-300:]
    record = {
        "benchmark": "tests",
        "outcome": report.outcome,
        "when": report.when,
        "seconds": round(report.duration, 2),
        "why": why,
    }
    tell("done", report.nodeid, records=[record], took=record["seconds"], lines=[report.outcome])
    if report.failed and not answers():
        os._exit(LOST)
