"""A job: each item is done once, whatever kills it and wherever it is done."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.jobs import Executor, Job, here, in_workers, run_job, run_share
from megatron_sov.work.progress.journal import open_journal


def squares(log: Path, until: int) -> Callable[[int], bytes]:
    """Return what squares a number, notes that it did, and fails at one."""
    def do(item: int) -> bytes:
        if item == until:
            raise UserError("this far")
        time.sleep(0.01 if item % 2 else 0.0)  # they come out of order
        with open(log, "a") as f:
            f.write(f"{item} ")
        return f"{item * item}\n".encode()

    return do


def job(folder: Path, do: Executor[int], **more: Callable[..., object]) -> Job[int]:
    return Job(made_by="square", output=folder / "out", identity={"of": "numbers"}, items=range(20), do=do,
               sink=lambda journal: journal.write_to(folder / "out"), **more)


@pytest.mark.deep
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_job_that_failed_goes_on_behind_what_is_done(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def executor(until: int) -> Executor[int]:
        return in_workers(squares, (log, until), workers) if workers else here(squares(log, until))

    with pytest.raises(UserError, match="this far"):
        run_job(job(tmp_path, executor(11)))
    kept: list[tuple[int, bytes]] = []
    done: list[int] = []
    run_job(job(tmp_path, executor(-1), known=lambda *it: kept.append(it), done=done.append))
    assert (tmp_path / "out").read_text() == "".join(f"{n * n}\n" for n in range(20))
    assert kept == [(n, f"{n * n}\n".encode()) for n in range(11)] and done == [*range(20)]
    assert [n for n in range(11) if log.read_text().split().count(str(n)) != 1] == []
    assert sorted(os.listdir(tmp_path)) == ["log", "out"]


def test_shares_of_several_processes_become_one_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job_ = job(tmp_path, here(squares(log, 7)))
    with pytest.raises(KeyboardInterrupt), open_journal(job_.output, "square", job_.identity):
        for share in range(3):
            with contextlib.suppress(UserError):  # the second fails at 7
                run_share(job_, share, 3)
        raise KeyboardInterrupt  # the command that submits them ends before the output is there
    rest = job(tmp_path, here(squares(log, -1)))
    run_share(rest, 0, 2)  # the next command cuts it otherwise
    run_job(rest)
    assert (tmp_path / "out").read_text() == "".join(f"{n * n}\n" for n in range(20))
    assert sorted(map(int, log.read_text().split())) == [*range(20)]


def test_items_are_read_as_they_are_needed(tmp_path: Path) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            read.append(n)
            yield n

    waiting = []
    for number, _ in in_workers(squares, (tmp_path / "log", -1), 2)(enumerate(items())):
        waiting.append(len(read) - number)
    assert max(waiting) <= 10
