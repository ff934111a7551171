"""A job: items in, a record for each out, kept as they come, and made into the output when all are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_sov.work.processes.pool import in_processes
from megatron_sov.work.progress.journal import Journal, open_journal, work_folder

Work = TypeVar("Work")
Numbered = Iterable[tuple[int, Work]]
Executor = Callable[[Numbered[Work]], Iterator[tuple[int, bytes]]]
"""Does numbered items; yields the number and record of each, in their order."""


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Work]):
    """What is made of what.

    >>> output = Path("doubled.txt")
    >>> run_job(Job(made_by="a script", output=output, identity={"factor": 2}, items=[1, 2, 3],
    ...             do=lambda items: ((n, f"{2 * item}\\n".encode()) for n, item in items),
    ...             sink=lambda journal: journal.write_to(output)))
    >>> output.read_text().split()
    ['2', '4', '6']
    """

    made_by: str
    """The command, as it is typed."""
    output: Path
    identity: Mapping[str, Any]
    """JSON values that records depend on."""
    items: Iterable[Work]
    """What is done one by one, in order."""
    do: Executor[Work]
    """Makes records of items: `here`, `in_workers`, or one of the job's own."""
    sink: Callable[[Journal], None]
    """Makes the output of all records."""
    known: Callable[[Work, bytes], object] = lambda item, record: None
    """Is told each item that an earlier command has done, and its record."""
    done: Callable[[Work], object] = lambda item: None
    """Is told each item that is done, now or before."""


def run_job(job: Job[Work], *, redo: bool = False) -> None:
    """Do what is not done, and make the output; a killed job goes on where it was.

    Raises:
        UserError: another process works on it, other work on the output is unfinished, or as its parts do.
    """
    with open_journal(job.output, job.made_by, job.identity, redo=redo) as journal:
        # records are in the order of items, so that one walk serves all that are done
        before = journal.records()
        under_way: deque[Work] = deque()

        def open_items() -> Iterator[tuple[int, Work]]:
            for number, item in enumerate(job.items):
                if number in journal.done:
                    job.known(item, next(before)[1])
                    job.done(item)
                else:
                    # `do` yields in order: the oldest that was given is the next that comes back
                    under_way.append(item)
                    yield number, item

        for number, record in job.do(open_items()):
            # on record before it is reported as done
            journal.add([(number, record)])
            job.done(under_way.popleft())
        job.sink(journal)


def run_share(job: Job[Work], share: int, num_shares: int) -> None:
    """Do what is not done of a share of a job's items, beside other processes, on whatever machines, that do
    theirs; who has begun the job's journal makes the output, by `run_job`."""
    # a name for each cut, so that the items of a file rise
    journal = Journal(work_folder(job.output), f"{share}-of-{num_shares}")
    mine = ((number, item) for number, item in enumerate(job.items)
            if number % num_shares == share and number not in journal.done)
    try:
        for number, record in job.do(mine):
            journal.add([(number, record)])
    finally:
        journal.close()


def here(do: Callable[[Work], bytes]) -> Executor[Work]:
    """Return what does items in this process, one after the other."""
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        for number, item in items:
            yield number, do(item)

    return execute


def in_workers(build: Callable[..., Callable[[Work], bytes]], arguments: tuple[Any, ...], workers: int
               ) -> Executor[Work]:
    """Return what does items in processes of this machine, see `pool.WorkerPool`."""
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        numbers: deque[int] = deque()

        def given() -> Iterator[Work]:
            for number, item in items:
                numbers.append(number)
                yield item

        for record in in_processes(build, arguments, given(), workers):
            yield numbers.popleft(), record

    return execute
