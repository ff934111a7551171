"""Running a training stage: checks of folder, data and start, then the ranks, then the end gate."""

from __future__ import annotations

import contextlib
import mmap
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, UserError, warn
from megatron_sov.chat.vocabulary import check_same_tokens, read_tokenizer
from megatron_sov.engine.model import gpu_settings, specs
from megatron_sov.engine.model.gpu_settings import check_fp8_support
from megatron_sov.engine.parallel import device, launcher, world
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.model.process_memory import MemoryEstimate
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import STAGES, RunEvents, RunFolder
from megatron_sov.runs.launch_environment import get_command_start, has_launcher, is_first_rank, num_ranks
from megatron_sov.runs.lock import RunLock
from megatron_sov.runs.obs.events import EVENTS
from megatron_sov.schedules import describe_schedule_change
from megatron_sov.train.checkpointer import check_adapter_base, find_sound_checkpoint
from megatron_sov.train.data.ledger import (
    LedgerEntry, check_pairs_fit, check_units_fit, count_over_long, plan_ledger)
from megatron_sov.train.data.requirements import check_columns, check_routes_and_encoders
from megatron_sov.train.data.token_shards import Source, open_sources, tokenizer_folder
from megatron_sov.train.data.views import add_source_views
from megatron_sov.train.feed import Feed
from megatron_sov.train.guards.fault_injection import Fault, FaultInjector, list_pending_faults
from megatron_sov.train.guards.gate import EndGate, Gate, GateView
from megatron_sov.train.loop import start_run, train
from megatron_sov.train.objectives.objective import get_columns, get_formats
from megatron_sov.train.side_jobs.evaluations import check_eval_tasks
from megatron_sov.train.side_jobs.side_jobs import SideJobs
from megatron_sov.train.stages.announcement import format_banner, format_summary
from megatron_sov.train.stages.shared_copies import SHARED, find_copy
from megatron_sov.train.trainer import ObjectiveFactory, Trainer, TrainerOptions
from megatron_sov.work.processes.stop_signals import StopFlag


@dataclass(frozen=True)
class Stage:
    """Inputs and hooks for a training stage, such as pretraining or one stage of an extension."""

    config: RunConfig
    folder: RunFolder
    objective: ObjectiveFactory
    start_from: Path | None = None
    """Checkpoint with start weights (in a dry run, a Hugging Face folder to convert); default: initial
    weights."""
    resume: bool = False
    """Whether to continue a run that is already in `folder`."""
    sources: tuple[Source, ...] | None = None
    """Sources in `config.data.paths`; opened by `run_stage` by default."""
    extra_sources: tuple[Source, ...] = ()
    """Sources whose documents are built in memory or during the run."""
    extra_inputs: tuple[dict[str, str], ...] = ()
    """Artifacts in addition to data and start (`describe_input`), for the records."""
    before: Callable[[GateView], object] | None = None
    """Called on every rank before a new run's first step."""
    after: Callable[[GateView], dict[str, Any]] | None = None
    """Called on every rank after the last step; returns fields for the completion manifest."""
    gate: Gate | None = None
    """Judges the model during training; must pass before the stage is complete."""
    end_gate: EndGate | None = None
    """Judges the last checkpoint; must pass before the stage is complete."""
    feed: Feed | None = None
    """Supplies data that appear during the run."""
    faults: tuple[Fault, ...] = ()
    """Faults to inject."""
    until: int | None = None
    """Step after which the run stops early; default: train to the last step."""
    dry_run: bool = False
    """Whether to check and describe the stage without running it."""
    notes: tuple[str, ...] = ()
    """Automatically chosen defaults, with reasons."""
    memory: MemoryEstimate | None = None
    """Predicted memory, for the banner and for checking each GPU's free memory."""


