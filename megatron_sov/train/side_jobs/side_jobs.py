"""Background work during training: checkpoint exports, their evaluation and checkpoint averaging on rank 0,
garbage collection and profiling on every rank."""

import contextlib
import gc
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_sov.base.artifacts import MANIFEST, read_manifest, translate_disk_errors
from megatron_sov.base.errors import warn
from megatron_sov.engine.parallel.device import on_gpu, toggle_nsys_recording
from megatron_sov.model.config import GpuConfig, RunConfig, TrainConfig
from megatron_sov.model.families import supported as models
from megatron_sov.runs.checkpoints import (
    ADAPTER, CHECKPOINTS_FOLDER, MODEL, checkpoint_step, latest_checkpoint)
from megatron_sov.runs.folder import AVERAGE, EXPORTS
from megatron_sov.train.side_jobs.evaluations import ExportEvaluations
from megatron_sov.work.processes.background import BackgroundProcess

PROFILE_FOLDER = "profile"
AVERAGE_LOG = ".average.log"
POLL_S = 0.05


class SideJobs:
    """Runs exports, evaluations and checkpoint averaging in background processes on rank 0."""

    def __init__(self, run: Path, config: RunConfig, record: Callable[..., None]) -> None:
        """Find an earlier process's waiting jobs; `record(name, **fields)` writes an event."""
        self._average = partial(average_checkpoints, run, config.train, record)
        self._evaluations = ExportEvaluations(run, config, record)
        self._exports = CheckpointExports(
            run, config.train, record, lambda step: _warn_on_os_error(lambda: self._evaluations.offer(step)))

    def offer(self, step: int, checkpoint: Path, last: bool) -> None:
        """Queue a complete checkpoint's export and evaluation if they are due, without waiting."""
        self._exports.offer(step, checkpoint, last)

    def poll(self) -> None:
        """Handle finished jobs and start waiting jobs, without waiting."""
        self._exports.poll()
        _warn_on_os_error(self._evaluations.poll)

    def wait(self) -> None:
        """Finish queued work when the run ends."""
        self._average()
        # before the evaluations, which finished exports queue
        self._exports.wait()
        self._evaluations.wait()

    def close(self) -> None:
        """Stop running jobs; a resumed run continues them."""
        self._exports.close()
        self._evaluations.close()


def _warn_on_os_error(action: Callable[[], None]) -> None:
    """Run `action`, and turn an `OSError` into a warning, so that it does not end the run."""
    try:
        action()
    except OSError as e:
        warn(f"background evaluations cannot be followed ({e})")


class GarbageCollector:
    """Runs Python's garbage collector every `every_steps` steps on every rank; 0 leaves collection to Python.

    Python would collect at different times on each rank: with hundreds of ranks, some rank collects in nearly
    every step, and the world waits for this rank in the next collective.
    """

    def __init__(self, every_steps: int) -> None:
        """Collect once, and exclude surviving objects from later collections."""
        self._every_steps = every_steps
        if every_steps:
            gc.collect()
            # after a collection, because frozen garbage is never freed
            gc.freeze()
            gc.disable()

    def after_step(self, step: int) -> None:
        """Collect if a collection is due after `step` (from 1)."""
        if self._every_steps and step % self._every_steps == 0:
            gc.collect()

    def close(self) -> None:
        if self._every_steps:
            gc.enable()
            gc.unfreeze()


