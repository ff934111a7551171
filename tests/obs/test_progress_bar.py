"""Progress: plain lines in a log, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from megatron_sov.obs import progress_bar
from megatron_sov.obs.progress_bar import ProgressBar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until the test moves it."""
    now = [1000.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_and_the_last_state(clock: list[float]) -> None:
    log = io.StringIO()
    bar = ProgressBar(100, 0, "pretrain", stream=log)
    for step in range(1, 101):
        clock[0] += 0.3  # 30 s for all
        bar.update(step, loss=5.0 - step / 100, tokens_per_s=12345.6)
    bar.close()
    lines = log.getvalue().splitlines()
    # 66 steps x 0.3 s = 19.8 s
    assert lines[0] == "pretrain: step 34/100, loss 4.6600, 12,346 tokens/s, 00:19 left"
    assert [line.split()[2] for line in lines] == ["34/100,", "68/100,", "100/100,"]
    assert lines[-1].endswith("00:00 left")


def test_time_left_after_a_resume_counts_own_steps_only(clock: list[float]) -> None:
    log = io.StringIO()
    bar = ProgressBar(1000, 900, "pretrain", stream=log)
    clock[0] += 20
    bar.update(910, loss=float("nan"), tokens_per_s=1.0)
    assert log.getvalue() == "pretrain: step 910/1000, loss nan, 1 tokens/s, 03:00 left\n"  # 90 steps x 2 s


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes() -> None:
    screen = Terminal()
    bar = ProgressBar(40, 10, "pretrain", stream=screen)
    bar.update(20, loss=2.5, tokens_per_s=4096)
    bar.update(40, loss=2.25, tokens_per_s=4096)
    bar.close()
    assert "10/40" in screen.getvalue()
    last = screen.getvalue().rsplit("\r", 1)[-1]
    assert "100%" in last and "40/40" in last and "loss 2.2500, 4,096 tokens/s" in last


def test_closing_before_the_first_step_writes_nothing() -> None:
    log = io.StringIO()
    ProgressBar(10, 0, "pretrain", stream=log).close()
    assert log.getvalue() == ""
