"""Runs one training stage: checks all that can be checked cheaply, starts the ranks, says how it ended."""

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
from megatron_sov.plan.calibration.fitting import (
    fullest, refuse_on_this_machine, refuse_on_this_node, refuse_too_large)
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
from megatron_sov.train.guards.gate import EndGate, Gate, GateView, conclude
from megatron_sov.train.loop import train
from megatron_sov.train.objectives.objective import get_columns, get_formats
from megatron_sov.train.side_jobs.evaluations import check_eval_tasks
from megatron_sov.train.side_jobs.side_jobs import SideJobs
from megatron_sov.train.stages.announcement import format_banner, format_summary, memory_of
from megatron_sov.train.stages.shared_copies import SHARED, find_copy
from megatron_sov.train.trainer import ObjectiveFactory, Trainer
from megatron_sov.work.processes.stop_signals import StopFlag


@dataclass(frozen=True)
class Stage:
    """One training stage, ready to run."""

    config: RunConfig
    """Resolved settings."""
    folder: RunFolder
    """Where the run lives."""
    objective: ObjectiveFactory
    """What is learned."""
    start_from: Path | None = None
    """Checkpoint whose weights the run starts from, or, in a dry run, the Hugging Face folder that would
    become one; None: initial weights."""
    resume: bool = False
    """Continue a run that is already in the folder."""
    sources: tuple[Source, ...] | None = None
    """Those of `config.data.paths`, where they are open already; None: they are opened here."""
    extra_sources: tuple[Source, ...] = ()
    """Sources made on the fly, beside those of `config.data.paths`."""
    besides: tuple[dict[str, str], ...] = ()
    """Artifacts that are learned from beside data and start, as `provenance` has them, for the records: what
    a teacher said, another model's log-probabilities."""
    before: Callable[[GateView], object] | None = None
    """Called on every rank before the first step of a new run; what it returns does not matter."""
    after: Callable[[GateView], dict[str, Any]] | None = None
    """Called on every rank after the last step; what it returns joins the completion manifest."""
    gate: Gate | None = None
    """What must pass for the stage to be complete."""
    end_gate: EndGate | None = None
    """What judges the last checkpoint; the stage is complete when it has passed."""
    feed: Feed | None = None
    """What brings data that are not there yet when the run begins."""
    faults: tuple[Fault, ...] = ()
    """Faults that are to come on purpose."""
    until: int | None = None
    """Step behind which it ends as if asked to stop; None: its last one."""
    dry_run: bool = False
    """Whether it is checked and told of, and not run."""
    notes: tuple[str, ...] = ()
    """Defaults that were taken, and why, in words."""


def run_stage(stage: Stage, nproc: int | None, start_s: float | None = None) -> bool:
    """Run a stage to its end.

    Args:
        stage: what to run.
        nproc: local processes.
        start_s: Unix time at which the work on the stage began; None: the start of the command.

    Returns:
        Whether it is complete, or a dry run; False only under a launcher, whose ranks leave in peace however
        a run ended.

    Raises:
        UserError: settings, data or folder do not allow it; nothing was changed.
        StopRequested: it was asked to stop, and everything is saved.
        GateFailed: its gate has not passed within its steps, and everything is saved.
    """
    begin = _Begin(get_command_start() if start_s is None else start_s, stage.resume)
    stage.config.check(num_ranks(nproc))
    models.get_family(stage.config.model.family).check(stage.config.model)
    # torchrun starts the same command again
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    begin.goes_on = begin.goes_on or restarted
    stage.folder.enter(stage.config, begin.goes_on)
    completion = stage.folder.completion()
    if completion is not None:
        gate = None if stage.end_gate is None else stage.end_gate.name
        tell_complete(stage.folder, stage.config, completion, gate, dry_run=stage.dry_run)
        return True
    refuse_on_this_machine(stage.config, nproc)
    data = _open_data(stage)
    _check_start(stage, data)
    if stage.dry_run:
        _tell(stage, data, num_ranks(nproc))
        return True
    if stage.notes and is_first_rank():
        print(_defaults(stage), file=sys.stderr, flush=True)
    return _run_ranks(stage, data, begin, nproc)


