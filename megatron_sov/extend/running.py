"""Runs the stages of an extension one after the other; each starts from the one before,
when that is complete."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_sov.config import RunConfig
from megatron_sov.eval.heldout import HeldoutData
from megatron_sov.extend.decontamination import refuse_contaminated, search
from megatron_sov.extend.gate import StageGate, loss_of_checkpoint, short_context
from megatron_sov.extend.needles import Needles, make_needles, with_needles_in_blends
from megatron_sov.extend.stages import PlannedStage
from megatron_sov.generate.target import Target
from megatron_sov.obs.warning import warn
from megatron_sov.runs.checkpoints import find_checkpoint, latest
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.train.gate import EndGate
from megatron_sov.train.guards.fault_injection import Fault
from megatron_sov.train.objective import formats_of
from megatron_sov.train.stage import Stage, run_stage
from megatron_sov.train.trainer import ObjectiveFactory


def run_stages(stages: list[PlannedStage], start: Path, objective: ObjectiveFactory, nproc: int | None,
               resume: bool, began_s: float, faults: tuple[Fault, ...] = (),
               end_gate: EndGate | None = None, *, dry_run: bool = False) -> None:
    """Run all stages; under a launcher it returns where one of them is not complete, else it raises.

    Args:
        stages: as planned.
        start: the checkpoint that the first one starts from, and by whose short-context loss all are judged.
        objective: what is learned.
        nproc: local processes.
        resume: whether folders may hold the runs already.
        began_s: Unix time at which the work on the first stage that is not complete began.
        faults: what is to come on purpose, once in each stage.
        end_gate: judges the last stage's last checkpoint.
        dry_run: check and tell of each stage, and run none; its gate's search of the data is left out.

    Raises:
        UserError: settings, data or a folder do not allow it.
        GateFailed: a stage's gate has not passed within its steps.
        StopRequested: it was asked to stop, and everything is saved.
    """
    first, formats = start, formats_of(objective)
    prepared = [make_needles(stage.config, start, formats) for stage in stages]
    start_loss: float | None = None
    begins = len(stages) > 1 and stages[0].folder.completion() is None and not dry_run
    if end_gate is not None and begins:
        end_gate.begin()  # what is wrong with it is told before all stages, not before the last one
    for planned, needles in zip(stages, prepared, strict=True):
        judge = end_gate if planned is stages[-1] else None
        stage = Stage(with_needles_in_blends(planned.config), planned.folder, objective, start, resume,
                      needles.data, needles.sources, before=needles.before, after=needles.after,
                      end_gate=judge, faults=faults, dry_run=dry_run)
        if planned.config.extend.gate.every_steps and not dry_run:
            fresh = latest(planned.folder.checkpoints) is None
            if fresh and start_loss is None:
                start_loss = loss_of_checkpoint(
                    first, short_context(planned.config, Target(first, False).trained_tokens, formats),
                    planned.config, nproc)
            gate = _gate(planned, needles, short_context(
                planned.config, Target(first, False).trained_tokens, formats), start_loss)
            stage = Stage(stage.config, stage.folder, stage.objective, start, resume, needles.data,
                          needles.sources, after=gate.completion, gate=gate,
                          end_gate=judge, faults=faults)
        was_complete = stage.folder.completion() is not None
        if not run_stage(stage, nproc, began_s):
            return
        if not was_complete:
            began_s = time.time()  # with it begins the work on the next one
        start = planned.folder.path if dry_run else find_checkpoint(planned.folder.path)


def _gate(planned: PlannedStage, needles: Needles, short: HeldoutData, start_loss: float | None) -> StageGate:
    """Return a stage's gate, after the search that proves it clean."""
    config: RunConfig = planned.config
    settings = config.extend.gate
    if (text := asks_too_little(config)) and is_first():
        warn(f"{planned.folder.path.name}: {text}")
    clean = search(list(needles.suite.questions()), [*needles.data, *needles.sources], settings.scan_tokens)
    refuse_contaminated(clean, settings.max_overlap)
    return StageGate(settings, needles, short, start_loss, planned.min_steps, clean)


def asks_too_little(config: RunConfig) -> str | None:
    """Return a sentence where a gate's needles do not reach the length of its stage,
    as only a setting can have it."""
    longest, wanted = max(config.needle.lengths_tokens), max(phase.seq_len for phase in config.data.phases)
    if longest >= wanted:
        return None
    return (f"needle.lengths_tokens = {list(config.needle.lengths_tokens)}: "
            f"the gate asks at most {longest:,} tokens, and the stage has {wanted:,}; "
            "leave the setting out, and it asks at the old and the new length")
