"""Reject a step, and roll weights back after several rejected steps."""

from pathlib import Path

from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.model import replica_checks
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.runs import checkpoints
from megatron_sov.train.checkpointer import find_sound_checkpoint
from megatron_sov.train.guards.step_guard import StepRejection
from megatron_sov.train.trainer import Trainer


def reject_step(trainer: Trainer, rejection: StepRejection) -> None:
    """Record that the current step is not learned.

    Collective. Raises `UserError` if `guards.skip` is off.
    """
    step, config = trainer.step, trainer.config
    if not config.guards.skip:
        trainer.checkpointer.finish()
        newest = checkpoints.latest_checkpoint(trainer.folder.checkpoints)
        start = "--run, since there is no checkpoint yet"
        if newest is not None:
            start = f"--run --from {newest}, the last checkpoint"
        raise UserError(f"step {step}: the loss is {rejection.loss:g} and the gradient norm "
                        f"{rejection.grad_norm:g}; lower optim.lr = {config.optim.lr:g} and start a "
                        f"new {start}, or switch on guards.skip")
    trainer.expert_load.restore_biases()
    trainer.batches.ledger.skip_steps(step - 1, step)
    ranks = replica_checks.gather_ranks_where(not trainer.forward_backward.is_finite)
    trainer.recorder.record_rejected_step(step, rejection, ranks)


def rollback_weights(trainer: Trainer) -> None:
    """Load weights and optimizer from the last good checkpoint, and skip the samples trained on since.

    Collective. PaLM did so by hand (arXiv 2204.02311, section 5.1). Raises `UserError` if the run was rolled
    back to every good checkpoint before.
    """
    guard, step = trainer.guards.step_guard, trainer.step
    # read before the load below, which restores the guard's state of the checkpoint
    rejection, num_rejected, rollbacks = guard.rejection, guard.consecutive_rejections, guard.rollbacks
    assert rejection is not None, f"{num_rejected} steps were rejected without a reason"
    # a checkpoint under way may be the newest good one, and must not appear after `delete_checkpoints_after`
    trainer.checkpointer.finish()
    last_good = step - num_rejected
    target = _find_rollback_target(trainer, last_good)
    if target is None:
        available = "no earlier checkpoint exists"
        if rollbacks:
            available = f"no checkpoint exists before step {rollbacks[-1]['to']}, which was tried"
        raise UserError(f"steps {last_good + 1} to {step} were rejected in a row (the last: "
                        f"{rejection.reason}), and {available}; lower optim.lr = "
                        f"{trainer.config.optim.lr:g} or inspect the data, and start a new --run --from a "
                        "checkpoint that you trust")
    target_step = trainer.restore_weights(target)
    guard.reset_rejections()
    trainer.batches.ledger.skip_steps(target_step, step)
    guard.rollbacks = [*rollbacks, {"at": step, "to": target_step}]
    # later checkpoints hold weights of the rejected steps: a resumed run must not find one
    folder = trainer.folder.checkpoints
    run_on_main(trainer.world, lambda: checkpoints.delete_checkpoints_after(folder, target_step))
    text = (f"steps {last_good + 1} to {step} were rejected in a row ({rejection.reason}): "
            f"weights and optimizer are restored from step {target_step}, and the samples of steps "
            f"{target_step + 1} to {step} are skipped")
    if trainer.world.is_main:
        warn(text, trainer.events.write, "rollback", step=step, back_to=target_step, refused=num_rejected)


def _find_rollback_target(trainer: Trainer, last_good: int) -> Path | None:
    """Return the newest sound checkpoint up to step `last_good` that no earlier rollback loaded."""
    rollbacks = trainer.guards.step_guard.rollbacks
    while (checkpoint := find_sound_checkpoint(trainer.folder, trainer.world, last_good)) is not None:
        step = checkpoints.checkpoint_step(checkpoint)
        # the checkpoint taken right after a rollback ("at") has the same weights as its target ("to")
        tried = [rollback["to"] for rollback in rollbacks if step in (rollback["at"], rollback["to"])]
        if not tried:
            return checkpoint
        last_good = min(tried) - 1
    return None
