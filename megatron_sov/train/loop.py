"""The training loop: forward and backward passes, updates, evaluations and checkpoints until the run ends."""

import time

from megatron_sov.engine.parallel.rng import seed_step
from megatron_sov.train.objectives.objective import check_has_targets, get_doubt
from megatron_sov.train.recorder import StepResult
from megatron_sov.train.recovery import reject_step, rollback_weights
from megatron_sov.train.trainer import Trainer
from megatron_sov.work.processes.stop_signals import StopFlag


def train(trainer: Trainer, stop: StopFlag, until: int | None = None) -> bool:
    """Train to the last step, until `trainer.gate` passes, or until a stop request; save in every case.

    Collective. A signal that sets `stop` on any rank requests a stop, and so does the end of step `until`.
    Returns True if training is complete, and False if the run stopped early.
    """
    result: StepResult | None = None
    while not trainer.finished:
        stop_reason = trainer.fetch_data(stop)
        if stop_reason is None:
            begin_step(trainer)
            result = train_step(trainer)
            record_step(trainer, result)
            stop_reason = finish_step(trainer, result, stop, until)
        if stop_reason is not None:
            return _stop_early(trainer, stop_reason)
    return _complete_run(trainer, result, stop)


def begin_step(trainer: Trainer) -> None:
    """Start watchdog and profiler for the next step."""
    step = trainer.step + 1
    trainer.work.begin("step", f"step {step}")
    trainer.guards.watchdog.begin(step)
    trainer.profiling.before_step(step)


def train_step(trainer: Trainer) -> StepResult | None:
    """Run the next step's forward and backward passes and optimizer update. Collective.

    Returns None if the ledger skips the batch or `StepGuard` rejects the step: no weight has changed then.
    Raises `UserError` if loss or gradient norm is not finite and `guards.skip` is off, and `SilentCorruption`
    if a rank computes different gradients from one input. Nothing is saved after an error.
    """
    start_s = time.monotonic()
    config, state, guard, batches = trainer.config, trainer.state, trainer.guards.step_guard, trainer.batches
    # random numbers depend on (seed, step) only, so that a resumed run repeats an uninterrupted run
    seed_step(config.train.seed, state.step)
    guard.begin_step(state.step, batches.ledger)
    if batches.next_entry().skip:
        batches.skip()  # drawn nevertheless: later steps must see unchanged samples
        state.step += 1
        trainer.recorder.record_skipped_step(state.step, trainer.feed_meters)
        return None

    # denominators count the whole global batch before the first forward pass: losses are then plain sums over
    # ranks and micro-batches
    objective = trainer.objective
    batch = objective.prepare(objective.collect(trainer.policy, state.step))
    check_has_targets(batch, state.step + 1)
    trainer.inject_faults()
    trainer.probe_gradients(batch)
    sums = trainer.forward_backward.compute_gradients(batch, objective, state.step + 1)
    loss, losses = sums.normalize(batch, objective)

    # the guard decides after loss and gradient norm are known and before any weight changes
    lr = trainer.schedule.learning_rate(state.step)
    grad_norm = trainer.optimizer.step(lr, lambda norm: guard.accept_step(loss, norm))
    state.step += 1
    if guard.rejection is not None:
        reject_step(trainer, guard.rejection)
        return None

    state.tokens += batch.num_tokens
    state.trained_tokens = max(state.trained_tokens, batch.seq_len)
    trainer.recorder.warn_about_epochs(state.step, batches.epochs)
    trainer.recorder.warn_about_meters(state.step, get_doubt(objective, state.step, sums.meters))
    by_source = zip(trainer.sources, sums.by_source.tolist(), strict=True)
    return StepResult(
        loss=loss, losses=losses,
        losses_by_source={source.name: total / count for source, (total, count) in by_source if count > 0},
        grad_norm=grad_norm, lr=lr, num_tokens=batch.num_tokens, phase=batch.phase,
        padding_share=1 - batch.num_tokens / (batch.num_sequences * batch.seq_len),
        seq_len=batch.seq_len, seconds=time.monotonic() - start_s,
        meters={**sums.meters, **trainer.feed_meters})


def record_step(trainer: Trainer, result: StepResult | None) -> None:
    """Record a step's result, run the guards that are due, stop watchdog and profiler. Collective."""
    load = trainer.observe_step() if result is not None else None
    if trainer.side_jobs is not None:
        trainer.side_jobs.poll()
    if result is not None:
        trainer.recorder.record_step(trainer.state, result, load)
    trainer.profiling.after_step(trainer.step)
    trainer.garbage.after_step(trainer.step)
    trainer.guards.watchdog.end()


def finish_step(trainer: Trainer, result: StepResult | None, stop: StopFlag, until: int | None) -> str | None:
    """Run everything due between two steps: rollback, gate, evaluation, checkpoint. Collective.

    `result` is the result of `train_step`. Returns the reason if a stop was requested before the last step.
    """
    # equal on all ranks: the step guard judges by loss and gradient norm of rank 0
    rolled_back = trainer.guards.step_guard.wants_rollback
    if rolled_back:
        rollback_weights(trainer)
    if trainer.gate is not None:
        trainer.gate.check(trainer)
    step, is_last = trainer.step, trainer.finished
    if is_last or trainer.is_evaluation_due():
        if result is not None:
            trainer.recorder.record_expert_load(step, trainer.expert_load.gather())
        trainer.evaluate()

    # one all-reduce shares stop requests and completes a checkpoint that every rank has written
    trainer.work.begin("step", f"step {step + 1}")
    stop_requested = trainer.checkpointer.sync(stop) or step == until
    if stop_requested and not is_last:
        return stop.reason or "--until"
    # the checkpoint after a rollback stores the ledger that skips the rejected samples: without it, a run
    # killed before the next checkpoint would train on them again
    if is_last or rolled_back or trainer.is_checkpoint_due(step):
        trainer.save()
    return None


def start_run(trainer: Trainer) -> None:
    """Record the start of the run, and evaluate initial weights before the first step. Collective."""
    trainer.record_start()
    if trainer.step == 0 and trainer.has_heldout:
        trainer.evaluate()


def _stop_early(trainer: Trainer, reason: str) -> bool:
    """Save the run and record the stop; return False, the result for `train`."""
    if not trainer.is_saved:
        trainer.save()
    trainer.profiling.close(trainer.step)
    trainer.checkpointer.finish()
    trainer.recorder.record_stop(trainer.step, reason)
    return False


def _complete_run(trainer: Trainer, result: StepResult | None, stop: StopFlag) -> bool:
    """Finish the last checkpoint and record the end of the run; return False if `finish_data` fails."""
    trainer.work.begin("save", "the last checkpoint")
    trainer.profiling.close(trainer.step)
    trainer.checkpointer.finish()
    missing_data = trainer.finish_data(stop)
    if missing_data is not None:
        return _stop_early(trainer, missing_data)
    final_loss = result.loss if result is not None else None
    trainer.recorder.record_end(trainer.step, trainer.wall_s(), final_loss)
    return True
