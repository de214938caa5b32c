"""Where a number was measured, and JSON lines that carry it."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import jax

CHECKOUT = Path(__file__).parent.parent


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit: what a number means nothing without."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": None if device.platform == "cpu" else device.client.platform_version,
        "cpu": cpu_model(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin" and (name := _says("sysctl", "-n", "machdep.cpu.brand_string")):
        return name
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str:
    """The commit of this checkout, with a "+" if tracked files differ from it."""
    name = _says("git", "rev-parse", "--short=12", "HEAD")
    changed = _says("git", "status", "--porcelain", "--untracked-files=no")
    return f"{name}{'+' if changed else ''}" if name else "unknown"


def _says(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


class JsonLines:
    """A file with one JSON object a line, each on the disk as soon as it is known."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._common = path.open("w", encoding="utf-8"), common

    def write(self, record: dict[str, Any]) -> None:
        """One line: what all lines share, then `record`."""
        self._file.write(json.dumps(self._common | record, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
