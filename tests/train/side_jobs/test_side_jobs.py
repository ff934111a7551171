"""Exports and their evaluations together: what was exported is judged, and nothing of it can end a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.train.side_jobs import side_jobs
from megatron_sov.train.side_jobs.side_jobs import SideJobs


class Noted:
    """Stands for exports or evaluations: writes down what is asked of it."""

    def __init__(self, name: str, asked: list[str], fails: set[str],
                 exported: Callable[[int], None] | None = None) -> None:
        self._name, self._asked, self._fails, self._exported = name, asked, fails, exported

    def _note(self, what: str) -> None:
        self._asked.append(f"{self._name} {what}")
        if f"{self._name} {what}" in self._fails:
            raise OSError("stale file handle")

    def offer(self, step: int, *checkpoint: Any) -> None:
        self._note(f"offer {step}")
        if self._exported is not None:
            self._exported(step)

    def __getattr__(self, name: str) -> Any:
        return lambda: self._note(name)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[SideJobs, list[str], set[str]]:
    """Side jobs whose exports are ready at once, what was asked of them, and what the file system refuses."""
    asked: list[str] = []
    fails: set[str] = set()
    monkeypatch.setattr(side_jobs, "Evaluations", lambda run, config, record: Noted("judge", asked, fails))
    monkeypatch.setattr(side_jobs, "Exports",
                        lambda run, config, record, exported: Noted("export", asked, fails, exported))
    return SideJobs(tmp_path, recipes.get("tiny-solar-open"), lambda event, **fields: None), asked, fails


def test_what_is_exported_is_judged_and_both_are_followed_and_ended(jobs: Any) -> None:
    beside, asked, _ = jobs
    beside.offer(10, Path("step-10"), last=False)
    for action in (beside.poll, beside.wait, beside.close):
        action()
    assert asked == ["export offer 10", "judge offer 10", "export poll", "judge poll", "export wait",
                     "judge wait", "export close", "judge close"]


@pytest.mark.parametrize(("refused", "action"), [
    ("judge poll", SideJobs.poll),
    ("judge offer 10", lambda beside: beside.offer(10, Path("step-10"), last=False))])
def test_a_file_system_that_refuses_is_a_warning(refused: str, action: Callable[[SideJobs], None], jobs: Any,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    beside, asked, fails = jobs
    fails.add(refused)
    action(beside)
    assert asked[-1] == refused
    assert capsys.readouterr().err == (
        "warning: evaluations beside training cannot be followed (stale file handle)\n")
