"""Runs inside ranks whose models are made of Transformer Engine's modules, by its double."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_sov.mcore.parallel import world


def _layout_run() -> Any:
    spec = importlib.util.spec_from_file_location(
        "layout_run", Path(__file__).parents[1] / "layouts" / "layout_run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layout_run = _layout_run()


def one_step(recipe: str, settings: list[str], paths: list[str]) -> dict[str, Any]:
    """Train one step; return how many modules of which kinds there are, and how many products they made."""
    from transformer_engine.pytorch.gemm import COUNTS  # the double's own

    trainer = layout_run._trainer(layout_run.small_config(recipe, settings, paths, "lm"))
    COUNTS.clear()
    trainer.update()
    modules = Counter(type(m).__name__ for m in trainer.model.modules())
    optimizers = {type(o.optimizer).__name__ for o in trainer.optimizer.library.chained_optimizers}
    world.leave()
    return {"modules": modules, "optimizers": sorted(optimizers),
            "products": {f"{kind} {recipe}".strip(): count for (kind, recipe), count in COUNTS.items()}}
