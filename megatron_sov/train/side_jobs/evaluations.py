"""Evaluating a run's exports in background processes or Slurm jobs.

`RUN/evaluations/step-N.TASK.json` has the results, `step-N.TASK.failed` the reason for a failure, and
`.step-N.TASK.submitted` marks a submitted job. A resumed run evaluates the exports that have none of these
files. Scores of `eval lm` become events of the run. If a job ends after it, the next `--resume` writes its
events; until then the report reads its result file.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, write_atomically
from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.evaluate import EvalTask
from megatron_sov.runs.folder import EVALUATIONS, EXPORTS
from megatron_sov.runs.obs.events import EVAL_LM_EVENT, build_score_events
from megatron_sov.train.data.sources import TEXTS, Source
from megatron_sov.work.processes.background import BackgroundProcess

POLL_INTERVAL_S = 1.0
_SLEEP_S = 0.05
"""Time between two polls in `wait`."""
TASK_FORMATS: dict[EvalTask, tuple[str, ...]] = {"ppl": TEXTS, "needle": TEXTS, "pairs": ("preference",)}
"""Task -> supported data formats; `lm` has its own data."""


@dataclass(frozen=True)
class EvalJob:
    """An evaluation task on a step's export."""

    step: int
    task: str

    @property
    def name(self) -> str:
        return f"step-{self.step}.{self.task}"


CommandBuilder = Callable[[EvalJob, Path, Path], list[str]]
"""Returns a command for (job, export folder, result file) that writes the results or submits a job."""


@dataclass
class _RunningEvaluation:
    job: EvalJob
    process: BackgroundProcess


class ExportEvaluations:
    """Evaluates a run's exports, on rank 0."""

    def __init__(self, run: Path, config: RunConfig, record: Callable[..., None],
                 build_command: CommandBuilder | None = None) -> None:
        """Find an earlier process's waiting jobs; `record(name, **fields)` writes an event.

        `build_command` replaces `build_eval_command`.
        """
        self.folder, self._exports = run / EVALUATIONS, run / EXPORTS
        self._settings = config.evaluate.background
        self._record = record
        self._build_command = build_command or partial(build_eval_command, config)
        self._running: _RunningEvaluation | None = None
        self._polled_s = -POLL_INTERVAL_S
        numbers = [folder.name.removeprefix("step-") for folder in self._exports.glob("step-*")
                   if (folder / MANIFEST).is_file()]
        steps = [int(number) for number in numbers if number.isdecimal()]
        jobs = [EvalJob(step, name) for step in sorted(steps) for name in self._settings.tasks]
        # includes jobs with results, whose events are not written yet
        self._submitted = [job for job in jobs if self._get_hidden_file(job, ".submitted").is_file()]
        self._waiting = [job for job in jobs if job not in self._submitted and not self._has_ended(job)]

    def offer(self, step: int) -> None:
        """Queue evaluations for a new or repeated export, without waiting."""
        jobs = [EvalJob(step, name) for name in self._settings.tasks]
        if self._running is not None and self._running.job in jobs:
            self.close()
        for job in jobs:
            # results of an earlier export must not count for the repeated export
            for file in (self._get_result(job), self._get_result(job).with_suffix(".failed"),
                         self._get_hidden_file(job, ".submitted")):
                file.unlink(missing_ok=True)
            shutil.rmtree(_get_cache(self._get_result(job)), ignore_errors=True)
        self._submitted = [job for job in self._submitted if job.step != step]
        self._waiting = [*(job for job in self._waiting if job.step != step), *jobs]
        steps = list(dict.fromkeys(job.step for job in self._waiting))
        excess_steps = steps[:-self._settings.max_waiting]  # the oldest
        for job in [job for job in self._waiting if job.step in excess_steps]:
            self._waiting.remove(job)
            self._record_failure(
                job, f"{self._settings.max_waiting} newer exports were ready before it was begun")
        self.poll(now=True)

    def poll(self, now: bool = False) -> None:
        """Handle jobs that have finished or exceed their time limit, and start the next one; never wait.

        Does nothing if the last poll was less than `POLL_INTERVAL_S` ago, unless `now` is set.
        """
        if not self._settings.tasks or (not now and time.monotonic() - self._polled_s < POLL_INTERVAL_S):
            return
        self._polled_s = time.monotonic()
        if self._running is not None:
            self._check_process(self._running)
        for job in list(self._submitted):
            self._check_submitted(job)
        if self._running is None and self._may_start():
            self._start_job(self._waiting.pop(0))

    def wait(self) -> None:
        """When the run ends, finish local evaluations, or submit remaining jobs up to `max_waiting`."""
        self.poll(now=True)
        while self._running is not None or self._may_start():
            time.sleep(_SLEEP_S)
            self.poll(now=True)

    def close(self) -> None:
        """Stop the running evaluation, which a resumed run repeats."""
        if self._running is not None:
            self._running.process.kill()
            self._running = None

    def _get_result(self, job: EvalJob) -> Path:
        return self.folder / f"{job.name}.json"

    def _get_hidden_file(self, job: EvalJob, ending: str) -> Path:
        return self.folder / f".{job.name}{ending}"

    def _may_start(self) -> bool:
        return bool(self._waiting) and len(self._submitted) < self._settings.max_waiting

    def _has_ended(self, job: EvalJob) -> bool:
        result = self._get_result(job)
        return result.is_file() or result.with_suffix(".failed").is_file()

    def _start_job(self, job: EvalJob) -> None:
        command = self._build_command(job, self._exports / f"step-{job.step}", self._get_result(job))
        try:
            self.folder.mkdir(exist_ok=True)
            log = self._get_hidden_file(job, ".log")
            self._running = _RunningEvaluation(job, BackgroundProcess(command, log))
        except OSError as e:
            self._record_failure(job, f"its process cannot be started ({e})")

    def _check_process(self, running: _RunningEvaluation) -> None:
        job, took_s = running.job, running.process.took_s
        if running.process.exit_code is None:
            if took_s > self._settings.timeout_s:
                self.close()
                limit = f"evaluate.background.timeout_s = {self._settings.timeout_s:g}"
                self._record_failure(job, f"it took more than {limit}")
            return
        self._running = None
        if running.process.exit_code == ExitCode.STOPPED:  # by a signal to the whole run
            self._waiting.insert(0, job)
        elif running.process.exit_code:
            self._record_failure(job, running.process.last_words)
        elif self._get_result(job).is_file():
            self._record_success(job, took_s)
        elif self._settings.where == "slurm":
            # on the disk, because the job outlives this process and a resumed run reads its results
            self._get_hidden_file(job, ".submitted").touch()
            self._submitted.append(job)
        else:
            self._record_failure(job, "its process ended without a result")

    def _check_submitted(self, job: EvalJob) -> None:
        """Read a submitted job's results, or record a failure after a timeout: failed jobs write no file."""
        mark = self._get_hidden_file(job, ".submitted")
        waited_s = time.time() - mark.stat().st_mtime if mark.is_file() else 0.0
        if self._get_result(job).is_file():
            self._submitted.remove(job)
            mark.unlink(missing_ok=True)
            self._record_success(job, waited_s)
        elif waited_s > self._settings.timeout_s:
            self._submitted.remove(job)
            mark.unlink(missing_ok=True)
            limit = f"evaluate.background.timeout_s = {self._settings.timeout_s:g}"
            self._record_failure(job, f"its job gave no result within {limit}; see its log")

    def _record_success(self, job: EvalJob, took_s: float) -> None:
        try:
            scores = _read_score_events(self._get_result(job), job.step) if job.task == "lm" else []
        except UserError as e:
            self._record_failure(job, str(e))
            return
        shutil.rmtree(_get_cache(self._get_result(job)), ignore_errors=True)
        for score in scores:
            self._record(EVAL_LM_EVENT, **score)
        self._get_hidden_file(job, ".log").unlink(missing_ok=True)
        self._record("evaluation", step=job.step, task=job.task, path=f"{EVALUATIONS}/{job.name}.json",
                     took_s=took_s)

    def _record_failure(self, job: EvalJob, reason: str) -> None:
        """Record a failure; an `OSError` becomes a warning and does not end the run."""
        self._record("evaluation", step=job.step, task=job.task, error=reason)
        warn(f"evaluation {job.task} at step {job.step} failed: {reason}", self._record, step=job.step)
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self._get_result(job).with_suffix(".failed"), reason + "\n")
        except (UserError, OSError) as e:
            warn(f"{self.folder}: {e}")


