"""Settings and fixtures of all tests: drawn examples are the same in every run, and ranks are real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Job:
    """One function of a test file, run on `nproc` ranks."""

    file: str
    """The test file (`__file__`)."""
    function: str
    """Name of a module-level function in it; it joins the world itself and returns JSON values."""
    nproc: int = 1
    """Ranks."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments, plain JSON values."""


Ranks = Callable[..., list[list[Any]]]


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """Return `run(Job, ...)`, which gives each job's results, one per rank; one process imports megatron for all jobs."""

    def run(*jobs: Job, timeout_s: float = 300) -> list[list[Any]]:
        folder = tmp_path / "jobs"
        folder.mkdir(exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps([asdict(j) for j in jobs]))
        worker = Path(__file__).with_name("rank_main.py")
        done = subprocess.run([sys.executable, "-W", "ignore", str(worker), str(folder / "jobs.json")], capture_output=True, text=True,
                              timeout=timeout_s, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [[json.loads((folder / f"{n}-{r}.json").read_text()) for r in range(job.nproc)] for n, job in enumerate(jobs)]

    return run


@pytest.fixture
def job() -> type[Job]:
    """Return the class that describes what `ranks` runs (test modules cannot import this file)."""
    return Job
