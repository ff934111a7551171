"""The loop: every training stage runs through it, and it knows nothing about what is learned.

Where a step is refused it asks why, and where many are it takes weights back.
"""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.runs import checkpoints
from megatron_sov.train.checkpointer import newest_sound
from megatron_sov.train.computation import OwnPart
from megatron_sov.train.objectives.objective import GlobalBatch
from megatron_sov.train.recorder import StepResult
from megatron_sov.train.stopping import StopFlag
from megatron_sov.train.trainer import Trainer

# Why a step was refused: the machine, the weights, the data or the optimisation.
#
# The step is computed again at once, from the same weights, batch and random numbers. A sound process
# gives the same bits, so one that does not is named. Where all do, weights that differ from their
# replicas name a process whose memory changed. Else the batch that was learned last is computed with
# the weights of now: where that is as unusual as the batch that was refused, the weights are at
# fault, and so the optimisation that made them; where it is usual, the refused data are.
#
# The order is that of NVIDIA's rerun state machine (`megatron.core.rerun_state_machine`), which tells
# transient from persistent results of one process and asks people for the rest.

Verdict = Literal["process", "weights", "data", "optimisation", "undecided"]
MAX_DOCUMENTS = 8
"""Of the documents of a micro-batch, those that are named."""


@dataclass(frozen=True)
class Attribution:
    """What a refused step was put down to."""

    verdict: Verdict
    """process: one gave other bits when it computed again; weights: those of a process are not its replicas';
    data: other samples are usual with the same weights; optimisation: they are not; undecided: there are no
    other samples yet."""
    text: str
    """In words."""
    ranks: tuple[int, ...] = ()
    """Processes that are named."""
    hosts: tuple[str, ...] = ()
    """Their machines."""
    documents: tuple[str, ...] = ()
    """Where the verdict is data: the documents of the micro-batch with the largest loss."""


def attribute(trainer: Trainer) -> Attribution | None:
    """Find out why the last step was refused, if it was, and record it; called by all processes together,
    behind the step and before anything else is computed.

    Args:
        trainer: holds weights that the step has not changed, its batch, and the one that was learned last.
    """
    if trainer.refused is None:
        return None
    found = _find(trainer, trainer.refused, trainer.learned)
    trainer.refused = None
    if trainer.world.is_main:
        fields = asdict(found)
        warn(fields.pop("text"), trainer.events.write, "attribution", step=trainer.step, **fields)
    return found


def _find(trainer: Trainer, batch: GlobalBatch, learned: GlobalBatch | None) -> Attribution:
    computation, step = trainer.computation, trainer.step
    first = computation.own
    again = computation.own_part(batch, trainer.objective, step)
    # cheapest and surest first: other bits from the same input can only be the machine
    if ranks := replica_checks.gather_ranks_where(first != again):
        return _named("process", ranks, "gave other numbers when it computed the step again: its machine is "
                                        "at fault, and neither the data nor the optimisation")
    if ranks := replica_checks.find_differing_replicas(trainer.model):
        return _named("weights", ranks, "holds other weights than its replicas: a bit of its memory changed")
    if trainer.config.parallel.overlap_grad_reduce and not _same_norm(trainer, batch):
        return Attribution("process", "the gradient norm is another one when the step is computed again: a "
                           "process or a connection between them is at fault, and which one cannot be told "
                           "with parallel.overlap_grad_reduce = true")
    documents = _worst_documents(trainer, batch, again)
    if learned is None:
        return Attribution("undecided", "the step gives the same bits again, and no other was learned before "
                           "it: its data, the initial weights or optim.lr are at fault", documents=documents)
    if _is_unusual(trainer, learned):
        return Attribution("optimisation", "the step gives the same bits again, and the samples that were "
                           "learned last are unusual with these weights, too: the optimisation is at fault; "
                           f"lower optim.lr = {trainer.config.optim.lr:g} or optim.clip_grad = "
                           f"{trainer.config.optim.clip_grad:g}")
    return Attribution("data", "the step gives the same bits again, and the samples that were learned last "
                       "are usual with these weights: its data are at fault, most of all "
                       f"{', '.join(documents)}", documents=documents)


