"""Send a run's metrics to TensorBoard and Weights & Biases; failures never stop training.

`events.jsonl` contains the same data.
"""

import importlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.errors import UserError, format_install_command, warn
from megatron_sov.model.config import ObsConfig
from megatron_sov.runs.obs.validation import (
    RESPONSE_COLUMNS, RESPONSES, VALIDATION, extract_curves, response_rows)

WANDB_ID = "wandb-id"
"""File in the run folder with the Weights & Biases run id; a resumed run continues the same curves."""
_PASSWORD = re.compile(r"//[^/\s]*@")


class Tracker(Protocol):
    """A destination for a run's metrics."""

    name: str

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Send the metrics of one optimizer step."""

    def log_table(self, step: int, name: str, rows: Sequence[Sequence[Any]]) -> None:
        """Send a table of sampled responses with columns `COLUMNS`."""

    def close(self) -> None:
        """Send pending data."""


class _TensorBoard:
    """TensorBoard event files, written without TensorFlow or torch."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        summary = _import_package("tensorboard.summary", "obs.tensorboard", "tensorboard")
        self._folder = run_dir / "tensorboard"
        self._writer = summary.Writer(str(self._folder))
        self._samples: Any = None

    def log_step(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step=step)

    def log_table(self, step: int, name: str, rows: Sequence[Sequence[Any]]) -> None:
        if self._samples is None:
            # TensorBoard reads only the newest event file in a folder, so samples need their own folder.
            files = _import_package("tensorboard.summary.writer.event_file_writer", "obs.tensorboard",
                                    "tensorboard")
            self._samples = files.EventFileWriter(str(self._folder / "samples"))
        texts = _import_package("tensorboard.plugins.text.summary_v2", "obs.tensorboard", "tensorboard")
        event = _import_package("tensorboard.compat.proto.event_pb2", "obs.tensorboard", "tensorboard")
        table: list[Sequence[str]] = [RESPONSE_COLUMNS]
        for row in rows:
            # TensorBoard renders Markdown; indented text appears verbatim.
            table.append([f"    {_format_cell(cell)}".replace("\n", "\n    ") for cell in row])
        summary = texts.text_pb(f"samples/{name}", np.array(table, dtype=object))
        self._samples.add_event(event.Event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        self._writer.close()
        if self._samples is not None:
            self._samples.close()


class _Wandb:
    """A Weights & Biases run, online or offline according to WANDB_MODE."""

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, project: str, run_config_dict: dict[str, Any]) -> None:
        wandb = _import_package("wandb", "obs.wandb", "wandb")
        id_file = run_dir / WANDB_ID
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(8))
        run_id = id_file.read_text(encoding="utf-8").strip()
        self._run = wandb.init(project=project, id=run_id, resume="allow", dir=str(run_dir),
                               name=run_dir.resolve().name, config=run_config_dict,
                               settings=wandb.Settings(silent=True))
        # wandb's own step only grows, but a rolled-back run repeats steps: log the step as a value.
        self._run.define_metric("*", step_metric="step")

    def log_step(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def log_table(self, step: int, name: str, rows: Sequence[Sequence[Any]]) -> None:
        table = _import_package("wandb", "obs.wandb", "wandb").Table(
            columns=list(RESPONSE_COLUMNS), data=[[_format_cell(cell) for cell in row] for row in rows])
        self._run.log({"step": step, f"samples/{name}": table})

    def close(self) -> None:
        # Online, this waits for the upload.
        self._run.finish()


def _format_cell(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _import_package(module: str, setting: str, package: str, extra: str = "trackers") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{setting} = true needs the package {package}, which cannot be imported ({e}); "
                        f"{format_install_command(extra)}, or leave the setting out") from None


class Trackers:
    """Active trackers from the settings. A failing tracker is reported once on standard error and dropped.

    Create this in one process per run.

    Args:
        config: enabled trackers.
        run_dir: the run folder; TensorBoard writes to `tensorboard/`, wandb to `wandb/`.
        run_config_dict: resolved settings, displayed next to the curves.

    Raises:
        UserError: a tracker's package is not installed.
    """

    def __init__(self, config: ObsConfig, run_dir: Path, run_config_dict: dict[str, Any]) -> None:
        self._active: list[Tracker] = []
        if config.tensorboard:
            self._start_tracker(_TensorBoard.name, lambda: _TensorBoard(run_dir))
        if config.wandb:
            self._start_tracker(_Wandb.name, lambda: _Wandb(run_dir, config.wandb_project, run_config_dict))

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Send the metrics of one optimizer step, e.g. ``{"loss": 2.1, "learning_rate": 1e-4}``."""
        self._call_trackers(lambda tracker: tracker.log_step(step, values))

    def observe(self, event: dict[str, Any]) -> None:
        """Send an RL event: validation metrics, or sampled responses (`log_table`)."""
        if event["event"] == VALIDATION:
            self.log_step(event["step"], {f"{VALIDATION}/{name}": value
                                          for name, value in extract_curves(event).items()})
        elif event["event"] == RESPONSES:
            self._call_trackers(lambda tracker: tracker.log_table(event["step"], event["of"],
                                                                  response_rows(event)))

    def close(self) -> None:
        """Send pending data and close all trackers."""
        self._call_trackers(lambda tracker: tracker.close())
        self._active = []

    def _start_tracker(self, name: str, create: Callable[[], Tracker]) -> None:
        try:
            self._active.append(create())
        except UserError:
            raise
        except Exception as e:  # a missing network or login must not stop a requeued run
            _warn_failure(name, e)

    def _call_trackers(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                action(tracker)
            except Exception as e:  # tracker libraries may raise anything
                self._active.remove(tracker)
                _warn_failure(tracker.name, e)


def _warn_failure(name: str, error: Exception) -> None:
    message = _PASSWORD.sub("//...@", f"{type(error).__name__}: {error}")  # URLs may contain passwords
    warn(f"{name} failed ({message}); the run continues without it")
