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

IDENTITY = {"stop": ("\n",), "sampling": {"top_p": 1.0, "seed": 1}}


class KilledError(BaseException):
    """Ends a command in the middle, as a signal would."""


def write_records(out: Path, *records: tuple[int | str, bytes]) -> bytes:
    """Create the files of a killed command; return the records file."""
    with pytest.raises(KilledError), open_journal(out, "score", IDENTITY) as journal:
        journal.add(records)
        raise KilledError
    return (work_folder(out) / RECORDS).read_bytes() if records else b""


@pytest.mark.each("tail", [b"", b"[2, 1", b"[2, 1, 1]\n{", b"[2, 2, 1]\n{}\n", b"\0" * 40 + b"\n",
                                  b"[2, -1, 0]\n", b"7\n{}\n"])
def test_incomplete_record_is_dropped(tail: bytes, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    write_records(out, (0, b"a\nb\n"), ("key", b""))
    with open(work_folder(out) / RECORDS, "ab") as f:
        f.write(tail)
    assert list_finished_items(out, IDENTITY) == {0, "key"}
    with open_journal(out, "score", IDENTITY) as journal:
        assert journal.done == {0, "key"}
        journal.add([(2, b"c\n"), (0, b"d")])
        assert [*journal.records()] == [(0, b"a\nb\n"), ("key", b""), (2, b"c\n"), (0, b"d")]
        journal.write_payloads(out)
    assert out.read_bytes() == b"a\nb\nc\nd"
    assert os.listdir(tmp_path) == [out.name]


def test_every_prefix_of_journal_is_valid(tmp_path: Path) -> None:
    content = write_records(tmp_path / "a", *((n, b"x" * n) for n in range(9)))
    num_items = []
    for size_bytes in range(len(content) + 1):
        (work_folder(tmp_path / "a") / RECORDS).write_bytes(content[:size_bytes])
        num_items.append(len(list_finished_items(tmp_path / "a", IDENTITY)))
    assert num_items == sorted(num_items) and set(num_items) == set(range(10))


def test_other_identity_is_rejected_unless_redo(tmp_path: Path) -> None:
    out, other = tmp_path / "out", {**IDENTITY, "sampling": {"top_p": 1.0, "seed": 2}}
    write_records(out, (0, b""))
    assert list_finished_items(out, other) == set()
    with pytest.raises(UserError) as raised, open_journal(out, "score", other):
        raise AssertionError("it is refused")
    assert str(raised.value) == (
        f"{out}: {work_folder(out)} holds unfinished work of another command: 1 problem; repeat the same "
        f"command to resume, discard the work (--redo, or megatron-sov inspect {out} --clear), or name "
        "another output\n"
        "  sampling.seed was 1, and is 2")
    assert list_finished_items(out, IDENTITY) == {0}
    with open_journal(out, "score", IDENTITY, redo=True) as journal:  # the same: no work is repeated
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
    with open_journal(tmp_path / "out", "score", IDENTITY) as journal, \
            pytest.raises(UserError, match="is being written by another process"), \
            open_journal(tmp_path / "out", "score", IDENTITY):
        raise AssertionError(journal)
    assert os.listdir(tmp_path) == []


@pytest.mark.each("content", [b"", b"[" * 100_000, b'{"identity": 3}', b"\xff", b"null"])
def test_damaged_job_file_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    write_records(tmp_path / "out", (0, b""))
    (work_folder(tmp_path / "out") / JOB).write_bytes(content)
    assert read_job(work_folder(tmp_path / "out"))["num_done"] == 1
    with (pytest.raises(UserError, match=r"it contains .records. but no readable job\.json, so its command"),
          open_journal(tmp_path / "out", "score", IDENTITY)):
        raise AssertionError("unreachable")
    with open_journal(tmp_path / "out", "score", IDENTITY, redo=True) as journal:
        assert not journal.done


def test_kill_during_deletion_does_not_block_later_work(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def unlink_then_stop(file: Path, missing_ok: bool = False) -> None:
        unlink(file, missing_ok)
        raise KeyboardInterrupt

    for out, identity in ((tmp_path / "ended", IDENTITY), (tmp_path / "redone", {"another": 1})):
        write_records(out, (0, b""))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", unlink_then_stop)
            with open_journal(out, "score", identity, redo=True) as journal:
                assert journal.done == {0}, "another's is emptied before"
        with open_journal(out, "score", {"a third": 1}) as journal:
            assert not journal.done


def build_squares(log: Path, failing_item: int) -> Callable[[int], bytes]:
    """Build an executor for squares that records calls and fails at a given number."""
    def compute_square(item: int) -> bytes:
        if item == failing_item:
            raise UserError("this far")
        time.sleep(0.01 if item % 2 else 0.0)  # they come out of order
        with open(log, "a") as f:
            f.write(f"{item} ")
        return f"{item * item}\n".encode()

    return compute_square


def build_job(folder: Path, do: Executor[int], **more: Callable[..., object]) -> Job[int]:
    return Job(made_by="square", output=folder / "out", identity={"of": "numbers"}, items=range(20), do=do,
               sink=lambda journal: journal.write_payloads(folder / "out"), **more)


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_failed_job_resumes_after_finished_items(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def executor(failing_item: int) -> Executor[int]:
        return worker_executor(build_squares, (log, failing_item),
                               workers) if workers else local_executor(build_squares(log, failing_item))

    with pytest.raises(UserError, match="this far"):
        run_job(build_job(tmp_path, executor(11)))
    known_records: list[tuple[int, bytes]] = []
    done: list[int] = []
    run_job(build_job(tmp_path, executor(-1), known=lambda *it: known_records.append(it), done=done.append))
    assert (tmp_path / "out").read_text() == "".join(f"{n * n}\n" for n in range(20))
    assert known_records == [(n, f"{n * n}\n".encode()) for n in range(11)] and done == [*range(20)]
    assert [n for n in range(11) if log.read_text().split().count(str(n)) != 1] == []
    assert sorted(os.listdir(tmp_path)) == ["log", "out"]


def test_shares_of_processes_form_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job_ = build_job(tmp_path, local_executor(build_squares(log, 7)))
    with pytest.raises(KeyboardInterrupt), open_journal(job_.output, "square", job_.identity):
        for share in range(3):
            with contextlib.suppress(UserError):  # the second fails at 7
                run_share(job_, share, 3)
        raise KeyboardInterrupt  # the command that submits them ends before the output is there
    rest = build_job(tmp_path, local_executor(build_squares(log, -1)))
    run_share(rest, 0, 2)  # the next command cuts it otherwise
    run_job(rest)
    assert (tmp_path / "out").read_text() == "".join(f"{n * n}\n" for n in range(20))
    assert sorted(map(int, log.read_text().split())) == [*range(20)]


def test_items_are_read_lazily(tmp_path: Path) -> None:
    items_read: list[int] = []

    def items() -> Iterator[int]:
        for n in range(100):
            items_read.append(n)
            yield n

    num_ahead = []
    for number, _ in worker_executor(build_squares, (tmp_path / "log", -1), 2)(enumerate(items())):
        num_ahead.append(len(items_read) - number)
    assert max(num_ahead) <= 10