def run_stage(stage: Stage, nproc: int | None, start_s: float | None = None) -> bool:
    """Run a stage with `nproc` local processes, and return True if it is complete or `stage.dry_run` is set.

    `start_s` is the Unix time at which work on the stage began; default: the start of the command.

    Raises `UserError` before any change if settings, data or folder do not allow the stage, and, with
    everything saved, `StopRequested` after a stop request and `GateFailed` if the gate did not pass. Under
    torchrun or Slurm it returns False in these two cases, so that the ranks exit normally.
    """
    launch = _Launch(get_command_start() if start_s is None else start_s, stage.resume)
    stage.config.check(num_ranks(nproc))
    models.get_family(stage.config.model.family).check(stage.config.model)
    # torchrun restarts a run by repeating the command, without --resume
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    launch.may_resume = launch.may_resume or restarted
    stage.folder.enter(stage.config, launch.may_resume)
    completion = stage.folder.completion()
    if completion is not None:
        gate = None if stage.end_gate is None else stage.end_gate.name
        report_completion(stage.folder, stage.config, completion, gate, dry_run=stage.dry_run)
        return True
    data = _open_data(stage)
    _check_start(stage, data)
    if stage.dry_run:
        _print_plan(stage, data, num_ranks(nproc))
        return True
    if stage.notes and is_first_rank():
        print(_format_defaults(stage), file=sys.stderr, flush=True)
    return _launch_ranks(stage, data, launch, nproc)


def _launch_ranks(stage: Stage, data: _Data, launch: _Launch, nproc: int | None) -> bool:
    """Start the ranks and wait for their end; return and raise as `run_stage`."""
    stage.folder.clear_gate_failure()
    if stage.end_gate is not None:
        stage.end_gate.begin()
    restarts = launcher.RestartPolicy(
        stage.config.train.max_restarts, lambda: checkpoints.latest_checkpoint(stage.folder.checkpoints),
        partial(_record_restart, stage.folder, launch), partial(_record_failure, stage))
    try:
        code = launcher.launch_ranks(lambda: _run_rank(stage, data, launch), nproc,
                                     stage.config.train.num_threads, restarts)
    except KeyboardInterrupt:  # the second Ctrl-C; nothing can be resumed before the folder contains the run
        if not launch.declared[0]:
            raise
        raise StopRequested(f"left at once; {_format_resume_hint(stage.folder)}") from None
    if code != 0:
        # a folder that these ranks did not declare belongs to an earlier run
        if code == ExitCode.USER_ERROR and launch.declared[0] and not launch.may_resume:
            stage.folder.remove_unstarted()
        raise SystemExit(code)  # the failed rank has printed the reason
    _conclude_end_gate(stage.folder, stage.end_gate)
    if stage.folder.completion() is not None:
        for fault in list_pending_faults(stage.faults, stage.folder.path):
            warn(f"--inject {fault.name}: never came")
        _finish_side_jobs(stage.folder, stage.config)
        return True
    failure = stage.folder.failure()
    if has_launcher():
        if failure is not None and is_first_rank():
            print(f"gate: {stage.folder.path}: {failure}", file=sys.stderr, flush=True)
        return False
    if failure is not None:
        raise GateFailed(f"{stage.folder.path}: {failure}")
    raise StopRequested(f"everything is saved; {_format_resume_hint(stage.folder)}")


def _conclude_end_gate(folder: RunFolder, gate: EndGate | None) -> None:
    """Let the gate judge the last checkpoint if its verdict is outstanding; complete or fail the stage."""
    completion = folder.held()
    if gate is None or completion is None:
        return
    verdict = gate.judge(folder.path / completion["checkpoint"])
    if verdict is None or not is_first_rank():
        return
    if verdict.failure is None:
        folder.complete({**completion, **verdict.completion})
    else:
        RunEvents(folder.path).add("gate_failed", step=completion["step"], text=verdict.failure)
        folder.mark_gate_failed(verdict.failure)
    # last: after a crash before this line, the checkpoint is judged again or the verdict is on the disk
    folder.release()


def _format_resume_hint(folder: RunFolder) -> str:
    """Return the last checkpoint's step and the command that continues the run."""
    newest = checkpoints.latest_checkpoint(folder.checkpoints)
    step = "no checkpoint yet"
    if newest is not None:
        step = f"last checkpoint: step {checkpoints.checkpoint_step(newest)}"
    # a stage of an extension continues with the whole run
    run = folder.path.parents[1] if folder.path.parent.name == STAGES else folder.path
    return f"{step}; continue with: megatron-sov resume {shlex.quote(str(run))}"


