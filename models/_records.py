"""Results as JSON lines: one object each, with what made it, on the disk at once."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

CHECKOUT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment(commit: str = "") -> dict[str, Any]:
    """The device, the versions and the commit; `commit` says it where git cannot."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "commit": commit or _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One more line at the end of the file."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END) and not _ends(file):  # whoever wrote last was cut off
            line = "\n" + line
        file.write(line.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """What the file holds; nothing where there is none. Lines that were cut off are left out."""
    if not path.exists():
        return []
    found = map(_object, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in found if record is not None]


def _ends(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _commit() -> str:
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