def _run_ranks(stage: Stage, data: _Data, begin: _Begin, nproc: int | None) -> bool:
    """Start the processes of a stage and wait for their end; returns and raises what `run_stage` does."""
    stage.folder.clear_gate_failure()
    if stage.end_gate is not None:
        stage.end_gate.begin()
    restarts = launcher.RestartPolicy(stage.config.train.max_restarts,
                              lambda: checkpoints.latest_checkpoint(stage.folder.checkpoints),
                              partial(_note_restart, stage.folder, begin), partial(_note_giving_up, stage))
    try:
        code = launcher.launch_ranks(lambda: _rank(stage, data, begin), nproc, stage.config.train.num_threads,
                                     restarts)
    except KeyboardInterrupt:  # the second one; before the folder holds the run there is nothing to resume
        if not begin.declared[0]:
            raise
        raise StopRequested(f"left at once; {_way_on(stage.folder)}") from None
    if code != 0:
        # only a folder that these ranks declared; one that was there before is another run's
        if code == ExitCode.USER_ERROR and begin.declared[0] and not begin.goes_on:
            stage.folder.remove_unstarted()
        raise SystemExit(code)  # the rank that failed has said why
    conclude(stage.folder, stage.end_gate)
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
    raise StopRequested(f"everything is saved; {_way_on(stage.folder)}")


def _way_on(folder: RunFolder) -> str:
    """Return the step of a run's last checkpoint and the command that continues the run."""
    newest = checkpoints.latest_checkpoint(folder.checkpoints)
    step = "no checkpoint yet"
    if newest is not None:
        step = f"last checkpoint: step {checkpoints.checkpoint_step(newest)}"
    # A stage of an extension is continued with the whole run.
    run = folder.path.parents[1] if folder.path.parent.name == STAGES else folder.path
    return f"{step}; continue with: megatron-sov resume {shlex.quote(str(run))}"


def tell_complete(folder: RunFolder, config: RunConfig, completion: dict[str, Any], gate: str | None, *,
                  dry_run: bool) -> None:
    """Say that a run is complete, and, but in a dry run, make what it has begun beside its steps."""
    if is_first_rank():
        print(f"{folder.path}: is complete at step {completion['step']}")
        if gate is not None and gate not in completion:
            warn(f"{folder.path}: was complete before a gate was asked for, and is not judged")
    if not dry_run:
        _finish_side_jobs(folder, config)


def _tell(stage: Stage, data: _Data, count: int) -> None:
    """Print what `count` processes would do."""
    if not is_first_rank():
        return
    newest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    steps = range(checkpoints.checkpoint_step(newest) if newest else 0, stage.config.num_steps())
    if stage.notes:
        print(_defaults(stage))
    print(format_banner(stage.config, count, stage.folder.path, steps, data.planned, data.sources,
                 memory_of(stage.config, count)))
    told = newest or stage.start_from or f"initial weights, train.seed = {stage.config.train.seed}"
    print(f"  start      {told}")
    start, run = stage.start_from, stage.folder.path
    if start is not None and is_hf_folder(start) and find_copy(start, run) is None:
        print(f"  converts   {start} into {run.parent / SHARED} first")
    print("dry run: nothing was written, and nothing ran")


def _defaults(stage: Stage) -> str:
    return f"defaults: {', '.join(stage.notes)}"


def _check_start(stage: Stage, data: _Data) -> None:
    """Raise `UserError` where a run cannot start from what it is to start from."""
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
    """What the ranks read, opened and planned before they start: those that are forked inherit it."""

    sources: list[Source]
    """All sources, views and those made on the fly included."""
    planned: list[LedgerEntry]
    """The ledger that the settings ask for."""


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
        read_tokenizer(tokenizer)  # what is damaged would else be met at the first evaluation, steps later
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
    """Make the exports that a complete run has begun, and judge them; no rank waits in a
    collective any more."""
    if is_first_rank():
        SideJobs(folder.path, config, RunEvents(folder.path).add).wait()


