"""Evaluation beside training: every export of a run is judged by other processes or jobs,
which never hold the run up.

`RUN/evaluations/step-N.TASK.json` holds the figures, `step-N.TASK.failed` why there are none,
`.step-N.TASK.submitted` that a job is to bring them.  An export with none of the three is still to be judged:
so a stopped or killed run goes on where it was.  Scores of `lm` become events of the run as well; those of
jobs that end behind it are read by the report, or become events with the next `--resume`.
"""

from __future__ import annotations

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
from megatron_sov.model.config.evaluate import EvalTask, LmEvalConfig
from megatron_sov.runs.folder import EVALUATIONS, EXPORTS
from megatron_sov.runs.obs.events import EVAL_LM_EVENT, build_score_events
from megatron_sov.train.data.token_shards import TEXTS, Source
from megatron_sov.work.processes.background import BackgroundProcess

POLL_INTERVAL_S = 1.0
_WAIT_S = 0.05


@dataclass(frozen=True)
class EvalJob:
    """One task on one export."""

    step: int
    task: str

    @property
    def name(self) -> str:
        return f"step-{self.step}.{self.task}"


TASK_FORMATS: dict[EvalTask, tuple[str, ...]] = {"ppl": TEXTS, "needle": TEXTS, "pairs": ("preference",)}
"""Task -> formats of data that it can judge by; `lm` brings its own."""
CommandOf = Callable[[EvalJob, Path, Path], list[str]]
"""(job, export's folder, file for the figures) -> a command that writes them, or submits a job that does."""


@dataclass
class _RunningEvaluation:
    job: EvalJob
    process: BackgroundProcess