def _named(verdict: Verdict, ranks: list[int], what: str) -> Attribution:
    hosts = gather_objects(platform.node())
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    return Attribution(verdict, f"{named} {what}", tuple(ranks), tuple(hosts[rank] for rank in ranks))


def _figures(trainer: Trainer, batch: GlobalBatch) -> tuple[float, float]:
    """Return loss and gradient norm of a batch with the weights of now, which stay as they are."""
    sums = trainer.computation.sums(batch, trainer.objective, trainer.step)
    # computed and refused: nothing is updated, and only the norm is wanted
    norm = trainer.optimizer.step(0.0, lambda _: False)
    trainer.expert_load.restore_biases()
    return trainer.loss_of(sums, batch)[0], norm


def _same_norm(trainer: Trainer, batch: GlobalBatch) -> bool:
    refusal = trainer.guards.step_guard.refusal
    assert refusal is not None, "nothing was refused"
    norm = _figures(trainer, batch)[1]
    differs = trainer.world.is_main and norm != refusal.grad_norm and not (
        math.isnan(norm) and math.isnan(refusal.grad_norm))
    return not replica_checks.gather_ranks_where(differs)


def _is_unusual(trainer: Trainer, batch: GlobalBatch) -> bool:
    loss, norm = _figures(trainer, batch)
    return bool(replica_checks.gather_ranks_where(trainer.guards.step_guard.was_unusual(loss, norm)))


def _worst_documents(trainer: Trainer, batch: GlobalBatch, own: OwnPart) -> tuple[str, ...]:
    """Return the documents of the micro-batch whose loss is the largest of all processes' ones."""
    mine: tuple[float, tuple[str, ...]] = (-math.inf, ())
    for loss, micro_batch in zip(own.losses, batch.micro_batches, strict=False):
        # NaN compares with nothing: as infinity it is the worst
        rank = math.inf if math.isnan(loss) else loss
        if rank > mine[0]:
            named = dict.fromkeys(f"{trainer.sources[o.source].name} document {o.segment.document}"
                                  for o in micro_batch.origins)
            mine = rank, tuple(named)[:MAX_DOCUMENTS]
    found = max(gather_objects(mine), key=lambda item: item[0])
    return found[1]


# Taking weights back: where many steps in a row are refused, the weights are at fault and not one batch.
#
# Weights and optimizer return to the last good checkpoint.  The data do not: the samples since then are
# passed
# over, all of them, as the ledger then says, and the run goes on behind them (PaLM did so by hand, arXiv
# 2204.02311, section 5.1).

def rollback(trainer: Trainer) -> None:
    """Go on with the weights of the last good checkpoint, behind the samples that were refused; called by all
    processes together.

    Raises:
        UserError: there is no checkpoint to return to that has not been tried.
    """
    guard, now = trainer.guards.step_guard, trainer.step
    # taken before the load below, which gives the guard its memory of the checkpoint's time
    refusal, refused, rollbacks = guard.refusal, guard.in_a_row, guard.rollbacks
    assert refusal is not None, f"{refused} steps were refused, and none says why"
    # a checkpoint being written may be the newest good one, and must not appear after
    # `delete_checkpoints_after`
    trainer.checkpointer.finish()
    target = _target(trainer, now - refused)
    if target is None:
        tried = (f"none before step {rollbacks[-1]['to']}, which was tried" if rollbacks
                 else "none before them")
        raise UserError(f"steps {now - refused + 1} to {now} were refused in a row (the last one: "
                        f"{refusal.reason}), and of checkpoints there is {tried}; "
                        f"lower optim.lr = {trainer.config.optim.lr:g} or look at the data, and start a new "
                        "--run --from a checkpoint that you trust")
    back_to = trainer.rollback_to(target)
    guard.forget_refusals()
    trainer.batches.ledger.pass_over(back_to, now)
    guard.rollbacks = [*rollbacks, {"at": now, "to": back_to}]
    # checkpoints behind the target have weights of the refused stretch: a resume must not find one
    folder = trainer.folder.checkpoints
    run_on_main(trainer.world, lambda: checkpoints.delete_checkpoints_after(folder, back_to))
    text = (f"steps {now - refused + 1} to {now} were refused in a row ({refusal.reason}): "
            f"weights and optimizer are those of step {back_to} again, and the samples of steps "
            f"{back_to + 1} to {now} are passed over")
    if trainer.world.is_main:
        warn(text, trainer.events.write, "rollback", step=now, back_to=back_to, refused=refused)