class StepProfiler:
    """Profiles steps `gpu.profile_first_step` to `gpu.profile_last_step` with torch or Nsight Systems."""

    def __init__(self, config: GpuConfig, run: Path, is_main: bool) -> None:
        self._for_nsys = config.profiler == "nsys"
        # Nsight Systems selects processes itself
        is_active = is_main or self._for_nsys
        self._steps = range(config.profile_first_step, config.profile_last_step + 1 if is_active else 0)
        self._folder = run / PROFILE_FOLDER
        self._profile: profile | None = None
        self._records = False
        self._first_step = 0

    def before_step(self, step: int) -> None:
        if step not in self._steps or step == 0 or self._profile is not None or self._records:
            return
        if self._for_nsys:
            self._records = True
            toggle_nsys_recording(on=True)
        else:
            activities = [ProfilerActivity.CPU]
            if on_gpu():
                activities.append(ProfilerActivity.CUDA)
            self._profile, self._first_step = profile(activities=activities, record_shapes=True), step
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Write the trace after the last profiled step."""
        if (self._profile is not None or self._records) and step >= self._steps[-1]:
            self._write_trace(step)

    def _write_trace(self, step: int) -> None:
        if self._records:
            self._records = False
            toggle_nsys_recording(on=False)
            return
        assert self._profile is not None
        self._profile.stop()
        trace = self._folder / f"steps-{self._first_step}-{step}.json.gz"
        with translate_disk_errors(trace):
            self._folder.mkdir(exist_ok=True)
            unfinished = trace.with_name(f".{trace.name}")  # torch compresses a file named .gz
            self._profile.export_chrome_trace(str(unfinished))
            unfinished.replace(trace)
        self._profile = None

    def close(self, step: int) -> None:
        """Write the trace if the run ends before the last profiled step."""
        if self._profile is not None or self._records:
            self._write_trace(step)


def average_checkpoints(run: Path, train: TrainConfig, record: Callable[..., None]) -> None:
    """Write RUN/average, the mean of the last `train.average_last` checkpoints (0: none), and an event.

    A failure is a warning. Averages of checkpoints at a constant learning rate can replace its decay
    (arXiv 2507.17634); averages of fine-tuned models lower the loss a little (arXiv 2203.05482).
    """
    newest = latest_checkpoint(run / CHECKPOINTS_FOLDER)
    if not train.average_last or newest is None or (run / AVERAGE / MANIFEST).is_file():
        return
    command = ["convert", "average", str(run), str(run / AVERAGE), "--last", str(train.average_last),
               "--weights", train.average_weights, "--decay", str(train.average_decay)]
    command += [word for reference in models.FAMILY_PLUGINS.named() for word in ("--plugin", reference)]
    step = checkpoint_step(newest)
    try:
        process = BackgroundProcess([sys.executable, "-m", "megatron_sov", *command], run / AVERAGE_LOG)
    except OSError as e:
        _record_average_failure(record, step, f"its process cannot be started ({e})")
        return
    while process.exit_code is None:
        time.sleep(POLL_S)
    if process.exit_code:
        _record_average_failure(record, step, process.last_words)
        return
    record("average", step=step, path=AVERAGE, checkpoints=train.average_last, weights=train.average_weights,
           average_s=process.took_s)
    (run / AVERAGE_LOG).unlink(missing_ok=True)


def _record_average_failure(record: Callable[..., None], step: int, reason: str) -> None:
    record("average", step=step, error=reason)
    warn(f"checkpoint averaging failed: {reason}", record, step=step)


@dataclass(frozen=True)
class _RunningJob:
    step: int
    process: BackgroundProcess


class CheckpointExports:
    """Exports checkpoints to Hugging Face folders in a background process on rank 0.

    `RUN/exports/step-N` is converted from `RUN/exports/.step-N.source`, hard links to the checkpoint's files,
    because the run may delete the checkpoint meanwhile. At most one export runs and one waits; a resumed run
    continues both. A failure becomes an event and a warning.
    """

    def __init__(self, run: Path, train: TrainConfig, record: Callable[..., None],
                 on_exported: Callable[[int], None] = lambda step: None) -> None:
        """Find waiting exports of an earlier process; `on_exported(step)` is called after each export."""
        self.folder, self._train, self._record = run / EXPORTS, train, record
        self._on_exported = on_exported
        self._waiting: list[int] = []
        for source in self.folder.glob(".step-*.source"):
            # the manifest is linked last: a source without a manifest is incomplete
            if (source / MANIFEST).is_file():
                self._waiting.append(int(source.name.removeprefix(".step-").removesuffix(".source")))
            else:
                shutil.rmtree(source, ignore_errors=True)
        self._waiting.sort()
        self._running: _RunningJob | None = None

    def offer(self, step: int, checkpoint: Path, last: bool) -> None:
        """Queue a complete checkpoint's export if it is due, without waiting.

        Every `train.export_every_checkpoints`-th regular checkpoint is due, and the `last` of the run.
        """
        every = self._train.export_every_checkpoints * self._train.checkpoint_every_steps
        if every and (last or step % every == 0):
            try:
                if self._running is not None and self._running.step == step:
                    self.close()  # a resumed run has repeated the step
                self._link_files(step, checkpoint)
            except OSError as e:
                self._record_failure(step, f"its files cannot be linked into {self.folder} ({e})")
                return
            self._waiting = [*(s for s in self._waiting if s != step), step]
        self.poll()
        # exports slower than checkpoints would pile up, and their links would fill the disk
        while len(self._waiting) > 1:
            self._record_failure(self._waiting.pop(0), "a newer checkpoint was ready before it was begun")

    def poll(self) -> None:
        """Handle a finished export and start the next, without waiting."""
        if self._running is not None and self._running.process.exit_code is not None:
            self._handle_end(self._running)
        if self._running is None and self._waiting:
            step = self._waiting.pop(0)
            try:
                self._running = self._start_export(step)
            except OSError as e:
                self._record_failure(step, f"its process cannot be started ({e})")

    def wait(self) -> None:
        """Finish queued exports when the run ends."""
        self.poll()
        while self._running is not None:
            time.sleep(POLL_S)
            self.poll()

    def close(self) -> None:
        """Stop the running export; a resumed run continues it."""
        if self._running is not None:
            self._running.process.kill()
            self._running = None

    def _get_source(self, step: int) -> Path:
        return self.folder / f".step-{step}.source"

    def _get_log(self, step: int) -> Path:
        return self.folder / f".step-{step}.log"

    def _link_files(self, step: int, checkpoint: Path) -> None:
        """Link the files that a conversion reads, without optimizer files; the manifest last."""
        manifest = read_manifest(checkpoint)
        excluded = tuple(f"{part}/" for part in manifest.content["parts"] if part not in (MODEL, ADAPTER))
        source = self._get_source(step)
        shutil.rmtree(source, ignore_errors=True)
        names = [name for name in manifest.files if not name.startswith(excluded)]
        for name in [*names, MANIFEST]:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(checkpoint / name, source / name)

    def _start_export(self, step: int) -> _RunningJob:
        argv = ["convert", "to-hf", str(self._get_source(step)), str(self.folder / f"step-{step}"),
                "--workers", "1", "--overwrite"]
        argv += [word for reference in models.FAMILY_PLUGINS.named() for word in ("--plugin", reference)]
        return _RunningJob(step, BackgroundProcess([sys.executable, "-m", "megatron_sov", *argv],
                                                   self._get_log(step)))

    def _handle_end(self, running: _RunningJob) -> None:
        step, self._running = running.step, None
        if running.process.exit_code == 0:
            self._record("export", step=step, path=f"{EXPORTS}/step-{step}", export_s=running.process.took_s)
            self._remove_source(step)
            self._on_exported(step)
        else:
            self._record_failure(step, running.process.last_words)

    def _record_failure(self, step: int, reason: str) -> None:
        self._record("export", step=step, error=reason)
        warn(f"export of step {step} failed: {reason}", self._record, step=step)
        self._remove_source(step)

    def _remove_source(self, step: int) -> None:
        shutil.rmtree(self._get_source(step), ignore_errors=True)
        with contextlib.suppress(OSError):
            self._get_log(step).unlink()
