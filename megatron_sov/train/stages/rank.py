"""Training on one rank: the lock on the run folder, the start, the training loop, and the completion."""

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.model import gpu_settings, specs
from megatron_sov.engine.model.gpu_settings import check_fp8_support
from megatron_sov.engine.parallel import world
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.gpu_setup import enable_determinism, set_run_variables
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.runs import checkpoints
from megatron_sov.runs.lock import RunLock
from megatron_sov.schedules import describe_schedule_change
from megatron_sov.train.checkpointer import check_adapter_base, find_sound_checkpoint
from megatron_sov.train.guards.fault_injection import FaultInjector
from megatron_sov.train.loop import start_run, train
from megatron_sov.train.stages.announcement import format_banner, format_summary
from megatron_sov.train.stages.stage import LaunchState, Stage, StageData
from megatron_sov.train.trainer import Trainer, TrainerOptions
from megatron_sov.work.processes.stop_signals import StopFlag


def run_rank(stage: Stage, data: StageData, launch: LaunchState) -> None:
    """Train on one rank."""
    stop = StopFlag()
    if stage.config.train.deterministic:
        enable_determinism()
    if on_gpu():
        set_run_variables(stage.config)
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
        options = TrainerOptions(gate=stage.gate, faults=stage.faults, began_s=launch.time_s,
                                 planned=data.planned, feed=stage.feed,
                                 initial_weights=newest is None and stage.start_from is None)
        trainer = Trainer(stage.config, place, stage.folder, data.sources, stage.objective, options)
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


def _print_banner(stage: Stage, trainer: Trainer) -> None:
    text = format_banner(stage.config, trainer.world.size, run=stage.folder.path,
                         steps=range(trainer.step, trainer.num_steps), entries=trainer.batches.ledger.entries,
                         sources=trainer.sources, memory=stage.memory, num_threads=torch.get_num_threads())
    print(f"{text}\n", end="", file=sys.stderr, flush=True)


def _lock_folder(stage: Stage, lock: RunLock | None, launch: LaunchState) -> None:
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


def _open_records(stage: Stage, trainer: Trainer | None, launch: LaunchState) -> None:
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
    run_on_main(trainer.world, lambda: stage.folder.complete({
        "step": trainer.step, "tokens": trainer.state.tokens, "wall_s": trainer.wall_s(),
        "checkpoint": f"{stage.folder.checkpoints.name}/{last.name}",
        "checkpoint_sha256": manifest_sha256(last), **extra}))
    if trainer.world.is_main:
        summary = format_summary(stage.folder.path, last, trainer.state, trainer.wall_s(), trainer.config,
                                 trainer.recorder.headline, trainer.sources)
        print(f"{summary}\n", end="", file=sys.stderr, flush=True)
