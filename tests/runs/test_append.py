"""Events that are added to a run after it has ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.obs.events import EVENTS, EventLog, read_events
from megatron_sov.runs.append import RunEvents


def test_events_join_those_of_the_run(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    for step in (1, 2, 3):
        log.write("step", step=step, loss=1.0)
    log.write("eval", step=9)
    log.close()
    events = RunEvents(tmp_path)
    assert events.last_step() == 3
    events.add("sample", step=3, prompt="a")
    assert [e["event"] for e in read_events(tmp_path / EVENTS)] == ["step"] * 3 + ["eval", "sample"]


def test_without_a_run_nothing_is_written_and_a_wrong_folder_is_named(tmp_path: Path) -> None:
    none = RunEvents(None)
    none.add("sample", prompt="a")
    assert none.last_step() is None
    with pytest.raises(UserError, match=r"holds no events\.jsonl, so it is not a run"):
        RunEvents(tmp_path)
    assert list(tmp_path.iterdir()) == []
