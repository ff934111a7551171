"""Answers of attempts.py to a job script: what to do when an attempt starts or ends in a certain way."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.operate.slurm import attempts
from megatron_sov.operate.slurm.attempts import (
    AttemptHistory, find_first_failure, measure_progress, read_last_lines)
from tests.operate.slurm.test_preflight import LIMITS, SOUND

Question = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder without checkpoints."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


@pytest.fixture
def question(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Question:
    """A function `(action, *words, restart=0, queue=..., usable=...)` that asks attempts.py as job 7 on nodes
    n1 and n2 does, and returns its answer. `queue` is the output of squeue."""

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


def get_last_record(run: Path) -> dict[str, Any]:
    """Return the last line of the run's attempts.jsonl."""
    return dict(json.loads((run / "slurm/attempts.jsonl").read_text().splitlines()[-1]))


def add_checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoints/step-{step}").mkdir()


def write_logs(run: Path, text: str, rank_log: str = "") -> tuple[str, ...]:
    """Write the output of srun and the log of rank 1; return the option that names their folder."""
    (run / "srun.log").write_text(text)
    (run / "rank-1.log").write_text(rank_log)
    return "--logs", str(run)


def test_a_first_attempt_runs(question: Question, run: Path) -> None:
    assert question("begin") == "run"
    assert get_last_record(run) | {"time_s": 0} == {"event": "begin", "time_s": 0, "job": "7", "restart": 0,
                                                    "nodes": ["n1", "n2"], "progress": 0}


def test_a_complete_stage_ends_the_job(question: Question, run: Path) -> None:
    question("begin")
    (run / "complete.json").write_text("{}")
    assert question("end", "--code", "0") == "exit 0"
    assert question("begin", restart=1) == "exit 0", "nothing is left to do in a second attempt"


def test_an_exit_code_alone_does_not_make_a_stage_complete(question: Question, run: Path) -> None:
    question("begin")
    add_checkpoint(run, 10)
    assert question("end", "--code", "0") == "requeue"
    assert get_last_record(run)["outcome"] == "stopped"


@pytest.mark.parametrize(("code", "says", "rank_log", "answer", "record"), [
    ("3", "srun: error: n2: task 1: Exited with exit code 3\n", "NOT verified: see above\n", "exit 3",
     {"outcome": "gate", "reason": "NOT verified: see above", "blamed": []}),
    ("76", "srun: error: n1: task 0: Exited with exit code 76\n", "", "requeue",
     {"outcome": "hang", "blamed": []})])
def test_a_failed_gate_and_a_hang_blame_no_node(question: Question, run: Path, code: str, says: str,
                                                rank_log: str, answer: str, record: dict[str, Any]) -> None:
    question("begin")
    assert question("end", "--code", code, *write_logs(run, says, rank_log)) == answer
    assert get_last_record(run).items() >= record.items()


def test_the_time_limit_puts_the_job_back_and_a_cancellation_does_not(question: Question, run: Path) -> None:
    question("begin")
    add_checkpoint(run, 10)
    assert question("end", "--code", "0", "--asked", "limit") == "requeue"
    assert get_last_record(run)["reason"] == "its time limit came near; saved so far: step 10"
    question("begin", restart=1)
    assert question("end", "--code", "0", "--asked", "cancel", restart=1) == "exit 75"
    assert get_last_record(run)["reason"] == "it was cancelled, or put back by hand; saved so far: step 10"


def test_waiting_for_other_jobs_requeues_without_blame(question: Question, run: Path) -> None:
    logs = write_logs(run, "srun: error: n1: task 1: Exited with exit code 75\n",
                      "round 2 waits for a policy that round 1 has trained\n")
    for restart in range(2):
        question("begin", restart=restart)
        assert question("end", "--code", "75", *logs, restart=restart) == "requeue"
    assert get_last_record(run)["outcome"] == "stopped" and get_last_record(run)["blamed"] == []
    assert get_last_record(run)["reason"] == "round 2 waits for a policy that round 1 has trained"


def test_a_gate_that_does_not_pass_ends_the_job(question: Question, run: Path) -> None:
    question("begin")
    (run / "stages/1-long").mkdir(parents=True)
    (run / "stages/1-long/gate_failed.json").write_text('{"failure": "needle 40 % at 4096"}')
    assert question("end", "--code", "0") == "exit 3"
    assert get_last_record(run)["reason"] == "needle 40 % at 4096"


