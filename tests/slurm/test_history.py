"""What follows from the attempts of a job: strikes, failures in a row, progress."""

from __future__ import annotations

from pathlib import Path

import pytest

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
