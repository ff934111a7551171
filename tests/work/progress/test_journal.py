"""Complete records survive kills; unfinished work of other commands is refused."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.jobs import Executor, Job, local_executor, run_job, run_share, worker_executor
from megatron_sov.work.progress.journal import (
    JOB, RECORDS, list_finished_items, open_journal, read_job, work_folder)

ASKED = {"stop": ("\n",), "sampling": {"top_p": 1.0, "seed": 1}}


class _Killed(BaseException):
    """Ends a command in the middle, as a signal would."""


def write_records(out: Path, *records: tuple[int | str, bytes]) -> bytes:
    """Create the files of a killed command; return the records file."""
    with pytest.raises(_Killed), open_journal(out, "score", ASKED) as journal:
        journal.add(records)
        raise _Killed
    return (work_folder(out) / RECORDS).read_bytes() if records else b""


@pytest.mark.each("torn", [b"", b"[2, 1", b"[2, 1, 1]\n{", b"[2, 2, 1]\n{}\n", b"\0" * 40 + b"\n",
                                  b"[2, -1, 0]\n", b"7\n{}\n"])
def test_incomplete_record_is_dropped(torn: bytes, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    write_records(out, (0, b"a\nb\n"), ("key", b""))
    with open(work_folder(out) / RECORDS, "ab") as f:
        f.write(torn)
    assert list_finished_items(out, ASKED) == {0, "key"}
    with open_journal(out, "score", ASKED) as journal:
        assert journal.done == {0, "key"}
        journal.add([(2, b"c\n"), (0, b"d")])
        assert [*journal.records()] == [(0, b"a\nb\n"), ("key", b""), (2, b"c\n"), (0, b"d")]
        journal.write_payloads(out)
    assert out.read_bytes() == b"a\nb\nc\nd"
    assert os.listdir(tmp_path) == [out.name]


def test_every_prefix_of_journal_is_valid(tmp_path: Path) -> None:
    whole = write_records(tmp_path / "a", *((n, b"x" * n) for n in range(9)))
    found = []
    for size_bytes in range(len(whole) + 1):
        (work_folder(tmp_path / "a") / RECORDS).write_bytes(whole[:size_bytes])
        found.append(len(list_finished_items(tmp_path / "a", ASKED)))
    assert found == sorted(found) and set(found) == set(range(10))


def test_other_identity_is_rejected_unless_redo(tmp_path: Path) -> None:
    out, other = tmp_path / "out", {**ASKED, "sampling": {"top_p": 1.0, "seed": 2}}
    write_records(out, (0, b""))
    assert list_finished_items(out, other) == set()
    with pytest.raises(UserError) as raised, open_journal(out, "score", other):
        raise AssertionError("it is refused")
    assert str(raised.value) == (
        f"{out}: {work_folder(out)} holds unfinished work of another command: 1 problem; repeat the same "
        f"command to resume, discard the work (--redo, or megatron-sov inspect {out} --clear), or name "
        "another output\n"
        "  sampling.seed was 1, and is 2")
    assert list_finished_items(out, ASKED) == {0}
    with open_journal(out, "score", ASKED, redo=True) as journal:  # the same: no work is repeated
        assert journal.done == {0}
    write_records(out, (0, b""))
    with open_journal(out, "score", other, redo=True) as journal:
        assert journal.done == set()
    with pytest.raises(ValueError, match="closed"):
        journal.add([(0, b"")])


def test_journal_without_records_accepts_other_identity(tmp_path: Path) -> None:
    write_records(tmp_path / "out")
    assert not work_folder(tmp_path / "out").exists()
    work_folder(tmp_path / "out").mkdir()
    (work_folder(tmp_path / "out") / JOB).write_text(json.dumps({"identity": {"a": 1}}))
    with open_journal(tmp_path / "out", "score", ASKED) as journal, \
            pytest.raises(UserError, match="is being written by another process"), \
            open_journal(tmp_path / "out", "score", ASKED):
        raise AssertionError(journal)
    assert os.listdir(tmp_path) == []


@pytest.mark.each("content", [b"", b"[" * 100_000, b'{"identity": 3}', b"\xff", b"null"])
def test_damaged_job_file_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    write_records(tmp_path / "out", (0, b""))
    (work_folder(tmp_path / "out") / JOB).write_bytes(content)
    assert read_job(work_folder(tmp_path / "out"))["num_done"] == 1
    with (pytest.raises(UserError, match=r"it contains .records. but no readable job\.json, so its command"),
          open_journal(tmp_path / "out", "score", ASKED)):
        raise AssertionError("unreachable")
    with open_journal(tmp_path / "out", "score", ASKED, redo=True) as journal:
        assert not journal.done


def test_kill_during_deletion_does_not_block_later_work(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def killed(file: Path, missing_ok: bool = False) -> None:
        unlink(file, missing_ok)
        raise KeyboardInterrupt

    for out, asked in ((tmp_path / "ended", ASKED), (tmp_path / "redone", {"another": 1})):
        write_records(out, (0, b""))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", killed)
            with open_journal(out, "score", asked, redo=True) as journal:
                assert journal.done == {0}, "another's is emptied before"
        with open_journal(out, "score", {"a third": 1}) as journal:
            assert not journal.done


def build_squares(log: Path, until: int) -> Callable[[int], bytes]:
    """Build an executor for squares that records calls and fails at a given number."""
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
               sink=lambda journal: journal.write_payloads(folder / "out"), **more)


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_failed_job_resumes_after_finished_items(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def executor(until: int) -> Executor[int]:
        return worker_executor(build_squares, (log, until),
                               workers) if workers else local_executor(build_squares(log, until))

    with pytest.raises(UserError, match="this far"):
        run_job(job(tmp_path, executor(11)))
    kept: list[tuple[int, bytes]] = []
    done: list[int] = []
    run_job(job(tmp_path, executor(-1), known=lambda *it: kept.append(it), done=done.append))
    assert (tmp_path / "out").read_text() == "".join(f"{n * n}\n" for n in range(20))
    assert kept == [(n, f"{n * n}\n".encode()) for n in range(11)] and done == [*range(20)]
    assert [n for n in range(11) if log.read_text().split().count(str(n)) != 1] == []
    assert sorted(os.listdir(tmp_path)) == ["log", "out"]


def test_shares_of_processes_form_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job_ = job(tmp_path, local_executor(build_squares(log, 7)))
    with pytest.raises(KeyboardInterrupt), open_journal(job_.output, "square", job_.identity):
        for share in range(3):
            with contextlib.suppress(UserError):  # the second fails at 7
                run_share(job_, share, 3)
        raise KeyboardInterrupt  # the command that submits them ends before the output is there
    rest = job(tmp_path, local_executor(build_squares(log, -1)))
    run_share(rest, 0, 2)  # the next command cuts it otherwise
    run_job(rest)
    assert (tmp_path / "out").read_text() == "".join(f"{n * n}\n" for n in range(20))
    assert sorted(map(int, log.read_text().split())) == [*range(20)]


def test_items_are_read_lazily(tmp_path: Path) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            read.append(n)
            yield n

    waiting = []
    for number, _ in worker_executor(build_squares, (tmp_path / "log", -1), 2)(enumerate(items())):
        waiting.append(len(read) - number)
    assert max(waiting) <= 10
