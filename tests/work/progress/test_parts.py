"""Parts that are named by what they depend on: what fits is taken, and another command's are let alone."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.journal import read_job, work_folder
from megatron_sov.work.progress.resumable import begin_parts, open_parts, part_folder


def make(output: Path, keys: list[str], made_by: str = "sov-data pack") -> list[str]:
    """Make parts, and die; return those that were there."""
    with pytest.raises(KeyboardInterrupt), open_parts(output, made_by) as work:
        there = [key for key in keys if part_folder(work, key).is_dir()]
        for key in keys:
            part_folder(work, key).mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt
    return there


def test_what_fits_is_taken_whatever_else_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (make(out, ["ab1", "cd2"]), make(out, ["cd2", "ef3"])) == ([], ["cd2"])
    assert read_job(work_folder(out)) == {"made_by": "sov-data pack", "num_done": 3,
                                          "identity": {"command": "sov-data pack"}}
    begin_parts(out, "sov-data pack")  # for jobs of a cluster
    with open_parts(out, "sov-data pack") as work:
        assert part_folder(work, "ab1").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_command_or_of_an_earlier_version_stay(tmp_path: Path) -> None:
    make(tmp_path / "out", ["ab1"])
    with (pytest.raises(UserError, match=r"out: .* unfinished work of another command: .*inspect .* --clear"
                        r"(.|\n)*command was .sov-data pack., and is .sov-tokenizer train."),
          open_parts(tmp_path / "out", "sov-tokenizer train")):
        raise AssertionError("unreachable")
    (work_folder(tmp_path / "old") / "ab" / "ab1").mkdir(parents=True)
    with (pytest.raises(UserError, match=r"it has .ab., and no job.json tells"),
          open_parts(tmp_path / "old", "sov-data pack")):
        raise AssertionError("unreachable")
    assert make(tmp_path / "out", ["ab1"]) == ["ab1"] and (work_folder(tmp_path / "old") / "ab/ab1").is_dir()


def refused(output: Path) -> str:
    try:
        with open_parts(output, "sov-data pack"):
            return "taken"
    except UserError as e:
        return str(e)


def test_one_process_makes_parts_at_a_time(tmp_path: Path) -> None:
    with open_parts(tmp_path / "out", "sov-data pack"), \
            multiprocessing.get_context("spawn").Pool(1) as other:
        assert "is being written by another process" in other.apply(refused, (tmp_path / "out",))