class ExportEvaluations:
    """The evaluations beside one run; lives on rank 0."""

    def __init__(self, run: Path, config: RunConfig, record: Callable[..., None],
                 command_of: CommandOf | None = None) -> None:
        """Find what an earlier process of the run left; starts nothing.

        Args:
            run: the run's folder.
            config: its settings.
            record: writes an event: `record(name, **fields)`.
            command_of: what is run instead of `megatron-sov eval`.
        """
        self.folder, self._exports, self._settings = (run / EVALUATIONS, run / EXPORTS,
                                                      config.evaluate.background)
        self._record = record
        self._command_of = command_of or partial(build_eval_command, config)
        self._running: _RunningEvaluation | None = None
        self._looked_s = -POLL_INTERVAL_S
        done = [int(p.name[5:])
                for p in self._exports.glob("step-*") if p.name[5:].isdigit() and (p / MANIFEST).is_file()]
        jobs = [EvalJob(step, name) for step in sorted(done) for name in self._settings.tasks]
        # also those that have brought their figures meanwhile, of which the run is to be told
        self._submitted = [job for job in jobs if self._file(job, ".submitted").is_file()]
        self._waiting = [job for job in jobs if job not in self._submitted and self._is_open(job)]

    def offer(self, step: int) -> None:
        """Have an export judged; returns at once.  One that a resumed run made anew is judged anew."""
        jobs = [EvalJob(step, name) for name in self._settings.tasks]
        if self._running is not None and self._running.job in jobs:
            self.close()
        for job in jobs:
            # else figures of the earlier export would pass for those of this one
            for file in (self._result(job), self._result(job).with_suffix(".failed"),
                         self._file(job, ".submitted")):
                file.unlink(missing_ok=True)
            shutil.rmtree(_answers_of(self._result(job)), ignore_errors=True)
        self._submitted = [job for job in self._submitted if job.step != step]
        self._waiting = [*(job for job in self._waiting if job.step != step), *jobs]
        steps = list(dict.fromkeys(job.step for job in self._waiting))
        for job in [t for t in self._waiting if t.step in steps[:-self._settings.max_waiting]]:
            self._waiting.remove(job)
            self._fail(job, f"{self._settings.max_waiting} newer exports were ready before it was begun")
        self.poll(now=True)

    def poll(self, now: bool = False) -> None:
        """Take note of what has ended or takes too long, and begin what is next; returns at once.

        Args:
            now: look even if the last look was less than `LOOK_EVERY_S` ago.
        """
        if not self._settings.tasks or (not now and time.monotonic() - self._looked_s < POLL_INTERVAL_S):
            return
        self._looked_s = time.monotonic()
        if self._running is not None:
            self._follow(self._running)
        for job in list(self._submitted):
            self._follow_job(job)
        if self._running is None and self._waiting and len(self._submitted) < self._settings.max_waiting:
            self._begin(self._waiting.pop(0))

    def wait(self) -> None:
        """Finish everything that this machine does itself, and submit the rest; for the end of a run."""
        self.poll(now=True)
        while (self._running is not None
               or (self._waiting and len(self._submitted) < self._settings.max_waiting)):
            time.sleep(_WAIT_S)
            self.poll(now=True)

    def close(self) -> None:
        """End the running job, if any; it begins anew when the run is resumed."""
        if self._running is not None:
            self._running.process.kill()
            self._running = None

    def _result(self, job: EvalJob) -> Path:
        return self.folder / f"{job.name}.json"

    def _file(self, job: EvalJob, ending: str) -> Path:
        return self.folder / f".{job.name}{ending}"

    def _is_open(self, job: EvalJob) -> bool:
        result = self._result(job)
        return not result.is_file() and not result.with_suffix(".failed").is_file()

    def _begin(self, job: EvalJob) -> None:
        command = self._command_of(job, self._exports / f"step-{job.step}", self._result(job))
        try:
            self.folder.mkdir(exist_ok=True)
            self._running = _RunningEvaluation(job, BackgroundProcess(command, self._file(job, ".log")))
        except OSError as e:
            self._fail(job, f"its process cannot be started ({e})")

    def _follow(self, running: _RunningEvaluation) -> None:
        job, took_s = running.job, running.process.took_s
        if running.process.exit_code is None:
            if took_s > self._settings.timeout_s:
                self.close()
                self._fail(job,
                           f"it took more than evaluate.background.timeout_s = {self._settings.timeout_s:g}")
            return
        self._running = None
        if running.process.exit_code == ExitCode.STOPPED:  # by a signal that was meant for the run
            self._waiting.insert(0, job)
        elif running.process.exit_code:
            self._fail(job, running.process.last_words)
        elif self._result(job).is_file():
            self._succeed(job, took_s)
        elif self._settings.where == "slurm":
            # on the disk: the job outlives this process, and a resumed run looks for its figures
            self._file(job, ".submitted").touch()
            self._submitted.append(job)
        else:
            self._fail(job, "its process ended without a result")

    def _follow_job(self, job: EvalJob) -> None:
        """Look for the figures of a job; a job that fails does so in silence, so only time tells."""
        mark = self._file(job, ".submitted")
        waited_s = time.time() - mark.stat().st_mtime if mark.is_file() else 0.0
        if self._result(job).is_file():
            self._submitted.remove(job)
            mark.unlink(missing_ok=True)
            self._succeed(job, waited_s)
        elif waited_s > self._settings.timeout_s:
            self._submitted.remove(job)
            mark.unlink(missing_ok=True)
            limit = f"evaluate.background.timeout_s = {self._settings.timeout_s:g}"
            self._fail(job, f"its job gave no result within {limit}; see its log")

    def _succeed(self, job: EvalJob, took_s: float) -> None:
        try:
            scores = _scores_of(self._result(job), job.step) if job.task == "lm" else []
        except UserError as e:
            self._fail(job, str(e))
            return
        shutil.rmtree(_answers_of(self._result(job)), ignore_errors=True)
        for score in scores:
            self._record(EVAL_LM_EVENT, **score)
        self._file(job, ".log").unlink(missing_ok=True)
        self._record("evaluation", step=job.step, task=job.task, path=f"{EVALUATIONS}/{job.name}.json",
                     took_s=took_s)

    def _fail(self, job: EvalJob, why: str) -> None:
        """Record a failure; where even that fails the run goes on."""
        self._record("evaluation", step=job.step, task=job.task, error=why)
        warn(f"the {job.task} of step {job.step} was not measured: {why}", self._record, step=job.step)
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self._result(job).with_suffix(".failed"), why + "\n")
        except (UserError, OSError) as e:
            warn(f"{self.folder}: {e}")