def report_completion(folder: RunFolder, config: RunConfig, completion: dict[str, Any], gate: str | None, *,
                      dry_run: bool) -> None:
    """Print that a run is complete, and finish its side jobs unless in a dry run."""
    if is_first_rank():
        print(f"{folder.path}: is complete at step {completion['step']}")
        if gate is not None and gate not in completion:
            warn(f"{folder.path}: was complete before a gate was asked for, and is not judged")
    if not dry_run:
        _finish_side_jobs(folder, config)


def _print_plan(stage: Stage, data: _Data, num_processes: int) -> None:
    """Print a dry run's result."""
    if not is_first_rank():
        return
    newest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    steps = range(checkpoints.checkpoint_step(newest) if newest else 0, stage.config.num_steps())
    if stage.notes:
        print(_format_defaults(stage))
    print(format_banner(stage.config, num_processes, stage.folder.path, steps, data.planned, data.sources,
                        stage.memory))
    start = newest or stage.start_from or f"initial weights, train.seed = {stage.config.train.seed}"
    print(f"  start      {start}")
    hf_folder, run = stage.start_from, stage.folder.path
    if hf_folder is not None and is_hf_folder(hf_folder) and find_copy(hf_folder, run) is None:
        print(f"  converts   {hf_folder} into {run.parent / SHARED} first")
    print("dry run: nothing was written, and nothing ran")


def _format_defaults(stage: Stage) -> str:
    return f"defaults: {', '.join(stage.notes)}"


def _check_start(stage: Stage, data: _Data) -> None:
    """Raise `UserError` if the start does not fit data or settings, or lies after `--until`."""
    newest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    if stage.until is not None and newest is not None and checkpoints.checkpoint_step(newest) >= stage.until:
        raise UserError(f"--until {stage.until}: the run is at step {checkpoints.checkpoint_step(newest)} "
                        "already; name a later step")
    if (start := newest or stage.start_from) is not None:
        check_same_tokens(tokenizer_folder(data.sources), checkpoints.find_tokenizer_folder(start))
    elif stage.config.lora.on:
        raise UserError(f"lora.rank = {stage.config.lora.rank}: adapters are trained beside a model that "
                        "exists; name it by --from")


@dataclass(frozen=True)
class _Data:
    """Training data, opened once and inherited by forked ranks."""

    sources: list[Source]
    """Sources, with views and `Stage.extra_sources`."""
    planned: list[LedgerEntry]
    """Entries from `plan_ledger`."""


def _open_data(stage: Stage) -> _Data:
    packed = stage.sources
    if packed is None:
        packed = tuple(open_sources(stage.config.data.paths, stage.config.model.vocab_size,
                                    get_formats(stage.objective)))
    check_eval_tasks(stage.config, packed)
    chats = [s.name for s in packed if s.is_chat]
    if chats and stage.config.objective.name == "lm" and is_first_rank():
        warn(f"{', '.join(chats)}: holds conversations, of which the answers alone are learned; "
             "`megatron-sov sft` is made for them")
    tokenizer = tokenizer_folder(list(packed))
    if tokenizer is not None:
        read_tokenizer(tokenizer)  # damage would otherwise show only at the first evaluation
    for source in packed:
        if source.num_tokens.get("heldout"):
            source.open_split("heldout")
    sources = [*add_source_views(stage.config, list(packed)), *stage.extra_sources]
    check_columns(sources, get_columns(stage.objective))
    check_routes_and_encoders(sources, stage.config.model)
    planned = plan_ledger(stage.config, sources)
    if stage.config.data.over_long == "refuse":
        check_units_fit(count_over_long(sources, planned))
    elif stage.config.data.over_long == "cut":
        check_pairs_fit(count_over_long([s for s in sources if s.group > 1], planned))
    return _Data(sources, planned)


def _finish_side_jobs(folder: RunFolder, config: RunConfig) -> None:
    """Finish exports and their evaluations on rank 0, after collectives have ended."""
    if is_first_rank():
        SideJobs(folder.path, config, RunEvents(folder.path).add).wait()


