"""Tests with the newest release of megatron-core, and the note about an old constraints.txt."""

import datetime
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import releases


@pytest.mark.deep
def test_the_engine_runs_on_the_newest_release() -> None:
    """Runs tests of engine and checkpoints with the release's sources first on the import path."""
    newest = releases.newest_version()
    if not newest or not releases.is_newer(newest, releases.locked_version()):
        pytest.skip(f"the index has no newer release than {releases.locked_version()}")
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:anyio", "tests/engine", "tests/checkpoint"],
        env=releases.environment(releases.fetch_wheel(releases.LIBRARY, newest)), cwd=releases.ROOT,
        capture_output=True, text=True, check=False)
    assert completed.returncode == 0, f"{releases.LIBRARY} {newest}: {completed.stdout[-4000:]}"


@pytest.mark.parametrize(("listed", "newest"), [
    ("megatron-core (0.20.0)\nAvailable versions: 0.20.0, 0.19.2", "0.20.0"), ("", "")])
def test_the_newest_release_is_read_from_the_index(monkeypatch: pytest.MonkeyPatch, listed: str,
                                                   newest: str) -> None:
    monkeypatch.setattr(releases.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=listed))
    assert releases.newest_version() == newest
    assert releases.is_newer("0.19.10", "0.19.2") and not releases.is_newer("0.19.2", "0.19.2")


def test_an_old_lock_is_reported_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "constraints.txt").write_text("# Locked on 2026-11-28.\nmegatron-core==0.19.2\n")
    monkeypatch.setattr(releases, "LOCK", tmp_path / "constraints.txt")
    assert releases.age_note(datetime.date(2027, 1, 12)) == ""
    assert releases.age_note(datetime.date(2027, 1, 13)).startswith(
        "note: constraints.txt has megatron-core 0.19.2 and is 46 days old")
