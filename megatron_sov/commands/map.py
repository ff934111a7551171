"""`megatron-sov map ROWS FILE.py:STEP --output DIR`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.artifacts import (
    MANIFEST, check_output_folder, create_artifact, format_json, read_manifest)
from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents.rows import check_rows, format_json_line, parse_row, read_lines
from megatron_sov.base.errors import UserError, format_error
from megatron_sov.base.plugins import registry
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import PluginRequest, Registry, check_methods
from megatron_sov.base.settings import (
    AtLeastOne, DeclaredCommand, Flag, NotNegative, ProblemCode, SettingsProblem, count_cores, parse_nested,
    requires_field)
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.work.processes.pool import map_in_threads
from megatron_sov.work.progress.jobs import Executor, Job, run_job, run_share, worker_executor
from megatron_sov.work.progress.journal import Journal, begin_journal, list_finished_items, slurm_folder
from megatron_sov.work.progress.progress_bar import create_bar
from megatron_sov.work.submit.arrays import (
    ClusterOptions, SharedWork, check_no_active_jobs, check_restarts, load_array_profile, submit_shares)
from megatron_sov.work.submit.ray_executor import ray_executor

KIND, ROWS, FAILED = "rows", "rows.jsonl", "failed.jsonl"
BATCH_ROWS = 64
"""Rows per journal record; a kill loses at most `pool.WAITING_PER_WORKER` batches per process."""
SHARES = "map"
Batch = list[tuple[int, bytes]]
"""(line number, unparsed line) pairs."""


@dataclass(frozen=True, kw_only=True)
class MapOptions(RedoOptions, OverwriteOptions, ClusterOptions):
    """Apply your own class to the rows in a JSONL file, locally or on Slurm. Repeat the command to continue
    after a kill."""

    rows: Annotated[Path, Flag("ROWS")]
    """JSONL file with one object per line, or a folder from an earlier `map`."""
    step: Annotated[str, Flag("FILE.py:STEP")]
    """Your class. Its method `do(row)` returns a row, a list of rows, or None to drop the row."""
    output: Annotated[Path, Flag(value="DIR")]
    """Output folder: rows.jsonl, in input order."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Constructor argument for the class; may be repeated."""
    workers: AtLeastOne = field(default_factory=count_cores)
    """Worker processes (default: one per core). With --cluster: array jobs. With --ray: upper limit."""
    threads: AtLeastOne = 1
    """Concurrent rows per process, for a class that waits for an endpoint."""
    ray: Annotated[str, Flag(value="ADDRESS")] = ""
    """Run on a Ray cluster: the head node's HOST:PORT, or auto on a cluster node."""
    gpus: Annotated[NotNegative, requires_field("ray")] = 0.0
    """GPUs per process; may be a fraction."""
    skip_failures: bool = False
    """Write rows for which the class raises to failed.jsonl, and continue."""

    def problems(self) -> list[SettingsProblem]:
        if not (self.ray and self.cluster):
            return []
        return [SettingsProblem(ProblemCode.RULE, "ray", "and --cluster exclude each other", self.ray,
                                "leave one out")]

    @property
    def file(self) -> Path:
        return self.rows / ROWS if self.rows.is_dir() else self.rows


def _check_step(loaded: LoadedPlugin) -> None:
    check_methods(loaded.value, loaded.reference, "a step", {"do": ("row",)})


STEPS: Registry[type[Any]] = Registry("step", {}, _check_step)
"""Steps from users' files."""


@dataclass(frozen=True)
class MapWork:
    """Checked options from which every process builds the same job."""

    options: MapOptions
    step: PluginRequest
    input_digest: str
    num_rows: int
    """Input rows."""

    def job(self, workers: int, done: Callable[[Batch], object] = lambda batch: None) -> Job[Batch]:
        """Build the job for `workers` local processes; `done` receives each finished batch."""
        options = self.options
        return Job(made_by="megatron-sov map", output=options.output, items=_read_batches(options.file),
                   done=done,
                   identity={"rows": self.input_digest, "step": self.step.name, "code": dict(self.step.files),
                             "settings": dict(self.step.settings), "skip_failures": options.skip_failures,
                             "batch_rows": BATCH_ROWS},
                   do=self._executor(workers), sink=self.publish)

    def _executor(self, workers: int) -> Executor[Batch]:
        arguments = self.step, self.options.skip_failures, self.options.threads
        if self.options.ray:
            return ray_executor(_build_batch_step, arguments, workers, self.options.ray,
                                gpus=self.options.gpus)
        return worker_executor(_build_batch_step, arguments, workers)

    def publish(self, journal: Journal) -> None:
        """Write the artifact and print its row counts."""
        options, counts = self.options, {"num_rows": 0, "num_failed": 0}
        with create_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
            # the first byte in a record's line selects the output file
            files = {b"+": artifact.path / ROWS, b"-": artifact.path / FAILED}
            with open(files[b"+"], "wb") as rows, open(files[b"-"], "wb") as failed:
                for _, record in journal.records():
                    for line in record.split(b"\n")[:-1]:
                        (rows if line[:1] == b"+" else failed).write(line[1:] + b"\n")
                        counts["num_rows" if line[:1] == b"+" else "num_failed"] += 1
            if not options.skip_failures:
                # an empty failed.jsonl would suggest that --skip-failures was set
                files[b"-"].unlink()
            artifact.content = counts | {"num_rows_in": self.num_rows}
            artifact.settings = {"step": self.step.reference, "code": dict(self.step.files),
                                 "settings": dict(self.step.settings), "input": str(options.rows),
                                 "input_digest": self.input_digest}
            if (options.rows / MANIFEST).is_file():
                artifact.add_input(options.rows)
        print(f"{options.output}: {artifact.content['num_rows_in']:,} rows in, {counts['num_rows']:,} out"
              + (f"; {counts['num_failed']:,} failed, see {FAILED}" if counts["num_failed"] else ""))


