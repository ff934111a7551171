"""Recovery from rejected steps: finding the cause of a rejection, and rolling weights back after several.

A rejected step is computed again from the same weights, batch and random numbers. A sound process reproduces
its bits, so a process with other bits is faulty. If all processes reproduce them, weights that differ between
replicas name a process with corrupt memory. Otherwise the last learned batch is computed with the current
weights: if its loss is as unusual as the loss of the rejected batch, the optimisation is at fault, else the
data.

The order follows NVIDIA's rerun state machine (`megatron.core.rerun_state_machine`), which separates
transient from persistent results of one process and leaves further diagnosis to people.
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
from megatron_sov.train.checkpointer import find_sound_checkpoint
from megatron_sov.train.forward_backward import LocalResult
from megatron_sov.train.guards.step_guard import StepRejection
from megatron_sov.train.objectives.objective import GlobalBatch
from megatron_sov.train.trainer import Trainer

Verdict = Literal["process", "weights", "data", "optimisation", "undecided"]
MAX_DOCUMENTS = 8
"""Documents listed in an `Attribution`."""


@dataclass(frozen=True)
class Attribution:
    """Why a step was rejected."""

    verdict: Verdict
    """`process`: a rank computed other bits in the repetition. `weights`: a rank's weights differ from its
    replicas. `data`: the last learned batch has a usual loss with the current weights. `optimisation`: its
    loss is unusual, too. `undecided`: no batch was learned before."""
    text: str
    """Explanation for the user."""
    ranks: tuple[int, ...] = ()
    """Faulty ranks."""
    hosts: tuple[str, ...] = ()
    """Host names for `ranks`."""
    documents: tuple[str, ...] = ()
    """Documents in the micro-batch with the largest loss, for the verdicts `data` and `undecided`."""


def reject_step(trainer: Trainer, rejection: StepRejection, batch: GlobalBatch) -> None:
    """Record that the current step is not learned, and store `batch` for `attribute_rejected_step`.

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
    if config.guards.attribute:
        trainer.rejected_batch = batch


def attribute_rejected_step(trainer: Trainer) -> Attribution | None:
    """Find and record the cause if the last step was rejected, else return None. Collective.

    Called right after the step, before weights, batch or random state change.
    """
    if trainer.rejected_batch is None:
        return None
    attribution = _find_cause(trainer, trainer.rejected_batch, trainer.learned_batch)
    trainer.rejected_batch = None
    if trainer.world.is_main:
        fields = asdict(attribution)
        warn(fields.pop("text"), trainer.events.write, "attribution", step=trainer.step, **fields)
    return attribution


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


def _find_cause(trainer: Trainer, batch: GlobalBatch, learned_batch: GlobalBatch | None) -> Attribution:
    forward_backward = trainer.forward_backward
    first = forward_backward.local_result
    repeated = forward_backward.recompute_step(batch, trainer.objective, trainer.step)
    # cheapest and surest check first: only the machine can turn one input into different bits
    if ranks := replica_checks.gather_ranks_where(first != repeated):
        return _name_ranks("process", ranks,
                           "gave other numbers when it computed the step again: its machine is "
                           "at fault, and neither the data nor the optimisation")
    if ranks := replica_checks.find_differing_replicas(trainer.model):
        return _name_ranks("weights", ranks,
                           "holds other weights than its replicas: a bit of its memory changed")
    if trainer.config.parallel.overlap_grad_reduce and not _is_norm_reproduced(trainer, batch):
        return Attribution("process", "the gradient norm is another one when the step is computed again: a "
                           "process or a connection between them is at fault, and which one cannot be told "
                           "with parallel.overlap_grad_reduce = true")
    documents = _find_worst_documents(trainer, batch, repeated)
    if learned_batch is None:
        return Attribution("undecided", "the step gives the same bits again, and no other was learned before "
                           "it: its data, the initial weights or optim.lr are at fault", documents=documents)
    if _is_unusual(trainer, learned_batch):
        return Attribution("optimisation", "the step gives the same bits again, and the samples that were "
                           "learned last are unusual with these weights, too: the optimisation is at fault; "
                           f"lower optim.lr = {trainer.config.optim.lr:g} or optim.clip_grad = "
                           f"{trainer.config.optim.clip_grad:g}")
    return Attribution("data", "the step gives the same bits again, and the samples that were learned last "
                       "are usual with these weights: its data are at fault, most of all "
                       f"{', '.join(documents)}", documents=documents)


def _name_ranks(verdict: Verdict, ranks: list[int], fault: str) -> Attribution:
    hosts = gather_objects(platform.node())
    places = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    return Attribution(verdict, f"{places} {fault}", tuple(ranks), tuple(hosts[rank] for rank in ranks))


def _compute_loss_and_norm(trainer: Trainer, batch: GlobalBatch) -> tuple[float, float]:
    """Return loss and gradient norm of a batch with the current weights, which do not change."""
    sums = trainer.forward_backward.compute_gradients(batch, trainer.objective, trainer.step)
    # a rejected update computes the norm and changes no weight
    norm = trainer.optimizer.step(0.0, lambda _: False)
    trainer.expert_load.restore_biases()
    return sums.normalize(batch, trainer.objective)[0], norm


def _is_norm_reproduced(trainer: Trainer, batch: GlobalBatch) -> bool:
    rejection = trainer.guards.step_guard.rejection
    assert rejection is not None, "no step was rejected"
    norm = _compute_loss_and_norm(trainer, batch)[1]
    both_nan = math.isnan(norm) and math.isnan(rejection.grad_norm)
    differs = trainer.world.is_main and norm != rejection.grad_norm and not both_nan
    return not replica_checks.gather_ranks_where(differs)


def _is_unusual(trainer: Trainer, batch: GlobalBatch) -> bool:
    loss, norm = _compute_loss_and_norm(trainer, batch)
    return bool(replica_checks.gather_ranks_where(trainer.guards.step_guard.would_have_rejected(loss, norm)))


def _find_worst_documents(trainer: Trainer, batch: GlobalBatch, result: LocalResult) -> tuple[str, ...]:
    """Return names of the documents in the micro-batch with the largest loss over all ranks."""
    worst: tuple[float, tuple[str, ...]] = (-math.inf, ())
    for loss, micro_batch in zip(result.losses, batch.micro_batches, strict=False):
        # every comparison with NaN is false: as infinity, a NaN loss counts as the largest
        comparable_loss = math.inf if math.isnan(loss) else loss
        if comparable_loss > worst[0]:
            names = dict.fromkeys(f"{trainer.sources[origin.source].name} document {origin.segment.document}"
                                  for origin in micro_batch.origins)
            worst = comparable_loss, tuple(names)[:MAX_DOCUMENTS]
    return max(gather_objects(worst), key=lambda item: item[0])[1]
