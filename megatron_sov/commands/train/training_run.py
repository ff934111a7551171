"""Runs a training stage: converts the start, builds objective and stage, and trains."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST, translate_disk_errors, write_atomically
from megatron_sov.base.command_line import import_reference
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.kinds import STAGE_KINDS, TrainingKind
from megatron_sov.commands.train.setup.training import TrainingRequest
from megatron_sov.engine.parallel import launcher
from megatron_sov.model.config import RunConfig
from megatron_sov.model.objectives import Factory, get_factory
from megatron_sov.model.pretrained import find_hub_name, is_hf_folder
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.stages.launch import report_completion, run_stage
from megatron_sov.train.stages.shared_copies import (
    SHARED, STAMPS, digest_files, digest_stats, find_copy, list_model_files)
from megatron_sov.train.stages.stage import Stage
from megatron_sov.work.progress.locks import critical_section

FillStage = Callable[[TrainingRequest, Stage], Stage]


def run_training(request: TrainingRequest, fill_stage: FillStage | None = None) -> None:
    """Train a stage to its end.

    Args:
        request: checked arguments.
        fill_stage: adds data, inputs and hooks of the kind of stage; None: `TrainingKind.fill_stage`.

    Raises:
        UserError: settings, data or folder do not allow the run.
        StopRequested: the run was asked to stop, and everything is saved.
        GateFailed: the gate of the stage did not pass.
    """
    options, folder = request.options, RunFolder(request.options.run)
    if request.completion is not None:
        report_completion(folder, request.config, request.completion, dry_run=options.dry_run)
        return
    request = convert_request_start(request)
    kind, config = STAGE_KINDS[options.stage], request.config
    stage = Stage(
        config=config, folder=folder, objective=get_factory(config, load_objective(kind, config)),
        start_from=request.start, resume=options.resume, faults=request.faults,
        until=options.until, dry_run=options.dry_run, notes=request.notes, memory=request.memory)
    if fill_stage is None and kind.fill_stage:
        fill_stage = import_reference(kind.fill_stage)
    run_stage(stage if fill_stage is None else fill_stage(request, stage), options.nproc)


def load_objective(kind: TrainingKind, config: RunConfig) -> Factory:
    """Import the objective class for a kind of stage."""
    loaded: Any = import_reference(kind.objective)
    factory: Factory = loaded(config) if kind.is_chosen_by_settings else loaded
    return factory


def convert_request_start(request: TrainingRequest) -> TrainingRequest:
    """Return the request with a checkpoint instead of a Hugging Face folder; a dry run converts nothing."""
    options = request.options
    if request.start is None or options.dry_run:
        return request
    return dataclasses.replace(request, start=convert_start(request.start, options.run))


def convert_start(start: Path, run: Path) -> Path:
    """Return the checkpoint that a run starts from. Convert a Hugging Face folder unless a run in the same
    parent folder has done so; `UserError` if the folder changes meanwhile."""
    if not is_hf_folder(start):
        return start
    if (copy_found := find_copy(start, run)) is not None:
        return copy_found
    stamp, name = digest_stats(start), find_hub_name(start).replace("/", "--")[:100]
    copy = run.parent / SHARED / f"{name}-{digest_files(list_model_files(start))}"
    stamps = copy.parent / STAMPS / copy.name
    with translate_disk_errors(stamps):
        stamps.mkdir(parents=True, exist_ok=True)
        with critical_section(stamps):  # if two runs start together, the second finds the first run's copy
            if not (copy / MANIFEST).is_file():
                if code := launcher.run_in_fork(lambda: convert.from_hf(start, copy, redo=True)):
                    raise SystemExit(code)
                if digest_stats(start) != stamp:
                    shutil.rmtree(copy)
                    raise UserError(f"--from {start}: its files changed while they were converted; repeat "
                                    "the command after they are complete")
            write_atomically(stamps / stamp, "")
    return copy