def check_eval_tasks(config: RunConfig, sources: Sequence[Source]) -> None:
    """Raise `UserError` with the possible tasks if `evaluate.background.tasks` do not fit the run's data."""
    for task in config.evaluate.background.tasks:
        for source in sources:
            # `lm` has its own data and is not in the table
            if task in TASK_FORMATS and source.format not in TASK_FORMATS[task]:
                possible = [name for name, formats in TASK_FORMATS.items() if source.format in formats]
                raise UserError(
                    f"evaluate.background.tasks = {list(config.evaluate.background.tasks)}: {task} cannot "
                    f"use source {source.name!r}, which holds data of format {source.format!r}; use "
                    + (" or ".join(possible) if possible else "no task for this data"))


def _read_score_events(file: Path, step: int) -> list[dict[str, Any]]:
    """Build the events for a job's results. Raises `UserError` if the file cannot be read."""
    try:
        results = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read ({e})") from None
    return build_score_events(results, step, file)


def _get_cache(result: Path) -> Path:
    """Return the folder in which `eval lm` caches answers; a failed evaluation leaves it for the next one."""
    return result.with_name(f".{result.name.removesuffix('.json')}.cache")


def build_eval_command(config: RunConfig, job: EvalJob, export: Path, out: Path) -> list[str]:
    """Build the command that evaluates an export, or submits an evaluation job, from the run's settings."""
    argv = [job.task, str(export)]
    if job.task == "lm":
        lm = config.evaluate.lm
        argv += [f"--tasks={','.join(lm.tasks)}", *lm.options, f"--output={out}",
                 f"--cache={_get_cache(out)}"]
    else:
        argv += ["--output", str(out)]
        for path in config.data.paths:
            argv += ["--data", path]
    if job.task == "ppl":
        argv += ["--seq-len", str(config.data.max_seq_len())]
        if config.data.heldout_tokens:
            argv += ["--max-tokens", str(config.data.heldout_tokens)]
    elif job.task == "pairs":
        argv += ["--seq-len", str(config.data.max_seq_len())]
    elif job.task == "needle":
        needle = config.needle
        several = {"--kinds": needle.kinds, "--languages": needle.languages,
                   "--lengths": needle.lengths_tokens, "--depths": needle.depths}
        for option, values in several.items():
            if values:
                argv += [option, *map(str, values)]
        argv += ["--samples", str(needle.samples), "--distractor-share", str(needle.distractor_share)]
    program = [sys.executable, "-m", "megatron_sov"]
    if config.evaluate.background.where == "slurm":
        return [*program, "submit", "--cluster", config.evaluate.background.cluster, "eval", *argv]
    return [*program, "eval", *argv]
