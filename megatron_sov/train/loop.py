"""The training loop of every stage: steps, evaluations, checkpoints and the end of a run."""

from __future__ import annotations

from megatron_sov.train.recorder import StepResult
from megatron_sov.train.recovery import attribute_rejected_step, rollback_weights
from megatron_sov.train.trainer import Trainer
from megatron_sov.work.processes.stop_signals import StopFlag


def train(trainer: Trainer, stop: StopFlag, until: int | None = None) -> bool:
    """Train to the last step, or until the gate passes or a stop is requested.

    Args:
        trainer: model, optimizer and data of this rank.
        stop: set by a signal that requests a stop.
        until: step after which the run stops as if a signal had requested it; None: no such step.

    Returns:
        True if training is complete, False if the run stopped early. The run is saved in both cases.
    """
    checkpointer = trainer.checkpointer
    result: StepResult | None = None
    trainer.announce()
    if trainer.is_new and trainer.has_heldout:
        trainer.evaluate()
    while not trainer.finished:
        missing = trainer.fetch_data(stop)
        if missing is not None:
            if not trainer.is_saved:
                trainer.save()
            return _stop_early(trainer, missing)
        result = run_step(trainer)

        # equal on all ranks: the step guard judges by the loss and gradient norm of rank 0
        rolled_back = trainer.guards.step_guard.wants_rollback
        if rolled_back:
            rollback_weights(trainer)
        if trainer.gate is not None:
            trainer.gate.check(trainer)
        step, is_last = trainer.step, trainer.finished
        if is_last or _is_evaluation_due(trainer):
            if result is not None:
                trainer.recorder.record_expert_load(step, trainer.expert_load.gather())
            trainer.evaluate()

        # one all-reduce shares the stop request of any rank and completes a checkpoint that all ranks wrote
        trainer.work.begin("step", f"step {step + 1}")
        stop_requested = checkpointer.sync(stop) or step == until
        if stop_requested and not is_last:
            trainer.save()
            return _stop_early(trainer, stop.reason or "--until")
        # the checkpoint after a rollback stores the ledger that skips the rejected samples: without it, a run
        # killed before the next checkpoint would train on them again
        if is_last or rolled_back or trainer.is_checkpoint_due(step):
            trainer.save()
    return _complete_run(trainer, stop, result)


def run_step(trainer: Trainer) -> StepResult | None:
    """Run one optimizer step under the watchdog and record it; None if its batch was skipped or rejected."""
    step = trainer.step + 1
    trainer.work.begin("step", f"step {step}")
    trainer.guards.watchdog.begin(step)
    trainer.profiling.before_step(step)
    result = trainer.train_step()
    # at once: batch, weights and random state are still those of the rejected step
    attribute_rejected_step(trainer)
    load = trainer.observe_step() if result is not None else None
    if trainer.side_jobs is not None:
        trainer.side_jobs.poll()
    if result is not None:
        trainer.recorder.record_step(trainer.state, result, load)
    trainer.profiling.after_step(step)
    trainer.garbage.after_step(step)
    trainer.guards.watchdog.end()
    return result


def _is_evaluation_due(trainer: Trainer) -> bool:
    every_steps = trainer.config.train.eval_every_steps
    return every_steps > 0 and trainer.step % every_steps == 0


def _stop_early(trainer: Trainer, reason: str | None) -> bool:
    """Finish the outstanding checkpoint and record the stop; returns False, the result of `train`."""
    trainer.profiling.close(trainer.step)
    trainer.checkpointer.finish()
    trainer.recorder.record_stop(trainer.step, reason)
    return False


def _complete_run(trainer: Trainer, stop: StopFlag, result: StepResult | None) -> bool:
    """Finish the last checkpoint and record the end of the run; False if data for its end are missing."""
    trainer.work.begin("save", "the last checkpoint")
    trainer.profiling.close(trainer.step)
    trainer.checkpointer.finish()
    missing = trainer.conclude_data(stop)
    if missing is not None:
        return _stop_early(trainer, missing)
    final_loss = result.loss if result is not None else None
    trainer.recorder.record_end(trainer.step, trainer.wall_s(), final_loss)
    return True
