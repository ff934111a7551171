"""Runs inside ranks whose models are made of Transformer Engine's modules, with and without CUDA graphs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megatron_sov.engine.parallel import world
from tests.layouts import layout_run

PARTS = 'gpu.cuda_graphs=["moe_router", "moe_preprocess"]'


def both(recipe: str, settings: list[str], paths: list[str], steps: int = 3,
         graphs: str = PARTS) -> list[dict[str, Any]]:
    """Return what training gives without graphs, and with them."""
    return [_trained(recipe, [*settings, *more], paths, steps) for more in ([], [graphs])]


def _trained(recipe: str, settings: list[str], paths: list[str], steps: int) -> dict[str, Any]:
    """Train; return each step as `layout_run` tells it, with the balancing losses, and a digest of all weights
    and buffers; and how many graphs were replayed of how many that were captured."""
    from transformer_engine.pytorch import recording  # the double's own

    operators: Any = recording.CapturedOperators
    made, replay, replays = [0], operators.replay, [0]

    def counted(self: Any) -> None:
        replays[0] += 1
        replay(self)

    operators.replay = counted
    trainer = layout_run._trainer(layout_run.small_config(recipe, settings, paths, "lm"))
    found = []
    for _ in range(steps):
        found.append(layout_run._step(trainer))
        losses = trainer.model.config.routing_step.aux_loss
        found[-1]["balancing"] = {layer: float(loss) for layer, loss in sorted(losses.items())}
    operators.replay = replay
    made[0] = sum(len(getattr(layer, "cuda_graphs", ())) for layer in trainer.model.modules())
    digest = hashlib.sha256()
    for name, tensor in (*trainer.model.named_parameters(), *trainer.model.named_buffers()):
        digest.update(name.encode() + np.array(tensor.detach().double().cpu()).tobytes())
    world.leave()
    return {"steps": found, "weights": digest.hexdigest(), "graphs": made[0], "replays": replays[0]}
