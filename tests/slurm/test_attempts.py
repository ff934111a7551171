"""What a job's script is told: the decisions on every way in which an attempt can begin and end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.slurm import attempts

Question = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


@pytest.fixture
def question(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Question:
    """Return `question(action, *words, restart=, queue=) -> answer`, asked by job 7 on n1
    and n2 of four nodes."""

    def ask(action: str, *words: str, restart: int = 0, queue: str = "7 RUNNING\n",
            usable: str = "n1,n2,n3,n4") -> str:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        monkeypatch.setattr(sys, "stdin", io.StringIO(queue))
        fixed = ["--target", str(run), "--done", str(run / "complete.json"), "--max-failures", "3",
                 "--max-strikes", "2", "--min-nodes", "2", "--nodes", "n1,n2", "--usable", usable]
        assert attempts.main([action, str(run / "slurm"), *fixed, *words]) == 0
        return capsys.readouterr().out.strip()

    (run / "slurm").mkdir()
    return ask


def ended(run: Path) -> dict[str, Any]:
    """Return the last record."""
    return dict(json.loads((run / "slurm/attempts.jsonl").read_text().splitlines()[-1]))


def checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoints/step-{step}").mkdir()


def srun_says(run: Path, text: str, rank_log: str = "") -> tuple[str, ...]:
    (run / "srun.log").write_text(text)
    (run / "rank-1.log").write_text(rank_log)
    return "--logs", str(run)


def test_a_first_attempt_runs(question: Question, run: Path) -> None:
    assert question("begin") == "run"
    assert ended(run) | {"time_s": 0} == {"event": "begin", "time_s": 0, "job": "7", "restart": 0,
                                          "nodes": ["n1", "n2"], "progress": 0}


def test_a_complete_stage_ends_the_job(question: Question, run: Path) -> None:
    question("begin")
    (run / "complete.json").write_text("{}")
    assert question("end", "--code", "0") == "exit 0"
    assert question("begin", restart=1) == "exit 0", "an attempt too many finds nothing to do"


def test_an_exit_code_alone_does_not_make_a_stage_complete(question: Question, run: Path) -> None:
    question("begin")
    checkpoint(run, 10)
    assert question("end", "--code", "0") == "requeue"
    assert ended(run)["outcome"] == "stopped"


def test_the_time_limit_puts_the_job_back_and_a_cancellation_does_not(question: Question, run: Path) -> None:
    question("begin")
    checkpoint(run, 10)
    assert question("end", "--code", "0", "--asked", "limit") == "requeue"
    assert ended(run)["reason"] == "its time limit came near; saved so far: step 10"
    question("begin", restart=1)
    assert question("end", "--code", "0", "--asked", "cancel", restart=1) == "exit 75"
    assert ended(run)["reason"] == "it was cancelled, or put back by hand; saved so far: step 10"


def test_who_waits_for_others_goes_on_and_no_node_is_to_blame(question: Question, run: Path) -> None:
    logs = srun_says(run, "srun: error: n1: task 1: Exited with exit code 75\n",
                     "round 2 waits for a policy that round 1 has trained\n")
    for restart in range(2):
        question("begin", restart=restart)
        assert question("end", "--code", "75", *logs, restart=restart) == "requeue"
    assert ended(run)["outcome"] == "stopped" and ended(run)["blamed"] == []
    assert ended(run)["reason"] == "round 2 waits for a policy that round 1 has trained"


def test_a_gate_that_does_not_pass_ends_the_job(question: Question, run: Path) -> None:
    question("begin")
    (run / "stages/1-long").mkdir(parents=True)
    (run / "stages/1-long/gate_failed.json").write_text('{"failure": "needle 40 % at 4096"}')
    assert question("end", "--code", "0") == "exit 3"
    assert ended(run)["reason"] == "needle 40 % at 4096"


def test_a_mistake_ends_the_job_with_the_sentence_of_the_rank(
    question: Question, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    question("begin")
    logs = srun_says(run, "srun: error: n2: task 1: Exited with exit code 2\n",
                     "error: --data x: does not exist\n")
    told: list[str] = []
    monkeypatch.setattr(attempts, "say", told.append)
    assert question("end", "--code", "143", *logs) == "exit 2", (
        "the siblings' 143 hides the code of the first")
    assert told == ["attempt 1: mistake, rank 1 on n2 ended with exit code 2: error: --data x: "
                    "does not exist"]


def test_a_node_that_fails_twice_is_left_out(question: Question, run: Path) -> None:
    logs = srun_says(run, "srun: error: n2: task 1: Killed\n")
    question("begin")
    checkpoint(run, 10)
    assert question("end", "--code", "137", *logs) == "requeue"
    question("begin", restart=1)
    checkpoint(run, 20)
    assert question("end", "--code", "137", *logs, restart=1) == "requeue n2"
    assert question("begin", restart=2) == "requeue n2", "where Slurm gave it again all the same"


def test_a_rank_that_computes_wrongly_takes_its_node_out(question: Question, run: Path) -> None:
    logs = srun_says(run, "srun: error: n1: task 0: Exited with exit code 77\n")
    question("begin")
    (run / "events.jsonl").write_text('{"event": "sdc", "step": 7, "ranks": [1], "hosts": ["n2.site.org"]}\n')
    four = ("--nodes", "n1,n2,n3,n4")
    assert question("end", "--code", "77", *logs, *four) == "requeue n2", "not n1, which only said so first"
    question("begin", restart=1)
    assert question("end", "--code", "77", *logs, restart=1) == "requeue n2", "one of two: nobody knows which"


def test_ranks_that_stood_still_bring_no_strike(question: Question, run: Path) -> None:
    logs = srun_says(run, "srun: error: n1: task 0: Exited with exit code 76\n")
    question("begin")
    assert question("end", "--code", "76", *logs) == "requeue"
    assert (ended(run)["outcome"], ended(run)["blamed"]) == ("hang", [])


def test_failures_without_progress_stop_the_job(question: Question, run: Path) -> None:
    logs = srun_says(run, "srun: error: n2: task 1: Exited with exit code 1\n")
    answers = []
    for restart in range(3):
        question("begin", restart=restart)
        answers.append(question("end", "--code", "1", *logs, "--max-strikes", "9", restart=restart))
    assert answers == ["requeue", "requeue", "exit 1"]


def test_a_job_that_nobody_could_run_any_more_stops_instead_of_waiting_for_ever(question: Question,
                                                                                run: Path) -> None:
    logs = srun_says(run, "srun: error: n2: task 1: Killed\n")
    question("begin")
    assert question("end", "--code", "137", *logs, "--max-strikes", "1", usable="n1,n2") == "exit 1"


def test_a_node_that_went_down_gets_a_strike(question: Question, run: Path) -> None:
    question("begin")
    checkpoint(run, 10)
    assert question("begin", "--down", "n2,n9", restart=1) == "run"
    history = attempts.History(run / "slurm", "7")
    assert history.strikes() == {"n2": 1}
    first = history.attempts[0].end
    assert (first is not None
            and (first["outcome"], first["reason"], first["progress"]) == ("cut_off", "n2 went down", 10))


def test_a_job_that_took_itself_for_cancelled_and_begins_again_was_cut_off(question: Question,
                                                                           run: Path) -> None:
    """Slurm ends the script of a job whose other node died as it ends that of a cancelled one."""
    for restart in (0, 1):
        assert question("begin", "--down", "n2", restart=restart) == "run"
        checkpoint(run, 10 * restart + 10)
        assert question("end", "--code", "0", "--asked", "cancel", restart=restart) == "exit 75"
    assert question("begin", "--down", "n2", restart=2) == "requeue n2", "two strikes"
    reasons = [r["reason"] for r in map(json.loads, (run / "slurm/attempts.jsonl").read_text().splitlines())
               if r["event"] == "end" and r["outcome"] == "cut_off"]
    assert reasons == ["n2 went down"] * 2


def test_a_job_that_is_cut_off_again_and_again_stops(question: Question) -> None:
    assert [question("begin", restart=restart) for restart in range(4)] == ["run", "run", "run", "exit 1"]


@pytest.mark.parametrize(("holder", "queue", "answer", "stays"), [
    ("5", "7 RUNNING\n", "run", False),  # job 5 is gone: its lock is taken away
    ("5", "5 COMPLETING\n7 RUNNING\n", "wait", True),
    ("5", "5 RUNNING\n7 RUNNING\n", "exit 2", True),
    ("5", "", "run", True),  # Slurm did not answer: nothing is concluded, and the lease decides
    ("7", "7 RUNNING\n", "run", True),  # this job's own: the run itself knows that its start before has ended
    ("", "7 RUNNING\n", "run", True),  # not of Slurm: the lease decides
])
def test_another_job_in_the_folder(question: Question, run: Path, holder: str, queue: str, answer: str,
                                   stays: bool) -> None:
    lock: dict[str, Any] = {"host": "n9", "pid": 1, "started_s": 0.0, "beat": 1}
    (run / "lock.json").write_text(
        json.dumps(lock | ({"slurm_job": holder, "slurm_restart": 0} if holder else {})))
    assert question("begin", queue=queue) == answer
    assert (run / "lock.json").exists() is stays


def test_what_cannot_be_answered_ends_the_job(question: Question, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--asked", "nicely"), ("--code", "one"), ("--max-failures", "few")):
        assert question("end", *words) == "exit 2"


def test_no_torch_is_imported() -> None:
    program = "import sys, megatron_sov.slurm.attempts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
