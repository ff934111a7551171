"""`megatron-sov logs`: merges the files of all ranks and starts, and follows a run until it ends."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sov import cli, recipes
from megatron_sov.commands.operate.runs import logs_run as logs
from megatron_sov.commands.operate.runs.logs_run import LogFile, LogTail
from megatron_sov.runs.obs.events import LONGEST_LINE_BYTES, EventLog

Follow = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two Slurm attempts, as job scripts leave it."""
    run = tmp_path / "run"
    files = {
        "slurm/17.log": "job: attempt 1 on n1, n2 begins at 0\n",
        "slurm/logs/17-0/srun.log": "srun: error: n2: task 10: Killed\n",
        "slurm/logs/17-0/rank-0.log": "step 1/9\rstep 2/9\nconnection lost\n",
        "slurm/logs/17-0/rank-2.log": "two\n",
        "slurm/logs/17-0/rank-10.log": "out of memory\n",
        "slurm/logs/17-0/preflight/rank-0.log": "fit\n",
        "slurm/logs/17-1/rank-0.log": "step 9/9, loss 3.1\nan unfinished line",
        "hang/step-3-rank-00002.txt": "waits in loop.py\n",
        "exports/.step-4.log": "error: disk\n",
        "config.json": json.dumps(recipes.get("tiny-solar-open").to_dict()),
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    log = EventLog(run / "events.jsonl")
    log.write("run_start", num_ranks=2, resumed_from=0)
    log.write("step", step=1, loss=3.0)
    log.write("warning", step=1, text="source korean is worn out")
    log.write("skip", step=2, reason="data.skip_steps")
    log.write("skip", step=3, reason="the loss is nan", ranks=[1])
    log.write("failure", step=3, text="the disk is full")
    log.close()
    return run


def read_printed_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(["logs", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_all_files_in_order_of_the_starts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *lines, start, warning, skip, failure = read_printed_lines(capsys, str(run))
    assert lines == [
        "[job 17] job: attempt 1 on n1, n2 begins at 0", "[job 17 preflight rank 0] fit",
        "[job 17 srun] srun: error: n2: task 10: Killed",
        "[job 17 rank 0] step 2/9", "[job 17 rank 0] connection lost", "[job 17 rank 2] two",
        "[job 17 rank 10] out of memory", "[job 17 start 2 rank 0] step 9/9, loss 3.1",
        "[job 17 start 2 rank 0] an unfinished line", "[step-3 rank 2 hangs] waits in loop.py",
        "[exports step-4] error: disk"]
    assert start.endswith("step 0: the run starts from step 0, with 2 rank(s)")
    assert warning.startswith("[events] 20")  # the year
    assert warning.endswith(" UTC step 1: warning: source korean is worn out")
    assert skip.endswith(" UTC step 3: step rejected: the loss is nan; not finite on rank 1")
    assert failure.endswith(" UTC step 3: ended by an error: the disk is full")


def test_one_rank_over_all_starts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = read_printed_lines(capsys, str(run), "--rank", "0")
    assert {"[job 17 rank 0] step 2/9", "[job 17 start 2 rank 0] step 9/9, loss 3.1",
            "[job 17 start 2 rank 0] an unfinished line"} <= {*lines}
    assert read_printed_lines(capsys, str(run), "--rank", "2", "--rank", "10", "--tail", "1") == [
        "[job 17 rank 2] two", "[job 17 rank 10] out of memory", "[step-3 rank 2 hangs] waits in loop.py"]


@pytest.fixture
def follow(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Follow:
    """Return `follow(actions, *arguments)`: the printed lines of a command whose n-th sleep calls
    `actions[n]()`. Time passes only in sleeps; after the last action, a sleep raises KeyboardInterrupt."""

    def follow_run(actions: list[Callable[[], object]], *arguments: str) -> list[str]:
        slept_s: list[float] = []

        def sleep(seconds: float) -> None:
            slept_s.append(seconds)
            if len(slept_s) > len(actions):
                raise KeyboardInterrupt
            actions[len(slept_s) - 1]()

        clock = {"sleep": sleep, "monotonic": lambda: sum(slept_s)}
        monkeypatch.setattr(logs, "time", SimpleNamespace(**vars(time) | clock))
        return read_printed_lines(capsys, str(run), "--follow", *arguments)

    return follow_run


def do_nothing() -> None:
    pass


def test_following_prints_new_lines_files_and_events_until_the_run_is_quiet(run: Path,
                                                                            follow: Follow) -> None:
    done: list[str] = []

    def write_more() -> None:
        done.append("write")
        with open(run / "slurm/logs/17-1/rank-0.log", "a") as f:
            f.write(" ends\nstep 10")
        (run / "slurm/logs/17-2").mkdir()
        (run / "slurm/logs/17-2/rank-0.log").write_text("again\n")
        log = EventLog(run / "events.jsonl")
        log.write("stop", step=9, reason="SIGUSR1")
        log.close()

    pauses = int(logs.SILENCE_S / logs.POLL_S)
    lines = follow([do_nothing] * (pauses - 1) + [write_more] + [lambda: done.append("quiet")] * 10 * pauses,
                   "--tail", "1")
    assert done == ["write"] + ["quiet"] * (pauses + 1)
    assert "[job 17 rank 0] connection lost" in lines and "[job 17 rank 0] step 2/9" not in lines
    new = [line for line in lines if "17 start" in line]
    assert new == ["[job 17 start 2 rank 0] step 9/9, loss 3.1",
                   "[job 17 start 2 rank 0] an unfinished line ends", "[job 17 start 3 rank 0] again",
                   "[job 17 start 2 rank 0] step 10"]
    assert [line for line in lines if line.endswith("step 9: the run stops: SIGUSR1")]


@pytest.mark.parametrize("state", ["running", "silent", "waiting"])
def test_a_run_that_may_resume_is_followed_until_ctrl_c(state: str, run: Path, follow: Follow,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "read_run_state", lambda run: SimpleNamespace(state=state))
    pauses = int(10 * logs.SILENCE_S / logs.POLL_S)
    file = run / "slurm/logs/17-0/rank-2.log"
    lines = follow([*[do_nothing] * pauses, lambda: file.write_text("two\ngoes on\n")])
    assert lines[-1] == "[job 17 rank 2] goes on"


def test_binary_log_bytes_are_printed_harmlessly(tmp_path: Path) -> None:
    (file := tmp_path / "rank-0.log").write_bytes(b"\x1b[31m\xff" + b"x" * (LONGEST_LINE_BYTES + 10))
    lines = list(LogTail(LogFile(file, "x", 0)).lines(whole=True))
    assert "".join(line.text for line in lines).startswith("·[31m\ufffdx")
    assert not any("\x1b" in line.text for line in lines)
