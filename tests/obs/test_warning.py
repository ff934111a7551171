"""A warning is one line for people, and an event where a run keeps events."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.obs.events import EventLog, read_events
from megatron_sov.obs.warning import warn


def test_a_warning_is_said_and_recorded_in_the_same_words(tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    warn("the disk is slow", events.write, step=3)
    warn("weights went back", events.write, "rollback", step=4, back_to=2)
    events.close()
    told = [{k: v for k, v in e.items() if k != "time_s"} for e in read_events(tmp_path / "events.jsonl")]
    assert told == [{"event": "warning", "step": 3, "text": "the disk is slow"},
                    {"event": "rollback", "step": 4, "back_to": 2, "text": "weights went back"}]
    assert capsys.readouterr().err == "warning: the disk is slow\nwarning: weights went back\n"


def test_without_a_run_it_is_only_said(capsys: pytest.CaptureFixture[str]) -> None:
    warn("the disk is slow")
    assert capsys.readouterr().err == "warning: the disk is slow\n"