@dataclass
class _Launch:
    """Launcher state, inherited by the ranks."""

    time_s: float
    """Unix time."""
    may_resume: bool
    """Whether the folder may already contain the run."""
    restarts: list[dict[str, Any]] = field(default_factory=list)
    """`restart` events from before the folder contained the run, to be written when its records open."""
    shared: int = field(default_factory=lambda: _create_shared_byte())
    """File descriptor for `declared`; -1: only forked ranks share it."""
    declared: mmap.mmap = field(init=False)
    """One byte shared with the ranks: 1 once the folder contains this run."""

    def __post_init__(self) -> None:
        self.declared = mmap.mmap(self.shared, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Launch, (self.time_s, self.may_resume, self.restarts, self.shared)


def _create_shared_byte() -> int:
    """Create a memory file of one byte, which new processes inherit; return -1 if not supported."""
    if not hasattr(os, "memfd_create"):
        return -1
    file = os.memfd_create("declared", 0)
    os.truncate(file, 1)
    return file


def _record_restart(folder: RunFolder, launch: _Launch, code: int, cause: str) -> None:
    """Record that the ranks start again; called while no rank has the records open."""
    launch.time_s, launch.may_resume = time.time(), True
    newest = checkpoints.latest_checkpoint(folder.checkpoints)
    text = f"{cause}; all processes are started again, from {newest.name if newest else 'the beginning'}"
    warn(text)
    event = {"step": checkpoints.checkpoint_step(newest) if newest else 0, "exit_code": code, "text": text}
    if not (folder.path / EVENTS).is_file():  # the ranks ended before the run had begun
        launch.restarts.append(event)
        return
    launch.restarts.clear()
    RunEvents(folder.path).add("restart", **event)


def _record_failure(stage: Stage, code: int, cause: str) -> None:
    """Record that the ranks do not start again."""
    limit, newest = stage.config.train.max_restarts, checkpoints.latest_checkpoint(stage.folder.checkpoints)
    reason = "starts in a row have left no new checkpoint" if limit else "lets no process start again"
    text = (f"{cause}, and train.max_restarts = {limit} {reason}; find the cause above, and go on with "
            "--resume")
    print(f"error: {text}", file=sys.stderr, flush=True)
    if (stage.folder.path / EVENTS).is_file():
        RunEvents(stage.folder.path).add(
            "failure", step=checkpoints.checkpoint_step(newest) if newest else 0, exit_code=code, text=text)


def _run_rank(stage: Stage, data: _Data, launch: _Launch) -> int:
    """Train on one rank, and return its exit code."""
    stop = StopFlag()
    if stage.config.train.deterministic:
        device.enable_determinism()
    if on_gpu():
        device.set_run_variables(stage.config)
    latest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    faults = FaultInjector(stage.faults, stage.folder.path, int(os.environ["RANK"]))
    faults.trigger("start", checkpoints.checkpoint_step(latest) if latest else 0)
    needs_bytes = stage.memory.fullest if stage.memory is not None and on_gpu() else 0
    place = world.join_world(stage.config.parallel, needs_bytes)
    lock = RunLock(stage.folder.path) if place.is_main else None
    trainer: Trainer | None = None
    try:
        te = specs.uses_transformer_engine(specs.PRECISION[stage.config.train.precision])
        run_on_main(place, lambda: gpu_settings.check_gpu_settings(stage.config, te))
        run_on_main(place, lambda: check_fp8_support(stage.config.train, te))
        run_on_main(place, lambda: _lock_folder(stage, lock, launch))
        newest = _find_own_checkpoint(stage, place)
        trainer = Trainer(stage.config, place, stage.folder, data.sources, stage.objective, TrainerOptions(
            stage.gate, stage.faults, launch.time_s, data.planned, stage.feed,
            initial_weights=newest is None and stage.start_from is None))
        resumed = _load_start(stage, trainer, newest)
        run_on_main(place, lambda: _open_records(stage, trainer, launch))
        with stop.answer_first_signal(trainer.answer_stop) if place.is_main else contextlib.nullcontext():
            if stage.before is not None and not resumed:
                stage.before(trainer)
            if stage.gate is not None and not resumed:
                stage.gate.begin(trainer)
            if place.is_main:
                _print_banner(stage, trainer)
            start_run(trainer)
            is_complete = train(trainer, stop, stage.until)
        if is_complete:
            _complete_stage(stage, trainer)
    except Exception as e:
        if trainer is not None:
            with contextlib.suppress(UserError):  # the error may be about a full disk
                trainer.finish_after_error()
                if isinstance(e, UserError):
                    trainer.events.write("failure", step=trainer.step, text=str(e))
        raise
    finally:
        if stage.feed is not None:
            stage.feed.close()
        if trainer is not None:
            trainer.close()
        if lock is not None:
            lock.release()
            stage.folder.remove_if_empty()
    # the exit of a process breaks its connections, so every rank waits for rank 0
    dist.barrier()
    world.leave_world()
    return 0


def _print_banner(stage: Stage, trainer: Trainer) -> None:
    text = format_banner(stage.config, trainer.world.size, stage.folder.path,
                         range(trainer.step, trainer.num_steps), trainer.batches.ledger.entries,
                         trainer.sources, stage.memory, torch.get_num_threads())
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _lock_folder(stage: Stage, lock: RunLock | None, launch: _Launch) -> None:
    stage.folder.create()
    if lock is not None:
        lock.acquire()
    # checked again under the lock: a run may have started in the folder since `run_stage`
    stage.folder.enter(stage.config, launch.may_resume)


def _find_own_checkpoint(stage: Stage, place: world.ParallelWorld) -> Path | None:
    """Return the run's newest sound checkpoint, or None for a new run."""
    folder = stage.folder.checkpoints
    run_on_main(place, lambda: checkpoints.delete_leftovers(folder))
    newest = find_sound_checkpoint(stage.folder, place)
    if newest is None:
        run_on_main(place, lambda: checkpoints.check_sound_checkpoint_exists(folder))
    return newest


def _load_start(stage: Stage, trainer: Trainer, newest: Path | None) -> bool:
    """Load the run's checkpoint `newest`, or else `stage.start_from`; return whether the run resumes."""
    start = newest or stage.start_from
    if stage.config.lora.on and start is not None:
        # before loading: the base's own run may be pruning its checkpoints
        run_on_main(trainer.world, lambda: checkpoints.protect_adapter_base(
            (checkpoints.read_adapter_base(start) or checkpoints.AdapterBase.from_checkpoint(start)).path))
    if newest is not None:
        if stage.start_from is not None:
            check_adapter_base(newest, stage.start_from)
        trainer.guards.faults.trigger("load", checkpoints.checkpoint_step(newest))
        trainer.resume(newest)
        _warn_about_schedule_change(stage, trainer)
        return True
    if stage.start_from is not None:
        trainer.load_start_weights(stage.start_from)
    return False


def _warn_about_schedule_change(stage: Stage, trainer: Trainer) -> None:
    earlier = stage.folder.config()
    change = describe_schedule_change(earlier, stage.config, trainer.step) if earlier is not None else None
    if change is not None and trainer.world.is_main:
        warn(f"{stage.folder.path}: {change}")


def _open_records(stage: Stage, trainer: Trainer | None, launch: _Launch) -> None:
    stage.folder.declare(stage.config, 0 if trainer is None else trainer.step)
    launch.declared[0] = 1
    if trainer is not None:
        trainer.open_records(stage.extra_inputs)
        for restart in launch.restarts:
            trainer.events.write("restart", **restart)


def _complete_stage(stage: Stage, trainer: Trainer) -> None:
    """Write the completion manifest and print the summary, or record that the gate has not passed."""
    if stage.gate is not None and not stage.gate.passed:
        failure = stage.gate.failure()
        trainer.recorder.record_gate_failure(trainer.step, failure)
        run_on_main(trainer.world, lambda: stage.folder.mark_gate_failed(failure))
        return
    extra = stage.after(trainer) if stage.after is not None else {}
    last = stage.folder.checkpoint(trainer.step)
    # with an end gate, the completion manifest waits for the verdict: later stages look only for this file
    complete = stage.folder.complete if stage.end_gate is None else stage.folder.mark_awaiting_gate
    run_on_main(trainer.world, lambda: complete({
        "step": trainer.step, "tokens": trainer.state.tokens, "wall_s": trainer.wall_s(),
        "checkpoint": f"{stage.folder.checkpoints.name}/{last.name}",
        "checkpoint_sha256": manifest_sha256(last), **extra}))
    if trainer.world.is_main:
        summary = format_summary(stage.folder.path, last, trainer.state, trainer.wall_s(), trainer.config,
                                 trainer.recorder.headline, trainer.sources)
        print(f"{summary}\n", end="", file=sys.stderr, flush=True)
