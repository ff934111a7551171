"""What goes on beside the steps: exports on rank 0, the evaluation of each, and the mean of its checkpoints
behind the last step; on every process its garbage collections, and traces."""

from __future__ import annotations

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

# Python's garbage collection at the same steps on all processes.
#
# Left to itself, each process collects when its own counters say so, and among hundreds there is one
# that does so in nearly every step; all others wait for it in the next collective.

class GarbageCollector:
    """Collects every so many steps; 0: leaves it to Python."""

    def __init__(self, every_steps: int) -> None:
        """Keep what lives by now out of every later collection."""
        self._every_steps = every_steps
        if every_steps:
            gc.collect()
            # collected first: garbage that is frozen is never freed
            gc.freeze()
            gc.disable()

    def after_step(self, step: int) -> None:
        """Collect, if `step` (1-based) is one to collect after."""
        if self._every_steps and step % self._every_steps == 0:
            gc.collect()

    def close(self) -> None:
        if self._every_steps:
            gc.enable()
            gc.unfreeze()


FOLDER = "profile"


class StepProfiler:
    """Watches the steps that the settings name; of a run that goes on behind the first, what is left."""

    def __init__(self, config: GpuConfig, run: Path, is_main: bool) -> None:
        self._for_nsys = config.profiler == "nsys"
        watches = is_main or self._for_nsys  # nsys itself knows which processes it was started with
        self._steps = range(config.profile_first_step, config.profile_last_step + 1 if watches else 0)
        self._folder = run / FOLDER
        self._profile: profile | None = None
        self._records = False
        self._began_at = 0

    def before_step(self, step: int) -> None:
        if step not in self._steps or step == 0 or self._profile is not None or self._records:
            return
        if self._for_nsys:
            self._records = True
            toggle_nsys_recording(on=True)
        else:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
            self._profile, self._began_at = profile(activities=activities, record_shapes=True), step
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Write the trace, if `step` was the last one to be watched."""
        if (self._profile is not None or self._records) and step >= self._steps[-1]:
            self._write(step)

    def _write(self, step: int) -> None:
        if self._records:
            self._records = False
            toggle_nsys_recording(on=False)
            return
        assert self._profile is not None
        self._profile.stop()
        trace = self._folder / f"steps-{self._began_at}-{step}.json.gz"
        with translate_disk_errors(trace):
            self._folder.mkdir(exist_ok=True)
            unfinished = trace.with_name(f".{trace.name}")  # its end says that it is to be compressed
            self._profile.export_chrome_trace(str(unfinished))
            unfinished.replace(trace)
        self._profile = None

    def close(self, step: int) -> None:
        """Write what there is of a run that ends earlier."""
        if self._profile is not None or self._records:
            self._write(step)


# The mean of a run's newest checkpoints, made when the run is complete.
#
# Averages of a stable rate's checkpoints stand in the place of its decay (arXiv 2507.17634); of models that
# were tuned they lower the loss a little (arXiv 2203.05482).

LOG = ".average.log"
_WAIT_S = 0.05


def average_checkpoints(run: Path, train: TrainConfig, record: Callable[..., None]) -> None:
    """Write RUN/average, unless it is there, and record an event; a failure is one too, and a warning.

    Args:
        run: the folder of a complete run.
        train: says what is averaged; nothing where `average_last` is 0.
        record: writes an event: `record(name, **fields)`.
    """
    newest = latest_checkpoint(run / CHECKPOINTS_FOLDER)
    if not train.average_last or newest is None or (run / AVERAGE / MANIFEST).is_file():
        return
    command = ["convert", "average", str(run), str(run / AVERAGE), "--last", str(train.average_last),
               "--weights", train.average_weights, "--decay", str(train.average_decay)]
    command += [word for reference in models.FAMILY_PLUGINS.named() for word in ("--plugin", reference)]
    step = checkpoint_step(newest)
    try:
        process = BackgroundProcess([sys.executable, "-m", "megatron_sov", *command], run / LOG)
    except OSError as e:
        _fail(record, step, f"its process cannot be started ({e})")
        return
    while process.exit_code is None:
        time.sleep(_WAIT_S)
    if process.exit_code:
        _fail(record, step, process.last_words)
        return
    record("average", step=step, path=AVERAGE, checkpoints=train.average_last, weights=train.average_weights,
           average_s=process.took_s)
    (run / LOG).unlink(missing_ok=True)


def _fail(record: Callable[..., None], step: int, why: str) -> None:
    record("average", step=step, error=why)
    warn(f"the mean of the run's checkpoints was not made: {why}", record, step=step)


# Exports beside training: every k-th checkpoint becomes a Hugging Face folder, in a process that never holds
# the run up.
#
# `RUN/exports/step-N` is made from `RUN/exports/.step-N.source`, hard links to the checkpoint's files: the
# run may delete the checkpoint meanwhile. One export is made at a time and one waits; what a stopped or
# killed run left goes on when it is resumed. A failure is an event of the run, and a warning.

_EXPORT_WAIT_S = 0.05


@dataclass(frozen=True)
class _RunningJob:
    """An export that is being made."""

    step: int
    process: BackgroundProcess


class CheckpointExports:
    """The exports of one run; lives on rank 0."""

    def __init__(self, run: Path, train: TrainConfig, record: Callable[..., None],
                 made: Callable[[int], None] = lambda step: None) -> None:
        """Find what an earlier process of the run left; starts nothing.

        Args:
            run: the run's folder.
            train: says which checkpoints are exported.
            record: writes an event: `record(name, **fields)`.
            made: called with the step of an export that is there.
        """
        self.folder, self._train, self._record, self._made = run / EXPORTS, train, record, made
        self._waiting: list[int] = []
        for source in self.folder.glob(".step-*.source"):
            # the manifest is linked last: a source without it was cut off
            if (source / MANIFEST).is_file():
                self._waiting.append(int(source.name.removeprefix(".step-").removesuffix(".source")))
            else:
                shutil.rmtree(source, ignore_errors=True)
        self._waiting.sort()
        self._running: _RunningJob | None = None

    def offer(self, step: int, checkpoint: Path, last: bool) -> None:
        """Export a checkpoint that is complete, if it is one of those asked for; returns at once.

        Args:
            step: its step; every `export_every_checkpoints`-th of the regular checkpoints counts.
            checkpoint: its folder.
            last: whether it is the run's last one, which is always exported.
        """
        every = self._train.export_every_checkpoints * self._train.checkpoint_every_steps
        if every and (last or step % every == 0):
            try:
                if self._running is not None and self._running.step == step:
                    self.close()  # a resumed run has done the step again
                self._link(step, checkpoint)
            except OSError as e:
                self._fail(step, f"its files cannot be linked into {self.folder} ({e})")
                return
            self._waiting = [*(s for s in self._waiting if s != step), step]
        self.poll()
        # exports that are slower than checkpoints would pile up, each holding a whole checkpoint on the disk
        # by its links
        while len(self._waiting) > 1:
            self._fail(self._waiting.pop(0), "a newer checkpoint was ready before it was begun")

    def poll(self) -> None:
        """Take note of an export that has ended, and begin the next one; returns at once."""
        if self._running is not None and self._running.process.exit_code is not None:
            self._end(self._running)
        if self._running is None and self._waiting:
            step = self._waiting.pop(0)
            try:
                self._running = self._begin(step)
            except OSError as e:
                self._fail(step, f"its process cannot be started ({e})")

    def wait(self) -> None:
        """Finish everything; for the end of a run, when nothing is held up any more."""
        self.poll()
        while self._running is not None:
            time.sleep(_EXPORT_WAIT_S)
            self.poll()

    def close(self) -> None:
        """End the running export, if any; it goes on where it was when the run is resumed."""
        if self._running is not None:
            self._running.process.kill()
            self._running = None

    def _source(self, step: int) -> Path:
        return self.folder / f".step-{step}.source"

    def _log(self, step: int) -> Path:
        return self.folder / f".step-{step}.log"

    def _link(self, step: int, checkpoint: Path) -> None:
        """Link the files that a conversion reads (not those of the optimizer), the manifest last:
        then they are all there."""
        manifest = read_manifest(checkpoint)
        others = tuple(f"{part}/" for part in manifest.content["parts"] if part not in (MODEL, ADAPTER))
        source = self._source(step)
        shutil.rmtree(source, ignore_errors=True)
        for name in [*(n for n in manifest.files if not n.startswith(others)), MANIFEST]:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(checkpoint / name, source / name)

    def _begin(self, step: int) -> _RunningJob:
        argv = ["convert", "to-hf", str(self._source(step)), str(self.folder / f"step-{step}"), "--workers",
                "1", "--overwrite"]
        argv += [word for reference in models.FAMILY_PLUGINS.named() for word in ("--plugin", reference)]
        return _RunningJob(step, BackgroundProcess([sys.executable, "-m", "megatron_sov", *argv],
                                                   self._log(step)))

    def _end(self, running: _RunningJob) -> None:
        step, self._running = running.step, None
        if running.process.exit_code == 0:
            self._record("export", step=step, path=f"{EXPORTS}/step-{step}", export_s=running.process.took_s)
            self._forget(step)
            self._made(step)
        else:
            self._fail(step, running.process.last_words)

    def _fail(self, step: int, why: str) -> None:
        self._record("export", step=step, error=why)
        warn(f"the export of step {step} was not made: {why}", self._record, step=step)
        self._forget(step)

    def _forget(self, step: int) -> None:
        shutil.rmtree(self._source(step), ignore_errors=True)
        with contextlib.suppress(OSError):
            self._log(step).unlink()


class SideJobs:
    """Exports and evaluations of one run; nothing here holds the run up."""

    def __init__(self, run: Path, config: RunConfig, record: Callable[..., None]) -> None:
        """Find what an earlier process of the run left; starts nothing.

        Args:
            run: the run's folder.
            config: its settings.
            record: writes an event: `record(name, **fields)`.
        """
        self._average = partial(average_checkpoints, run, config.train, record)
        self._evaluations = ExportEvaluations(run, config, record)
        self._exports = CheckpointExports(run, config.train, record,
                                lambda step: _without_harm(lambda: self._evaluations.offer(step)))

    def offer(self, step: int, checkpoint: Path, last: bool) -> None:
        """Export a complete checkpoint, if it is one of those asked for,
        and have the export judged; returns at once."""
        self._exports.offer(step, checkpoint, last)

    def poll(self) -> None:
        """Take note of what has ended, and begin what is next; returns at once."""
        self._exports.poll()
        _without_harm(self._evaluations.poll)

    def wait(self) -> None:
        """Finish everything; for the end of a run, when nothing is held up any more."""
        self._average()
        # before the evaluations: an export that ends still offers one
        self._exports.wait()
        self._evaluations.wait()

    def close(self) -> None:
        """End what is running; it goes on when the run is resumed."""
        self._exports.close()
        self._evaluations.close()


def _without_harm(action: Callable[[], None]) -> None:
    """Do something that a file system may refuse, which is no reason to end a run."""
    try:
        action()
    except OSError as e:
        warn(f"evaluations beside training cannot be followed ({e})")
