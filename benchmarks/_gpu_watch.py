"""Runs a process that tells its progress, and ends it when it says nothing for too long."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks._gpu_worker import heard

type Event = dict[str, Any]

TAIL = 30  # lines of output that are kept for a record
SLACK = 25.0  # seconds beyond three times what something was guessed to take


def watch(
    command: Sequence[str],
    told: str,
    *,
    until: float,
    warm_up: float,
    log: Path,
    slack: float = SLACK,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Event]:
    """Events of the process, and one of the watch itself at its end: "ended" with the exit status
    and the last lines of output, "hung", or "cut" at the time `until`. Each names the item that
    was under way, if one was."""
    with log.open("a", encoding="utf-8") as written:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it starts ends with it
            env=os.environ | dict(environment or {}),
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_feed, args=(process, told, lines), daemon=True)
        reader.start()
        try:
            yield from _events(process, lines, written, until, warm_up, slack)
        finally:
            _end(process, reader)


def _events(
    process: subprocess.Popen,
    lines: queue.Queue,
    written: IO[str],
    until: float,
    warm_up: float,
    slack: float,
) -> Iterator[Event]:
    tail: deque[str] = deque(maxlen=TAIL)
    under_way, limit = "", time.time() + 3 * warm_up + slack
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(limit, until) - time.time()))
        except queue.Empty:
            event = "cut" if time.time() >= until else "hung"
            yield {"event": event, "item": under_way, "tail": "".join(tail)}
            return
        if line is None:
            status = process.wait()
            yield {"event": "ended", "item": under_way, "status": status, "tail": "".join(tail)}
            return
        event = heard(line)
        if event is None:
            if line.strip():
                tail.append(line)
                written.write(line)
                written.flush()
            continue
        if event["event"] == "start":
            under_way, limit = event["item"], time.time() + 3 * event["seconds"] + slack
        else:
            under_way, limit = "", time.time() + 3 * warm_up + slack
        yield event


def _feed(process: subprocess.Popen, told: str, lines: queue.Queue) -> None:
    assert process.stdin
    assert process.stdout
    with contextlib.suppress(BrokenPipeError, OSError):
        process.stdin.write(told)
        process.stdin.close()
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen, reader: threading.Thread) -> None:
    """Of the process and of all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join(timeout=5)
    if process.stdout and not reader.is_alive():
        process.stdout.close()
