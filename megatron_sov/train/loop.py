"""The loop: every training stage runs through it, and it knows nothing about what is learned."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.mcore.parallel.world import on_main
from megatron_sov.runs import checkpoints
from megatron_sov.train.attribution import attribute
from megatron_sov.train.restoring import StepResult, newest_sound
from megatron_sov.train.stopping import StopFlag
from megatron_sov.train.trainer import Trainer

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
    refusal, refused, rollbacks = guard.refusal, guard.in_a_row, guard.rollbacks
    assert refusal is not None, f"{refused} steps were refused, and none says why"
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
    on_main(trainer.world, lambda: checkpoints.drop_after(trainer.folder.checkpoints, back_to))
    text = (f"steps {now - refused + 1} to {now} were refused in a row ({refusal.reason}): "
            f"weights and optimizer are those of step {back_to} again, and the samples of steps "
            f"{back_to + 1} to {now} are passed over")
    if trainer.world.is_main:
        warn(text, trainer.events.write, "rollback", step=now, back_to=back_to, refused=refused)


def _target(trainer: Trainer, last_good: int) -> Path | None:
    """Return the newest sound checkpoint whose weights have not been returned to already, up to a step."""
    while (found := newest_sound(trainer.folder, trainer.world, last_good)) is not None:
        step = checkpoints.step_of(found)
        tried = [r for r in trainer.guards.step_guard.rollbacks if step in (r["at"], r["to"])]
        if not tried:
            return found
        last_good = min(r["to"] for r in tried) - 1
    return None


def train(trainer: Trainer, stop: StopFlag) -> bool:
    """Train to the last step, or until the gate has passed.

    Returns:
        True when there is no more to train, False when it was asked to stop (everything is saved either way).
    """
    guards, recorder, checkpointer, every = (trainer.guards, trainer.recorder, trainer.checkpointer,
                                             trainer.config.train)
    result: StepResult | None = None
    trainer.announce()
    while not trainer.finished:
        if (missing := trainer.bring_data(stop)) is not None:
            trainer.profiling.close(trainer.step)
            checkpointer.finish()
            recorder.stopped(trainer.step, missing)
            return False
        guards.watchdog.begin(trainer.step + 1)
        trainer.profiling.before_step(trainer.step + 1)
        result = trainer.update()  # None: its samples are passed over, or it is refused
        attribute(trainer)
        load = trainer.observe() if result is not None else None
        if trainer.side_jobs is not None:
            trainer.side_jobs.poll()
        if result is not None:
            recorder.step(trainer.state, result, load)
        trainer.profiling.after_step(trainer.step)
        trainer.garbage.after_step(trainer.step)
        guards.watchdog.end()

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

        asked_to_stop = checkpointer.sync(stop)  # also, a checkpoint that all processes have written appears
        if asked_to_stop and not last:
            trainer.save()
            trainer.profiling.close(step)
            checkpointer.finish()
            recorder.stopped(step, stop.reason)
            return False
        if last or rolled_back or trainer.is_saved_at(step):
            trainer.save()
    trainer.profiling.close(trainer.step)
    checkpointer.finish()
    recorder.ended(trainer.step, trainer.wall_s(), result.loss if result is not None else None)
    return True
