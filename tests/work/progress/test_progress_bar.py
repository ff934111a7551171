"""Progress: plain lines in a log, a bar on a terminal."""

import io
import math
import os
from pathlib import Path

import pytest

from megatron_sov.base.errors import warn
from megatron_sov.base.figures import format_value
from megatron_sov.runs.obs.events import EventLog, read_events
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.work.progress import progress_bar
from megatron_sov.work.progress.progress_bar import ProgressBar, create_bar as create_bar


class Terminal(io.StringIO):
    """A stream with `isatty() == True`."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return -1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock set by the test."""
    now = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def test_log_line_every_ten_seconds_and_last_state(clock: list[float]) -> None:
    log = io.StringIO()
    bar = ProgressBar(100, 0, "pretrain", stream=log)
    for step in range(1, 101):
        clock[0] += 0.3  # 30 s for all
        bar.update(step, metrics_text=f"loss {5.0 - step / 100:.4f}", tokens_per_s=12345.6)
    bar.close()
    lines = log.getvalue().splitlines()
    # 66 steps x 0.3 s = 19.8 s
    assert lines[0] == "pretrain: step 34/100, loss 4.6600, 12,346 tokens/s, 00:19 left"
    assert [line.split()[2] for line in lines] == ["34/100,", "68/100,", "100/100,"]
    assert lines[-1].endswith("00:00 left")


def test_remaining_time_uses_own_steps_only(clock: list[float]) -> None:
    log = io.StringIO()
    bar = ProgressBar(1000, 900, "pretrain", stream=log)
    clock[0] += 20
    bar.update(910, metrics_text="loss nan", tokens_per_s=1.0)
    assert log.getvalue() == "pretrain: step 910/1000, loss nan, 1 tokens/s, 03:00 left\n"  # 90 steps x 2 s


def test_terminal_bar_starts_at_resumed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    bar = ProgressBar(40, 10, "pretrain", stream=screen)
    bar.update(20, metrics_text="loss 2.5000", tokens_per_s=4096)
    monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((121, 24)))  # the user widens it
    bar.update(40, metrics_text="loss 2.2500", tokens_per_s=4096)
    bar.close()
    assert "10/40" in screen.getvalue()
    last = screen.getvalue().rsplit("\r", 1)[-1]
    assert "100%" in last and "40/40" in last and "loss 2.2500, 4,096 tokens/s" in last
    assert len(last) == len("\n") + 120


def test_close_before_first_step_writes_nothing() -> None:
    log = io.StringIO()
    ProgressBar(10, 0, "pretrain", stream=log).close()
    assert log.getvalue() == ""


# The bar of long work: on a terminal, once it takes longer than a moment.


@pytest.mark.each(("delay_s", "is_enabled", "screen", "is_shown"), [
    (0.0, True, Terminal(), True), (60.0, True, Terminal(), False), (0.0, False, Terminal(), False),
    (0.0, True, io.StringIO(), False)])
def test_progress_files_show_completed_work(delay_s: float, is_enabled: bool, screen: io.StringIO,
                                            is_shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "SHOWN_AFTER_S", delay_s)
    monkeypatch.setattr("sys.stderr", screen)
    with create_bar("hashing", 2_000_000, "B", is_enabled) as bar:
        bar.update(2_000_000)
    assert ("hashing: 100%" in screen.getvalue() and "2.00M/2.00M" in screen.getvalue()) == is_shown


def test_invalid_numbers_are_ignored() -> None:
    assert parse_number("inf") == math.inf and parse_number("1.5") == 1.5
    assert [format_value(parse_number(value)) for value in (None, "x", "nan", 2)] == ["–", "–", "–", "2"]


# A warning is one line for people, and an event where a run keeps events.


def test_warning_is_printed_and_recorded_equally(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    warn("the disk is slow", events.write, step=3)
    warn("weights went back", events.write, "rollback", step=4, back_to=2)
    events.close()
    recorded = [*read_events(tmp_path / "events.jsonl")]
    for event in recorded:
        event.pop("time_s")
    assert recorded == [{"event": "warning", "step": 3, "text": "the disk is slow"},
                        {"event": "rollback", "step": 4, "back_to": 2, "text": "weights went back"}]
    assert capsys.readouterr().err == "warning: the disk is slow\nwarning: weights went back\n"
