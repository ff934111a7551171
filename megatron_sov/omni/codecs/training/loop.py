"""The loop that trains a codec: steps, events, what is kept to continue from, and its folder at the end.

What is under way lies in `OUTPUT.training` beside the output.  The same command, started again after a kill,
goes on from what was kept last and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import atomic_write, refuse_existing, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.omni.codecs.folder import KIND, save_codec
from megatron_sov.omni.codecs.training.state import load_state, save_state
from megatron_sov.omni.codecs.training.task import CodecTask
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.work.progress.locks import holding
from megatron_sov.work.progress.progress_bar import work_bar

SETTINGS, CHECKPOINT = "settings.json", "checkpoint"


@dataclass(frozen=True)
class CodecTrainingPlan:
    """How long a training goes, and where it writes."""

    kind: str
    """Kind of the codec, one of `known.KNOWN`."""
    output: Path
    """The codec's folder."""
    steps: int
    """Optimizer steps in all."""
    settings: Mapping[str, Any]
    """Everything that the result is a function of; a training is continued with the same ones alone."""
    checkpoint_every_s: float = 60.0
    """Seconds between two states that are kept."""
    look_every: int = 0
    """Steps between two looks at held-out media; 0: at the end alone."""
    overwrite: bool = False
    """Replace a codec that is already at the output."""


def train(plan: CodecTrainingPlan, make_task: Callable[[Path], CodecTask]) -> dict[str, float]:
    """Train, or go on, and write the codec; returns the last figures.

    Args:
        plan: how long, and where to.
        make_task: is given the folder for what is under way, where media may be kept as training reads them.

    Raises:
        UserError: the output is taken, another process trains it, or what is under way has other settings.
    """
    refuse_existing(plan.output, KIND, plan.overwrite)
    folder = plan.output.with_name(f"{plan.output.name}.training")
    with _own_folder(folder, plan.settings):
        task = make_task(folder)
        first = load_state(folder / CHECKPOINT, task)
        events = EventLog(folder / EVENTS)
        try:
            _steps(plan, task, folder, events, first)
            figures = task.look()
            events.write("codec_heldout", step=plan.steps, **figures)
        finally:
            events.close()
        save_codec(plan.output, plan.kind, task.codec(), training=plan.settings, overwrite=plan.overwrite,
                   facts={"steps": plan.steps, "heldout": figures}, files={EVENTS: folder / EVENTS})
    shutil.rmtree(folder, ignore_errors=True)
    return figures


def _steps(plan: CodecTrainingPlan, task: CodecTask, folder: Path, events: EventLog, first: int) -> None:
    """Take the steps that are left."""
    kept_s = time.monotonic()
    with work_bar("training", plan.steps, "step") as bar:
        bar.update(first)
        for step in range(first + 1, plan.steps + 1):
            figures = task.learn(step)
            events.write("codec_step", step=step, **figures)
            if not math.isfinite(figures["loss"]):
                raise UserError(f"{folder}: the loss of step {step} is {figures['loss']}; lower "
                                f"learning.learning_rate, and delete {folder} to begin again")
            bar.update(1)
            if plan.look_every and step % plan.look_every == 0 and step < plan.steps:
                events.write("codec_heldout", step=step, **task.look())
            if time.monotonic() - kept_s >= plan.checkpoint_every_s or step == plan.steps:
                save_state(folder / CHECKPOINT, task, step)
                kept_s = time.monotonic()


@contextmanager
def _own_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder of a training, which is made, or continued where it has the same settings."""
    with holding(folder, folder):
        _refuse_other_settings(folder, json.loads(to_json(dict(settings))))
        yield


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or raise `UserError` where others were trained with."""
    file = folder / SETTINGS
    if not file.exists():
        atomic_write(file, to_json(settings))
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    if before != settings:
        known = before if isinstance(before, dict) else {}
        differs = [key for key in settings if known.get(key) != settings[key]]
        raise UserError(f"{folder}: is a training with other settings ({', '.join(differs) or 'more'}); "
                        f"give the same ones to go on, or delete {folder} to begin again")
