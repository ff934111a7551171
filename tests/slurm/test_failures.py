"""Which rank failed first, from srun's own words (as Slurm 22.05 writes them)."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.slurm.failures import first_failure, last_lines

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
