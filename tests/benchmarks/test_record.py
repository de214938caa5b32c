"""What every number carries with it."""

import json
import subprocess

from benchmarks import _record
from benchmarks._record import JsonLines, environment


def test_environment_says_where_and_with_what():
    found = environment()
    json.dumps(found, allow_nan=False)
    for key in ("device", "platform", "cpu", "python", "jax", "jaxlib", "commit", "started"):
        assert isinstance(found[key], str), key
        assert found[key], key
    assert found["cores"] >= 1


def test_a_commit_with_changes_is_marked(monkeypatch):
    answers = {"rev-parse": "0123456789ab", "status": ""}
    monkeypatch.setattr(_record, "_says", lambda *command: answers[command[1]])
    assert _record.commit() == "0123456789ab"
    answers["status"] = " M bsjax/ops/_xla.py"
    assert _record.commit() == "0123456789ab+"
    answers["rev-parse"] = ""
    assert _record.commit() == "unknown"


def test_no_git_is_no_error(monkeypatch):
    def run(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", run)
    assert _record.commit() == "unknown"


def test_lines_are_on_the_disk_before_the_file_is_closed(tmp_path):
    path = tmp_path / "new folder" / "a.jsonl"
    with JsonLines(path, {"jax": "1", "name": "common"}) as out:
        out.write({"name": "first"})
        assert json.loads(path.read_text()) == {"jax": "1", "name": "first"}
        out.write({"value": 2})
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"jax": "1", "name": "first"},
        {"jax": "1", "name": "common", "value": 2},
    ]
