"""Following a run: until it has ended and is quiet, whatever comes,
and never longer than its reader wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sov import cli, recipes
from megatron_sov.commands import logs
from megatron_sov.obs.events import EventLog
from megatron_sov.watch import state as states

Follow = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on Slurm whose ranks have written a line each."""
    run = tmp_path / "run"
    for rank in (0, 1):
        (run / "slurm/logs/17-0").mkdir(parents=True, exist_ok=True)
        (run / f"slurm/logs/17-0/rank-{rank}.log").write_text("begins\n")
    (run / "config.json").write_text(json.dumps(recipes.get("tiny-solar-open").to_dict()))
    EventLog(run / "events.jsonl").write("run_start", num_ranks=2, resumed_from=0)
    return run


@pytest.fixture
def follow(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Follow:
    """Return `follow(happens, *arguments)`: what is printed while, at the end of the n-th pause,
    `happens[n]()` happens.

    No time goes by but what the command sleeps; after the last of them the reader presses Ctrl-C.
    """

    def followed(happens: list[Callable[[], object]], *arguments: str) -> list[str]:
        slept_s: list[float] = []

        def sleep(seconds: float) -> None:
            slept_s.append(seconds)
            if len(slept_s) > len(happens):
                raise KeyboardInterrupt
            happens[len(slept_s) - 1]()

        monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: sum(slept_s)))
        assert cli.main(["logs", str(run), "--follow", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return followed


def be(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run be in some state."""
    monkeypatch.setattr(states, "read_state", lambda run: SimpleNamespace(state=state))


def nothing() -> None:
    """Let nothing happen."""


@pytest.mark.parametrize("state", ["running", "silent", "waiting"])
def test_a_run_that_may_go_on_is_followed_until_its_reader_goes(
        state: str, run: Path, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    be(state, monkeypatch)
    pauses = int(10 * logs.ENDED_AFTER_S / logs.LOOK_EVERY_S)
    file = run / "slurm/logs/17-0/rank-1.log"
    lines = follow([*[nothing] * pauses, lambda: file.write_text("begins\ngoes on\n")])
    assert lines[-1] == "[job 17 rank 1] goes on"


def test_one_that_has_ended_is_left_when_it_was_quiet_for_long_enough(
        run: Path, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    be("ended", monkeypatch)
    pauses = int(logs.ENDED_AFTER_S / logs.LOOK_EVERY_S)
    happened: list[str] = []

    def writes() -> None:
        happened.append("last words")
        (run / "slurm/logs/17-0/rank-0.log").write_text("begins\nlast words\nwithout an end")

    lines = follow([nothing] * (pauses - 1) + [writes] + [lambda: happened.append("quiet")] * 10 * pauses)
    assert lines[-2:] == ["[job 17 rank 0] last words", "[job 17 rank 0] without an end"]
    assert happened == ["last words"] + ["quiet"] * (pauses + 1)


def test_only_the_ranks_and_lines_asked_for_also_in_files_that_come_later(run: Path, follow: Follow) -> None:
    def starts_again() -> None:
        (run / "slurm/logs/17-1").mkdir()
        for rank in (0, 1):
            (run / f"slurm/logs/17-1/rank-{rank}.log").write_text("begins again\nsays more\n")

    lines = follow([starts_again, nothing], "--rank", "1", "--grep", "begins")
    assert lines == ["[job 17 rank 1] begins", "[job 17 start 2 rank 1] begins again"]