def test_a_mistake_ends_the_job_with_the_sentence_of_the_rank(question: Question, run: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    question("begin")
    logs = write_logs(run, "srun: error: n2: task 1: Exited with exit code 2\n",
                      "error: --data x: does not exist\n")
    messages: list[str] = []
    monkeypatch.setattr(attempts, "log_message", messages.append)
    assert question("end", "--code", "143", *logs) == "exit 2", (
        "143 is the code of ranks ended after the first, which ended with 2")
    assert messages == ["attempt 1: mistake, rank 1 on n2 ended with exit code 2: error: --data x: "
                        "does not exist"]


def test_a_node_that_fails_twice_is_excluded(question: Question, run: Path) -> None:
    logs = write_logs(run, "srun: error: n2: task 1: Killed\n")
    question("begin")
    add_checkpoint(run, 10)
    assert question("end", "--code", "137", *logs) == "requeue"
    question("begin", restart=1)
    add_checkpoint(run, 20)
    assert question("end", "--code", "137", *logs, restart=1) == "requeue n2"
    assert question("begin", restart=2) == "requeue n2", "Slurm assigned the excluded node again"


def test_a_node_that_fails_preflight_is_excluded(question: Question, run: Path) -> None:
    question("begin")
    (run / "rank-0.json").write_text(json.dumps(asdict(SOUND)))  # of n1
    assert question("preflight", "--reports", str(run), "--limits", json.dumps(LIMITS)) == "requeue n2"


def test_a_rank_that_computes_wrongly_takes_its_node_out(question: Question, run: Path) -> None:
    logs = write_logs(run, "srun: error: n1: task 0: Exited with exit code 77\n")
    question("begin")
    (run / "events.jsonl").write_text('{"event": "sdc", "step": 7, "ranks": [1], "hosts": ["n2.site.org"]}\n')
    four = ("--nodes", "n1,n2,n3,n4")
    assert question("end", "--code", "77", *logs, *four) == "requeue n2", "not n1, which ended first"
    question("begin", restart=1)
    assert question("end", "--code", "77", *logs, restart=1) == "requeue n2", "n1 stays in the job"


def test_failures_without_progress_stop_the_job(question: Question, run: Path) -> None:
    logs = write_logs(run, "srun: error: n2: task 1: Exited with exit code 1\n")
    answers = []
    for restart in range(3):
        question("begin", restart=restart)
        answers.append(question("end", "--code", "1", *logs, "--max-strikes", "9", restart=restart))
    assert answers == ["requeue", "requeue", "exit 1"]


def test_a_job_without_usable_nodes_stops(question: Question, run: Path) -> None:
    logs = write_logs(run, "srun: error: n2: task 1: Killed\n")
    question("begin")
    assert question("end", "--code", "137", *logs, "--max-strikes", "1", usable="n1,n2") == "exit 1"


def test_a_node_that_went_down_gets_a_strike(question: Question, run: Path) -> None:
    question("begin")
    add_checkpoint(run, 10)
    assert question("begin", "--down", "n2,n9", restart=1) == "run"
    history = AttemptHistory(run / "slurm", "7")
    assert history.count_strikes() == {"n2": 1}
    end = history.attempts[0].end
    assert end is not None
    assert (end["outcome"], end["reason"], end["progress"]) == ("cut_off", "n2 went down", 10)


def test_a_restarted_cancelled_attempt_counts_as_cut_off(question: Question, run: Path) -> None:
    """If another node of a job dies, Slurm ends the script in the same way as a cancelled job."""
    for restart in (0, 1):
        assert question("begin", "--down", "n2", restart=restart) == "run"
        add_checkpoint(run, 10 * restart + 10)
        assert question("end", "--code", "0", "--asked", "cancel", restart=restart) == "exit 75"
    assert question("begin", "--down", "n2", restart=2) == "requeue n2", "two strikes"
    reasons = [r["reason"] for r in map(json.loads, (run / "slurm/attempts.jsonl").read_text().splitlines())
               if r["event"] == "end" and r["outcome"] == "cut_off"]
    assert reasons == ["n2 went down"] * 2


def test_a_repeatedly_cut_off_job_stops(question: Question) -> None:
    assert [question("begin", restart=restart) for restart in range(4)] == ["run", "run", "run", "exit 1"]


@pytest.mark.parametrize(("holder", "queue", "answer", "lock_stays"), [
    ("5", "7 RUNNING\n", "run", False),  # job 5 has ended: its lock is removed
    ("5", "5 COMPLETING\n7 RUNNING\n", "wait", True),
    ("5", "5 RUNNING\n7 RUNNING\n", "exit 2", True),
    ("5", "", "run", True),  # Slurm did not answer: the lock's lease decides
    ("7", "7 RUNNING\n", "run", True),  # the lock of this job's earlier attempt, which the run takes over
    ("", "7 RUNNING\n", "run", True),  # not of a Slurm job: the lock's lease decides
])
def test_another_job_in_the_folder(question: Question, run: Path, holder: str, queue: str, answer: str,
                                   lock_stays: bool) -> None:
    lock: dict[str, Any] = {"host": "n9", "pid": 1, "started_s": 0.0, "beat": 1}
    (run / "lock.json").write_text(
        json.dumps(lock | ({"slurm_job": holder, "slurm_restart": 0} if holder else {})))
    assert question("begin", queue=queue) == answer
    assert (run / "lock.json").exists() is lock_stays


def test_invalid_attempt_arguments_end_the_job(question: Question) -> None:
    for words in (("--asked", "nicely"), ("--code", "one"), ("--max-failures", "few")):
        assert question("end", *words) == "exit 2"


def test_no_torch_is_imported() -> None:
    program = "import sys, megatron_sov.operate.slurm.attempts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# The history of attempts: strikes against nodes, failures in a row, progress.

@pytest.fixture
def history(tmp_path: Path) -> AttemptHistory:
    """The empty history of job 7."""
    return AttemptHistory(tmp_path, "7")


def add_crash(history: AttemptHistory, before: int, after: int, **nodes: list[str]) -> None:
    """Record an attempt that crashed, its progress before and after, and "blamed" or "sick" nodes."""
    restart = len(history.attempts)
    history.record_begin(restart, ["n1", "n2"], before)
    history.record_end(restart, "crash", "why", after, **nodes)


def test_progress_resets_the_failure_count(history: AttemptHistory) -> None:
    add_crash(history, 0, 0)
    add_crash(history, 0, 0)
    assert history.count_failures() == 2
    add_crash(history, 0, 10)
    assert history.count_failures() == 0
    add_crash(history, 10, 10)
    assert history.count_failures() == 1


def test_a_sick_node_does_not_count_as_failure(history: AttemptHistory) -> None:
    add_crash(history, 0, 0)
    add_crash(history, 0, 0, sick=["n1"])
    assert (history.count_failures(), history.list_excluded(2)) == (1, ["n1"])


def test_a_new_job_begins_with_a_clean_record(history: AttemptHistory, tmp_path: Path) -> None:
    add_crash(history, 0, 0, blamed=["n1"])
    later = AttemptHistory(tmp_path, "8")
    assert later.attempts == [] and not later.count_strikes()
    assert len(AttemptHistory(tmp_path, "7").attempts) == 1, "attempts are read from the file"


def test_progress_grows_with_checkpoints_of_all_stages_and_with_unfinished_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert measure_progress(run) == 0
    for name in ("checkpoints/step-20", "checkpoints/step-100", "checkpoints/.writing-step-200",
                 "stages/1-long/checkpoints/step-7", "rounds/0001"):
        (run / name).mkdir(parents=True)
    assert measure_progress(run) == 100 + 7  # the highest step of each stage
    (run / "rounds/0001/manifest.json").write_text("{}")  # a published round counts one
    assert measure_progress(run) == 108
    (tmp_path / ".run.units").mkdir()
    (tmp_path / ".run.units/0.bin").write_text("")
    assert measure_progress(run) == 109


def test_the_parts_of_a_rollout_store_are_progress(tmp_path: Path) -> None:
    for part in ("rollouts/round-0001-piece-0000", "rollouts/round-0001-piece-0001",
                 "rewards/0123456789ab/round-0001-piece-0000"):
        (tmp_path / "store" / part).mkdir(parents=True)
        (tmp_path / "store" / part / "manifest.json").write_text("{}")
    assert measure_progress(tmp_path / "store") == 3


# The rank that failed first, read from the output of srun of Slurm 22.05.

KILLED = """srun: error: n3: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-20T14:35:39 ***
srun: error: n1: task 0: Exited with exit code 1
"""


@pytest.mark.each(("log", "message", "code"), [
    (KILLED, "rank 2 on n3 was ended by a signal (Killed)", None),
    ("srun: error: n2: tasks 8-15: Exited with exit code 2\n", "rank 8 on n2 ended with exit code 2", 2),
    ("srun: error: gpu-a[01]: task 1: Exited with exit code 9\nsrun: error: n1: tasks 0,3: Terminated\n",
     "rank 1 on gpu-a[01] ended with exit code 9", 9),
    ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 5: Exited with exit code 2\n",
     "rank 5 on n2 ended with exit code 2", 2),
    ("srun: error: n2: task 4: Segmentation fault (core dumped)\n", "rank 4 on n2 was ended by a signal "
     "(Segmentation fault (core dumped))", None),
])
def test_the_first_to_fail_is_named(log: str, message: str, code: int | None) -> None:
    failure = find_first_failure(log)
    assert failure is not None
    assert (str(failure), failure.exit_code) == (message, code)


def test_other_output_of_srun_is_not_a_failure() -> None:
    output = "srun: Job step aborted: Waiting up to 4 seconds for job step to finish.\nsrun: got SIGCONT\n"
    assert find_first_failure(output) is None


def test_log_tail_shows_the_last_state_of_a_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("".join(f"line {i}\n" for i in range(30)) + "step 1\rstep 2\rstep 3\nerror: full\n")
    lines = read_last_lines(log).splitlines()
    assert lines[-2:] == ["    step 3", "    error: full"] and len(lines) == 15
    assert read_last_lines(tmp_path / "none.log") == ""
