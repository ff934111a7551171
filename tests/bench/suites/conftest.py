"""Suite tasks over synthetic items, as `eval lm` loads them, and rewards that run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.bench.lm.settings import TaskSources
from megatron_sov.bench.lm.tasks import LoadedTasks, load_tasks
from megatron_sov.bench.suites import judging
from megatron_sov.judge.rewards.reward import Result, Row, run_reward

sys.path.append(str(Path(__file__).parent))  # `suite_items`


class Here:
    """Runs a reward in this process; tests/judge tests its worker processes."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def score(self, rows: Sequence[Row]) -> list[Result]:
        return [run_reward(self.reward, row) for row in rows]


@pytest.fixture(autouse=True)
def judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "create_runner", lambda asked, made, workers: Here(made.reward))


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], LoadedTasks]:
    """Name -> the task that `eval lm` loads over the files in the test's folder."""
    return lambda name: load_tasks([name], TaskSources(data_dir=tmp_path))


@pytest.fixture
def loaded(load: Callable[[str], LoadedTasks]) -> Callable[[str], Any]:
    """Name -> lm-eval's task."""
    return lambda name: load(name).tasks[name]