@dataclass
class _Begin:
    """The beginning of the work of the ranks that are started next."""

    time_s: float
    """Unix time."""
    goes_on: bool
    """Whether the folder may hold the run already."""
    restarts: list[dict[str, Any]] = field(default_factory=list)
    """Events of those that came before the folder held the run; whoever opens its records writes them."""
    shared: int = field(default_factory=lambda: _byte_for_ranks())
    """File descriptor of `declared`; -1: forked ranks alone share it."""
    declared: mmap.mmap = field(init=False)
    """One byte that the ranks share with this process: 1 once the folder holds this run."""

    def __post_init__(self) -> None:
        self.declared = mmap.mmap(self.shared, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Begin, (self.time_s, self.goes_on, self.restarts, self.shared)


def _byte_for_ranks() -> int:
    """Return a file of one byte in memory, which new processes inherit; -1 where the system has none."""
    if not hasattr(os, "memfd_create"):
        return -1
    file = os.memfd_create("declared", 0)
    os.truncate(file, 1)
    return file


def _note_restart(folder: RunFolder, begin: _Begin, code: int, cause: str) -> None:
    """Say that the processes are started again; they hold no records at that moment."""
    begin.time_s, begin.goes_on = time.time(), True
    newest = checkpoints.latest_checkpoint(folder.checkpoints)
    text = f"{cause}; all processes are started again, from {newest.name if newest else 'the beginning'}"
    warn(text)
    event = {"step": checkpoints.checkpoint_step(newest) if newest else 0, "exit_code": code, "text": text}
    if not (folder.path / EVENTS).is_file():  # it ended before the run had begun
        begin.restarts.append(event)
        return
    begin.restarts.clear()
    RunEvents(folder.path).add("restart", **event)


def _note_giving_up(stage: Stage, code: int, cause: str) -> None:
    """Say that the processes are not started again."""
    limit, newest = stage.config.train.max_restarts, checkpoints.latest_checkpoint(stage.folder.checkpoints)
    text = (f"{cause}, and train.max_restarts = {limit} " + ("starts in a row have left no new checkpoint"
                                                             if limit else "lets no process start again")
            + "; find the cause above, and go on with --resume")
    print(f"error: {text}", file=sys.stderr, flush=True)
    if (stage.folder.path / EVENTS).is_file():
        RunEvents(stage.folder.path).add(
            "failure", step=checkpoints.checkpoint_step(newest) if newest else 0, exit_code=code, text=text)


def _rank(stage: Stage, data: _Data, begin: _Begin) -> int:
    stop = StopFlag()
    if stage.config.train.deterministic:
        device.enable_determinism()
    if on_gpu():
        device.set_run_variables(stage.config)
    latest = checkpoints.latest_checkpoint(stage.folder.checkpoints)
    faults = FaultInjector(stage.faults, stage.folder.path, int(os.environ["RANK"]))
    faults.trigger("start", checkpoints.checkpoint_step(latest) if latest else 0)
    place = world.join_world(stage.config.parallel, _bytes_of_own_gpu(stage.config))
    lock = RunLock(stage.folder.path) if place.is_main else None
    trainer: Trainer | None = None
    try:
        te = specs.uses_transformer_engine(specs.PRECISION[stage.config.train.precision])
        run_on_main(place, lambda: gpu_settings.check_gpu_settings(stage.config, te))
        run_on_main(place, lambda: check_fp8_support(stage.config.train, te))
        run_on_main(place, lambda: _lock(stage, lock, begin))
        newest = _own_checkpoint(stage, place)
        trainer = Trainer(stage.config, place, stage.folder, data.sources, stage.objective, stage.gate,
                          stage.faults, begin.time_s, data.planned,
                          initial_weights=newest is None and stage.start_from is None, feed=stage.feed)
        resumed = _restore(stage, trainer, newest)
        run_on_main(place, lambda: _open(stage, trainer, begin))
        with stop.answer_first_signal(trainer.answer_stop) if place.is_main else contextlib.nullcontext():
            if stage.before is not None and not resumed:
                stage.before(trainer)
            if stage.gate is not None and not resumed:
                stage.gate.begin(trainer)
            is_complete = train(trainer, stop, stage.until)
        if is_complete:
            _finish(stage, trainer)
    except Exception as e:
        if trainer is not None:
            with contextlib.suppress(UserError):  # a full disk may be what the mistake is about
                trainer.abandon()
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
    # nobody leaves while rank 0 still works: the end of a process breaks the connections of all
    dist.barrier()
    world.leave_world()
    return 0


def _bytes_of_own_gpu(config: RunConfig) -> int:
    """Return what a rank takes at least of its GPU's memory; 0 on CPUs.

    Raises:
        UserError: no such GPU has so much, or the host too little for all of its ranks.
    """
    gpu = device.get_gpu() if on_gpu() else None
    refuse_on_this_node(config, gpu)
    if gpu is None:
        return 0
    refuse_too_large(config, num_ranks(None), gpu)
    return fullest(config, num_ranks(None))[1].total


def _lock(stage: Stage, lock: RunLock | None, begin: _Begin) -> None:
    stage.folder.create()
    if lock is not None:
        lock.acquire()
    # another run may have come and gone since the folder was looked at, without a lock
    stage.folder.enter(stage.config, begin.goes_on)


def _own_checkpoint(stage: Stage, place: world.ParallelWorld) -> Path | None:
    """Return the newest sound checkpoint of the run, from which it goes on; None: it has none yet."""
    folder = stage.folder.checkpoints
    run_on_main(place, lambda: checkpoints.delete_leftovers(folder))
    newest = find_sound_checkpoint(stage.folder, place)
    if newest is None:
        run_on_main(place, lambda: checkpoints.check_sound_checkpoint_exists(folder))
    return newest


def _restore(stage: Stage, trainer: Trainer, newest: Path | None) -> bool:
    """Load what the run starts from; returns whether it goes on from a checkpoint of its own."""
    start = newest or stage.start_from
    if stage.config.lora.on and start is not None:  # before it is read: its run may be pruning
        run_on_main(trainer.world, lambda: checkpoints.protect_adapter_base(
            (checkpoints.read_adapter_base(start) or checkpoints.AdapterBase.from_checkpoint(start)).path))
    if newest is not None:
        if stage.start_from is not None:
            check_adapter_base(newest, stage.start_from)
        trainer.guards.faults.trigger("load", checkpoints.checkpoint_step(newest))
        trainer.resume(newest)
        _tell_changes(stage, trainer)
        return True
    if stage.start_from is not None:
        trainer.load_start_weights(stage.start_from)
    return False


def _tell_changes(stage: Stage, trainer: Trainer) -> None:
    """Say that a run goes on with another learning rate than it would have had."""
    earlier = stage.folder.config()
    told = describe_schedule_change(earlier, stage.config, trainer.step) if earlier is not None else None
    if told is not None and trainer.world.is_main:
        warn(f"{stage.folder.path}: {told}")


def _open(stage: Stage, trainer: Trainer | None, begin: _Begin) -> None:
    stage.folder.declare(stage.config, 0 if trainer is None else trainer.step)
    begin.declared[0] = 1
    if trainer is not None:
        trainer.open_records(stage.besides)
        for restart in begin.restarts:
            trainer.events.write("restart", **restart)


def _finish(stage: Stage, trainer: Trainer) -> None:
    if stage.gate is not None and not stage.gate.passed:
        failure = stage.gate.failure()
        trainer.recorder.record_gate_failure(trainer.step, failure)
        run_on_main(trainer.world, lambda: stage.folder.mark_gate_failed(failure))
        return
    extra = stage.after(trainer) if stage.after is not None else {}
    last = stage.folder.checkpoint(trainer.step)
    # with a gate at the end the completion manifest waits for its verdict: chains look at that file alone
    end = stage.folder.complete if stage.end_gate is None else stage.folder.mark_awaiting_gate
    run_on_main(trainer.world, lambda: end({
        "step": trainer.step, "tokens": trainer.state.tokens, "wall_s": trainer.wall_s(),
        "checkpoint": f"{stage.folder.checkpoints.name}/{last.name}",
        "checkpoint_sha256": manifest_sha256(last), **extra}))
    if trainer.world.is_main:
        told = format_summary(stage.folder.path, last, trainer.state, trainer.wall_s(), trainer.config,
                       trainer.recorder.headline, trainer.sources)
        print(f"{told}\n", end="", file=sys.stderr, flush=True)
