"""The loop: every training stage runs through it, and it knows nothing about what is learned."""

from __future__ import annotations

from megatron_sov.train.rollback import rollback
from megatron_sov.train.state import StepResult
from megatron_sov.train.stopping import StopFlag
from megatron_sov.train.trainer import Trainer


def train(trainer: Trainer, stop: StopFlag) -> bool:
    """Train to the last step, or until the gate has passed.

    Returns:
        True when there is no more to train, False when it was asked to stop (everything is saved either way).
    """
    every = trainer.config.train
    trainer.announce()
    result: StepResult | None = None
    while not trainer.finished:
        trainer.watchdog.begin(trainer.state.step + 1)
        result = trainer.update()
        if result is not None:
            trainer.log(result)
        trainer.watchdog.end()
        rolled_back = trainer.guard.wants_rollback
        if rolled_back:
            rollback(trainer)
        if trainer.gate is not None:
            trainer.gate.check(trainer)
        step, last = trainer.state.step, trainer.finished
        if last or (every.eval_every_steps and step % every.eval_every_steps == 0):
            if result is not None:
                trainer.log_expert_load()
            trainer.evaluate()
        if stop.agreed(trainer.saver) and not last:
            trainer.save()
            trainer.saver.finish()
            trainer.events.write("stop", step=step, reason=stop.reason or "another process was asked to stop")
            return False
        if last or rolled_back or step % every.checkpoint_every_steps == 0:
            trainer.save()
    trainer.saver.finish()
    trainer.events.write("run_end", step=trainer.state.step, wall_s=trainer.wall_s(), final_loss=result.loss if result else None)
    return True
