"""The loop: every training stage runs through it, and it knows nothing about what is learned."""

from __future__ import annotations

from megatron_sov.train.attribution import attribute
from megatron_sov.train.rollback import rollback
from megatron_sov.train.state import StepResult
from megatron_sov.train.stopping import StopFlag
from megatron_sov.train.trainer import Trainer


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