def check_eval_tasks(config: RunConfig, sources: Sequence[Source]) -> None:
    """Refuse a run with a task that cannot judge by the run's data, which would fail on every export.

    Raises:
        UserError: with the task, and the tasks that can.
    """
    for task in config.evaluate.background.tasks:
        for source in sources:
            if source.format not in TASK_FORMATS.get(task, (source.format,)):
                able = [name for name, formats in TASK_FORMATS.items() if source.format in formats]
                raise UserError(
                    f"evaluate.background.tasks = {list(config.evaluate.background.tasks)}: {task} cannot "
                    f"judge by source {source.name!r}, which holds data of format {source.format!r}; ask for "
                    + (" or ".join(able) if able else "none, and judge the exports by other data"))


def _scores_of(file: Path, step: int) -> list[dict[str, Any]]:
    """Return the events of what a job has found.

    Raises:
        UserError: its file cannot be read.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read ({e})") from None
    return build_score_events(found, step, file)


def _answers_of(result: Path) -> Path:
    """Return where `eval lm` keeps its answers until it has its figures; those of one that has failed are
    kept, for `--cache`."""
    return result.with_name(f".{result.name.removesuffix('.json')}.cache")


def build_eval_command(config: RunConfig, job: EvalJob, export: Path, out: Path) -> list[str]:
    """Return the command that judges an export as the run's settings say, or submits a job that does."""
    argv = [job.task, str(export)]
    if job.task == "lm":
        argv += _lm_arguments(config.evaluate.lm, out)
    else:
        argv += ["--output", str(out)] + [w for path in config.data.paths for w in ("--data", path)]
    if job.task == "ppl":
        argv += ["--seq-len", str(config.data.max_seq_len())]
        argv += ["--max-tokens", str(config.data.heldout_tokens)] if config.data.heldout_tokens else []
    elif job.task == "pairs":
        argv += ["--seq-len", str(config.data.max_seq_len())]
    elif job.task == "needle":
        needle = config.needle
        several = {"--kinds": needle.kinds, "--languages": needle.languages,
                   "--lengths": needle.lengths_tokens, "--depths": needle.depths}
        argv += [w for option, values in several.items() if values for w in (option, *map(str, values))]
        argv += ["--samples", str(needle.samples), "--distractor-share", str(needle.distractor_share)]
    program = [sys.executable, "-m", "megatron_sov"]
    if config.evaluate.background.where == "slurm":
        return [*program, "submit", "--cluster", config.evaluate.background.cluster, "eval", *argv]
    return [*program, "eval", *argv]


def _lm_arguments(lm: LmEvalConfig, out: Path) -> list[str]:
    """Return what `eval lm` is told beside the model."""
    one: dict[str, Any] = {
        "--tasks": ",".join(lm.tasks), "--output": out, "--cache": _answers_of(out),
        "--data-dir": lm.data_dir or None, "--limit": lm.limit, "--num-fewshot": lm.num_fewshot,
        "--mode": lm.mode, "--samples": lm.samples, "--batch-size": lm.batch_size,
        "--max-length": lm.max_length_tokens, "--max-new-tokens": lm.max_gen_tokens, "--seed": lm.seed,
        "--workers": lm.workers}
    flags = {"--allow-task-code": lm.allow_task_code, "--allow-download": lm.allow_download,
             "--apply-chat-template": lm.apply_chat_template}
    several = {"--task-dir": lm.task_dirs, "--judge": lm.judge}
    return [*(f"{option}={value}" for option, value in one.items() if value is not None),
            *(f"{option}={value}" for option, values in several.items() for value in values),
            *(option for option, is_on in flags.items() if is_on)]
