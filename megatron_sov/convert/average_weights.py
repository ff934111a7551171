"""How much each of a run's checkpoints counts in their mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sov.config.train import AVERAGES
from megatron_sov.errors import UserError
from megatron_sov.runs.checkpoints import CHECKPOINTS_OF_A_RUN, complete, refuse_missing, step_of


def weights_of(count: int, kind: str, decay: float) -> list[float]:
    """Return the weights of checkpoints in order, the newest last.

    Args:
        count: how many.
        kind: "uniform"; "linear": 1, 2, 3, ...; "ema": each `decay` times that of the one behind it, which is
            what an exponential moving average over them, begun with the first, comes to for many.
        decay: 0 to 1.
    """
    if kind == "uniform":
        return [1.0] * count
    if kind == "linear":
        return [float(i) for i in range(1, count + 1)]
    return [decay ** (count - 1 - i) for i in range(count)]


def chosen(run: Path, last: int | None, steps: Sequence[int | None] = (None, None), kind: str = "uniform",
           decay: float = 0.5) -> list[tuple[Path, float]]:
    """Return a run's complete checkpoints that are averaged, and their weights.

    Args:
        run: its folder.
        last: how many of the newest; None: all.
        steps: from which step to which; None: no bound.
        kind: see `weights_of`.
        decay: of "ema".

    Raises:
        UserError: there are fewer than two, or fewer than `last`.
    """
    refuse_missing(run)
    first, end = steps
    found = [path for path in complete(run / CHECKPOINTS_OF_A_RUN)
             if (first is None or step_of(path) >= first) and (end is None or step_of(path) <= end)]
    bounds = "" if first is None and end is None else (
        f" between steps {'0' if first is None else first} and {'the last' if end is None else end}")
    if last is not None and not 2 <= last <= len(found):
        raise UserError(f"--last {last}: must be at least 2, and at most the {len(found)} complete "
                        f"checkpoints of {run}{bounds}")
    if len(found) < 2:
        raise UserError(f"{run}: has {len(found)} complete checkpoints{bounds}, and a mean needs two; keep "
                        "more (train.keep_checkpoints), or choose other steps")
    if kind not in AVERAGES:
        raise UserError(f"--weights {kind}: is none of {', '.join(AVERAGES)}")
    if not 0 < decay <= 1:
        raise UserError(f"--decay {decay}: must lie above 0 and be at most 1")
    found = found[-(last or 0):]
    return list(zip(found, weights_of(len(found), kind, decay), strict=True))
