"""Taking weights back: where many steps in a row are refused, the weights are at fault and not one batch.

Weights and optimizer return to the last good checkpoint.  The data do not: the samples since then are passed
over, all of them, as the ledger then says, and the run goes on behind them (PaLM did so by hand, arXiv
2204.02311, section 5.1).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel.world import on_main
from megatron_sov.obs.warning import warn
from megatron_sov.runs import checkpoints
from megatron_sov.train.restoring import newest_sound

if TYPE_CHECKING:
    from megatron_sov.train.trainer import Trainer


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