def _target(trainer: Trainer, last_good: int) -> Path | None:
    """Return the newest sound checkpoint whose weights have not been returned to already, up to a step."""
    while (found := newest_sound(trainer.folder, trainer.world, last_good)) is not None:
        step = checkpoints.checkpoint_step(found)
        # a step is known from both ends: the checkpoint that was returned to, and the one that was taken
        # right after, which has the same weights
        tried = [r for r in trainer.guards.step_guard.rollbacks if step in (r["at"], r["to"])]
        if not tried:
            return found
        last_good = min(r["to"] for r in tried) - 1
    return None


def _stopped(trainer: Trainer, reason: str | None) -> bool:
    """End the run before its time, with everything saved that was to be saved; returns False."""
    trainer.profiling.close(trainer.step)
    trainer.checkpointer.finish()
    trainer.recorder.stopped(trainer.step, reason)
    return False


def _ended(trainer: Trainer, stop: StopFlag, result: StepResult | None) -> bool:
    """End the run after its last step; returns whether nothing is left to do."""
    trainer.work.begin("save", "the last checkpoint")
    trainer.profiling.close(trainer.step)
    trainer.checkpointer.finish()
    if (missing := trainer.conclude(stop)) is not None:
        return _stopped(trainer, missing)
    trainer.recorder.ended(trainer.step, trainer.wall_s(), result.loss if result is not None else None)
    return True


def train(trainer: Trainer, stop: StopFlag, until: int | None = None) -> bool:
    """Train to the last step, or until the gate has passed.

    Args:
        trainer: does the steps.
        stop, until: who was asked to stop, and the step behind which to end as if asked to; None: none.

    Returns:
        True when there is no more to train, False when it was asked to stop (everything is saved either way).
    """
    guards, recorder, checkpointer = trainer.guards, trainer.recorder, trainer.checkpointer
    every = trainer.config.train
    result: StepResult | None = None
    trainer.announce()
    if trainer.is_new and trainer.has_heldout:
        trainer.evaluate()
    while not trainer.finished:
        if (missing := trainer.bring_data(stop)) is not None:
            if not trainer.is_saved:
                trainer.save()
            return _stopped(trainer, missing)
        trainer.work.begin("step", f"step {trainer.step + 1}")
        guards.watchdog.begin(trainer.step + 1)
        trainer.profiling.before_step(trainer.step + 1)
        result = trainer.update()  # None: its samples are passed over, or it is refused
        # at once: the batch, the weights and what was drawn are still those of the refused step
        attribute(trainer)
        load = trainer.observe() if result is not None else None
        if trainer.side_jobs is not None:
            trainer.side_jobs.poll()
        if result is not None:
            recorder.step(trainer.state, result, load)
        trainer.profiling.after_step(trainer.step)
        trainer.garbage.after_step(trainer.step)
        guards.watchdog.end()

        # the same on every process: the guard judges by rank 0's figures
        rolled_back = guards.step_guard.wants_rollback
        if rolled_back:
            rollback(trainer)
        if trainer.gate is not None:
            trainer.gate.check(trainer)
        step, last = trainer.step, trainer.finished
        if last or (every.eval_every_steps and step % every.eval_every_steps == 0):
            if result is not None:
                recorder.expert_load(step, trainer.expert_load.gather())
            trainer.evaluate()

        # one collective decides for all whom a signal reached; a checkpoint that all have written appears
        trainer.work.begin("step", f"step {step + 1}")
        asked_to_stop = checkpointer.sync(stop) or step == until
        if asked_to_stop and not last:
            trainer.save()
            return _stopped(trainer, stop.reason or "--until")
        # after weights were taken back a checkpoint holds the ledger that passes the bad samples over; a kill
        # before the next one would learn them again
        if last or rolled_back or trainer.is_saved_at(step):
            trainer.save()
    return _ended(trainer, stop, result)
