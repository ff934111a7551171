"""Runs inside ranks: a training run from scratch and a continued one at a layout, as plain numbers and final weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from megatron_sov.data.shards import open_sources
from megatron_sov.mcore import checkpoint, world
from megatron_sov.train.lm import LanguageModelling
from megatron_sov.train.run_folder import RunFolder
from megatron_sov.train.trainer import Trainer

STEPS, SAVED_AFTER = 5, 2
STARTED, FINAL = "after-2", "after-5"


def _small_config(*arguments: Any) -> Any:
    spec = importlib.util.spec_from_file_location("layout_run", Path(__file__).with_name("layout_run.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["layout_run"] = module
    spec.loader.exec_module(module)
    return module.small_config(*arguments)


def _steps(trainer: Trainer, until: int) -> list[list[float]]:
    """Train on; return each step's loss and gradient norm."""
    results = [trainer.update() for _ in range(until - trainer.done.step)]
    return [[r.loss, r.grad_norm] for r in results if r is not None]
