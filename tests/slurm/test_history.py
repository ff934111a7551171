"""What follows from the attempts of a job: strikes, failures in a row, progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.clusters import client
from megatron_sov.clusters.client import environment_outside_jobs
from megatron_sov.errors import UserError
from megatron_sov.slurm.attempts import first_failure, last_lines
from megatron_sov.slurm.history import History, progress_of


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path, "7")


def attempt(history: History, before: int, after: int, **found: list[str]) -> None:
    restart = len(history.attempts)
    history.begin(restart, ["n1", "n2"], before)
    history.end(restart, "crash", "why", after, **found)


def test_failures_in_a_row_begin_anew_with_progress(history: History) -> None:
    attempt(history, 0, 0)
    attempt(history, 0, 0)
    assert history.failures_in_a_row() == 2
    attempt(history, 0, 10)
    assert history.failures_in_a_row() == 0
    attempt(history, 10, 10)
    assert history.failures_in_a_row() == 1


def test_an_attempt_that_found_a_sick_node_does_not_count_as_a_failure(history: History) -> None:
    attempt(history, 0, 0)
    attempt(history, 0, 0, sick=["n1"])
    assert (history.failures_in_a_row(), history.excluded(2)) == (1, ["n1"])


def test_a_node_is_excluded_after_its_last_strike(history: History) -> None:
    attempt(history, 0, 5, blamed=["n2"])
    assert history.excluded(2) == []
    attempt(history, 5, 9, blamed=["n2"])
    assert history.excluded(2) == ["n2"] and history.strikes() == {"n2": 2}


def test_an_attempt_without_an_end_was_cut_off(history: History) -> None:
    attempt(history, 0, 5)
    history.begin(1, ["n1", "n3"], 5)
    found = history.cut_off(2)
    assert found is not None and found.nodes == ("n1", "n3")
    assert history.cut_off(1) is None, "the one before that one has ended"
    history.end(1, "cut_off", "n3 went down", 5)
    assert history.cut_off(2) is None


def test_a_new_job_begins_with_a_clean_record(history: History, tmp_path: Path) -> None:
    attempt(history, 0, 0, blamed=["n1"])
    later = History(tmp_path, "8")
    assert later.attempts == [] and not later.strikes()
    assert len(History(tmp_path, "7").attempts) == 1, "what was written is read again"


def test_progress_grows_with_checkpoints_of_all_stages_and_with_unfinished_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert progress_of(run) == 0
    for name in ("checkpoints/step-20", "checkpoints/step-100", "checkpoints/.writing-step-200",
                 "stages/1-long/checkpoints/step-7"):
        (run / name).mkdir(parents=True)
    assert progress_of(run) == 107
    (tmp_path / ".run.units").mkdir()
    (tmp_path / ".run.units/0.bin").write_text("")
    assert progress_of(run) == 108


def test_the_parts_of_a_rollout_store_are_progress(tmp_path: Path) -> None:
    for part in ("rollouts/round-0001-piece-0000", "rollouts/round-0001-piece-0001",
                 "rewards/0123456789ab/round-0001-piece-0000"):
        (tmp_path / "store" / part).mkdir(parents=True)
        (tmp_path / "store" / part / "manifest.json").write_text("{}")
    assert progress_of(tmp_path / "store") == 3


# Which rank failed first, from srun's own words (as Slurm 22.05 writes them).


KILLED = """srun: error: n3: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=7.0
slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-20T14:35:39 ***
srun: error: n1: task 0: Exited with exit code 1
"""


@pytest.mark.parametrize(("log", "sentence", "code"), [
    (KILLED, "rank 2 on n3 was ended by a signal (Killed)", None),
    ("srun: error: n2: tasks 8-15: Exited with exit code 2\n", "rank 8 on n2 ended with exit code 2", 2),
    ("srun: error: gpu-a[01]: task 1: Exited with exit code 9\nsrun: error: n1: tasks 0,3: Terminated\n",
     "rank 1 on gpu-a[01] ended with exit code 9", 9),
    ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 5: Exited with exit code 2\n",
     "rank 5 on n2 ended with exit code 2", 2),
    ("srun: error: n2: task 4: Segmentation fault (core dumped)\n", "rank 4 on n2 was ended by a signal "
     "(Segmentation fault (core dumped))", None),
])
def test_the_first_to_fail_is_named(log: str, sentence: str, code: int | None) -> None:
    failure = first_failure(log)
    assert failure is not None
    assert (str(failure), failure.exit_code) == (sentence, code)


def test_other_words_of_srun_are_no_failure() -> None:
    assert first_failure("srun: Job step aborted: Waiting up to 4 seconds for job step to finish.\n"
                         "srun: got SIGCONT\n") is None


def test_the_end_of_a_log_shows_what_a_progress_bar_showed_last(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("".join(f"line {i}\n" for i in range(30)) + "step 1\rstep 2\rstep 3\nerror: full\n")
    shown = last_lines(log).splitlines()
    assert shown[-2:] == ["    step 3", "    error: full"] and len(shown) == 15
    assert last_lines(tmp_path / "none.log") == ""


# What Slurm's programs say, in one line, and the jobs that are still in its hands.


@pytest.mark.parametrize(("text", "said"), [
    ("sbatch: error: invalid partition specified: x\n"
     "sbatch: error: Batch job submission failed: Invalid partition\n",
     "invalid partition specified: x; Batch job submission failed: Invalid partition"),
    ("allocation failure: Requested node configuration is not available\n",
     "allocation failure: Requested node configuration is not available"),
    ("sbatch: error: a\nsbatch: error: a\n", "a"),
    ("", "it gives no reason"),
])
def test_the_reason_is_one_line(text: str, said: str) -> None:
    assert client.reason(text) == said


def test_neither_the_shell_nor_its_allocation_overrules_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_ACCOUNT", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_CONF", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "x")
    kept = environment_outside_jobs()
    assert {"SLURM_CONF", "WANDB_API_KEY"} <= set(kept)
    assert not {"SBATCH_ACCOUNT", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID"} & set(kept)


def test_only_living_jobs_have_a_state(site: Path, cluster: Any) -> None:
    held = cluster.sbatch("--hold", "--output=/dev/null", "--wrap=true")
    ended = cluster.sbatch("--output=/dev/null", "--wrap=true")
    cluster.wait(ended)
    assert client.states([held, ended, "999999"]) == {held: "PENDING"}
    client.cancel([held])
    assert client.states([held]) == {}
    assert client.states([]) == {}


def test_a_job_after_one_that_failed_is_taken_away(site: Path, cluster: Any) -> None:
    failing = cluster.sbatch("--hold", "--output=/dev/null", "--wrap=exit 3")
    (site / "next.sh").write_text("#!/bin/bash\n#SBATCH --output=/dev/null\ntrue\n")
    follower = client.submit(site / "next.sh", after=[failing])
    cluster.run("scontrol", "release", failing)
    assert cluster.wait(follower)["JobState"] == "CANCELLED"
    with pytest.raises(UserError, match=r"Slurm refuses .*: Unable to open file"):
        client.submit(site / "none.sh", after=[])