@dataclass(frozen=True)
class MapShare:
    """Array job: a task executes every `num_shares`-th batch."""

    work: MapWork
    num_shares: int

    def __call__(self, task: int) -> None:
        # Slurm would restart a crashing step forever
        check_restarts("megatron-sov map", "raise --workers")
        run_share(self.work.job(1), task, self.num_shares)


@dataclass(frozen=True)
class MapFinish:
    """Last job: executes remaining batches and writes the artifact."""

    work: MapWork

    def __call__(self, task: int) -> None:
        run_job(self.work.job(1))


def map_rows(options: MapOptions) -> None:
    """Execute or submit the unfinished batches."""
    if options.rows.is_dir():
        read_manifest(options.rows, KIND)
    step = registry.request_plugin(options.step, parse_nested(options.settings), {}, STEPS)
    # report wrong arguments here, not in every worker
    registry.build_plugin(step, {}, STEPS)
    num_rows = check_rows(options.file, "ROWS", "")
    # `_submit_work` accepts a complete output
    if not (options.cluster and (options.output / MANIFEST).is_file()):
        check_output_folder(options.output, KIND, options.overwrite)
    work = MapWork(options, step, hash_file(options.file), num_rows)
    if options.cluster:
        _submit_work(work)
        return
    # active jobs would execute the same rows
    check_no_active_jobs(slurm_folder(options.output))
    with create_bar("map", num_rows, "row") as bar:
        run_job(work.job(options.workers, lambda batch: bar.update(len(batch))), redo=options.redo)


MAP = DeclaredCommand(MapOptions, map_rows)


def _read_batches(file: Path) -> Iterator[Batch]:
    lines = read_lines(file, "ROWS")
    while batch := list(islice(lines, BATCH_ROWS)):
        yield batch


def _build_batch_step(request: PluginRequest, skip_failures: bool, threads: int) -> Callable[[Batch], bytes]:
    """Build the function from a batch to a record: a line per row, "+" for outputs, "-" for failures."""
    # built in the worker, because a user's object may not be picklable
    step = registry.build_plugin(request, {}, STEPS).value

    def convert(line: tuple[int, bytes]) -> bytes:
        number, raw = line
        row = parse_row(raw, "")
        if isinstance(row, str):
            raise UserError(f"line {number}: {row}; the file has changed since it was checked")
        try:
            return b"".join(b"+" + line for line in _format_rows(step.do(dict(row))))
        # the step's own explanation of a mistake, also with --skip-failures
        except UserError:
            raise
        # SystemExit(0) of a step would end the worker with success
        except (Exception, SystemExit, GeneratorExit) as e:
            if not skip_failures:
                raise UserError(f"line {number}: {request.reference} raises ({format_error(e)}); fix it, or "
                                "pass --skip-failures to write such rows to failed.jsonl and "
                                "continue") from None
            return b"-" + format_json_line({"line": number, "error": format_error(e), "row": row})

    if threads == 1:
        return lambda batch: b"".join(map(convert, batch))
    # threads finish out of order: sort by line number
    return lambda batch: b"".join(record for _, record in sorted(
        map_in_threads(lambda line: (line[0], convert(line)), batch, threads)))


def _format_rows(result: Any) -> list[bytes]:
    if result is None:
        return []
    rows = result if isinstance(result, list) else [result]
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise TypeError(f"step returned a {type(wrong[0]).__name__}, must be a row, a list of rows, or None")
    # JSON has no NaN
    return [format_json_line(row, allow_nan=False) for row in rows]


def _submit_work(work: MapWork) -> None:
    """Submit the unfinished batches, or print the progress of active jobs."""
    # jobs have different working folders
    options = replace(work.options, output=work.options.output.absolute(), rows=work.options.rows.absolute())
    work, profile = replace(work, options=options), load_array_profile(options)
    if (options.output / MANIFEST).is_file() and not options.overwrite:
        print(f"{options.output}: is already complete")
        return
    job = work.job(1)
    submit_shares(options.output, SharedWork(
        SHARES, format_json(job.identity), -(-work.num_rows // BATCH_ROWS), "batches",
        num_done=lambda: len(list_finished_items(job.output, job.identity)),
        begin=lambda: begin_journal(job.output, job.made_by, job.identity, redo=options.redo),
        share=partial(MapShare, work), finish=MapFinish(work)), profile, options.workers)
