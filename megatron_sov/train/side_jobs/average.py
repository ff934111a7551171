"""The mean of a run's newest checkpoints, made when the run is complete.

Averages of a stable rate's checkpoints stand in the place of its decay (arXiv 2507.17634); of models that
were tuned they lower the loss a little (arXiv 2203.05482).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_sov import models
from megatron_sov.artifacts import MANIFEST
from megatron_sov.config import TrainConfig
from megatron_sov.obs.warning import warn
from megatron_sov.runs.checkpoints import CHECKPOINTS_OF_A_RUN, latest, step_of
from megatron_sov.runs.folder import AVERAGE
from megatron_sov.work.background import BackgroundProcess

LOG = ".average.log"
_WAIT_S = 0.05


def make_average(run: Path, train: TrainConfig, record: Callable[..., None]) -> None:
    """Write RUN/average, unless it is there, and record an event; a failure is one too, and a warning.

    Args:
        run: the folder of a complete run.
        train: says what is averaged; nothing where `average_last` is 0.
        record: writes an event: `record(name, **fields)`.
    """
    newest = latest(run / CHECKPOINTS_OF_A_RUN)
    if not train.average_last or newest is None or (run / AVERAGE / MANIFEST).is_file():
        return
    command = ["convert", "average", str(run), str(run / AVERAGE), "--last", str(train.average_last),
               "--weights", train.average_weights, "--decay", str(train.average_decay)]
    command += [word for reference in models.OWN.named() for word in ("--plugin", reference)]
    step = step_of(newest)
    try:
        process = BackgroundProcess([sys.executable, "-m", "megatron_sov", *command], run / LOG)
    except OSError as e:
        _fail(record, step, f"its process cannot be started ({e})")
        return
    while process.exit_code is None:
        time.sleep(_WAIT_S)
    if process.exit_code:
        _fail(record, step, process.last_words)
        return
    record("average", step=step, path=AVERAGE, checkpoints=train.average_last, weights=train.average_weights,
           average_s=process.took_s)
    (run / LOG).unlink(missing_ok=True)


def _fail(record: Callable[..., None], step: int, why: str) -> None:
    record("average", step=step, error=why)
    warn(f"the mean of the run's checkpoints was not made: {why}", record, step=step)
