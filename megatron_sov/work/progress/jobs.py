"""Resumable jobs: execute items, journal a record per item, and build the output from all records."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_sov.work.processes.pool import map_in_processes
from megatron_sov.work.progress.journal import Journal, open_journal, work_folder

Work = TypeVar("Work")
Numbered = Iterable[tuple[int, Work]]
Executor = Callable[[Numbered[Work]], Iterator[tuple[int, bytes]]]
"""Executes numbered items; yields (number, record) in the same order."""


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Work]):
    """Items, their executor, and the output built from the records.

    >>> output = Path("doubled.txt")
    >>> run_job(Job(made_by="a script", output=output, identity={"factor": 2}, items=[1, 2, 3],
    ...             do=lambda items: ((n, f"{2 * item}\\n".encode()) for n, item in items),
    ...             sink=lambda journal: journal.write_payloads(output)))
    >>> output.read_text().split()
    ['2', '4', '6']
    """

    made_by: str
    """The command line, for messages."""
    output: Path
    identity: Mapping[str, Any]
    """JSON values that determine the records; a journal with different values is refused."""
    items: Iterable[Work]
    """Items in order."""
    do: Executor[Work]
    """Computes records from items: `local_executor`, `worker_executor` or a custom executor."""
    sink: Callable[[Journal], None]
    """Writes the output from all records."""
    known: Callable[[Work, bytes], object] = lambda item, record: None
    """Called with each item and record from an earlier command."""
    done: Callable[[Work], object] = lambda item: None
    """Called with each completed item, including items from earlier commands."""


def run_job(job: Job[Work], *, redo: bool = False) -> None:
    """Execute unfinished items and write the output; a killed job resumes after its last record. Raises
    `UserError`: another process holds the journal, or it belongs to another command."""
    with open_journal(job.output, job.made_by, job.identity, redo=redo) as journal:
        # Records are in item order: a single pass over the items reads the whole journal.
        old_records = journal.records()
        pending: deque[Work] = deque()

        def open_items() -> Iterator[tuple[int, Work]]:
            for number, item in enumerate(job.items):
                if number in journal.done:
                    job.known(item, next(old_records)[1])
                    job.done(item)
                else:
                    # `do` yields in order: its next record belongs to the oldest item
                    pending.append(item)
                    yield number, item

        for number, record in job.do(open_items()):
            # write the record before reporting the item
            journal.add([(number, record)])
            job.done(pending.popleft())
        job.sink(journal)


def run_share(job: Job[Work], share: int, num_shares: int) -> None:
    """Execute every `num_shares`-th unfinished item; other processes run the remaining shares.

    The process that began the journal builds the output with `run_job`.
    """
    # a file per partition, with ascending item numbers
    journal = Journal(work_folder(job.output), f"{share}-of-{num_shares}")
    share_items = ((number, item) for number, item in enumerate(job.items)
                   if number % num_shares == share and number not in journal.done)
    try:
        for number, record in job.do(share_items):
            journal.add([(number, record)])
    finally:
        journal.close()


def local_executor(do: Callable[[Work], bytes]) -> Executor[Work]:
    """Return an executor for the current process."""
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        for number, item in items:
            yield number, do(item)

    return execute


def worker_executor(build: Callable[..., Callable[[Work], bytes]], arguments: tuple[Any, ...], workers: int
                    ) -> Executor[Work]:
    """Return an executor with local worker processes, see `pool.WorkerPool`."""
    def execute(items: Numbered[Work]) -> Iterator[tuple[int, bytes]]:
        numbers: deque[int] = deque()

        def given() -> Iterator[Work]:
            for number, item in items:
                numbers.append(number)
                yield item

        for record in map_in_processes(build, arguments, given(), workers):
            yield numbers.popleft(), record

    return execute
