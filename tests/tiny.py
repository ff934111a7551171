"""Tiny models for tests: a config with a few thousand parameters, the model that a rank builds from it, and
the trainer of a small run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sov import recipes
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings

SIZES = ("model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.expert_ffn_dim=16")
RUN = ("model.vocab_size=368", "model.hidden_size=32", 'data.phases=[{"name": "main", "seq_len": 32}]')
"""Of a run on `packed_data`."""


def tiny_model(recipe: str, *settings: str, layout: dict[str, Any] | None = None,
               seed: int = 1) -> tuple[RunConfig, Any]:
    """Inside a rank: join the world at a layout (default: from the settings); return the config, and its
    model with the initial weights of a seed."""
    from megatron_sov.checkpoint import initial_weights
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.parallel import world

    config = apply_settings(recipes.get(recipe), [*SIZES, *settings])
    if layout is not None:
        config = replace(config, parallel=ParallelConfig(**layout))
    world.join_world(config.parallel)
    model = build_model(config.model, config.parallel, config.train, config.gpu)
    initial_weights.initialize_weights(model, config.model, seed)
    return config, model


def tiny_trainer(data: str, *settings: str, run: str | Path = "not-written", recipe: str = "tiny-solar-open",
                 faults: str = "", place: Any = None) -> Any:
    """Runs inside a rank: join the world, unless its place is given;
    return the trainer of a small run on packed text."""
    from megatron_sov.engine.parallel import world
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.sources import open_sources
    from megatron_sov.train.guards.fault_injection import parse_faults
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer, TrainerOptions

    config = apply_settings(recipes.get(recipe), [*RUN, *settings])
    place = place or world.join_world(config.parallel)
    return Trainer(config, place, RunFolder(Path(run)), open_sources({data: 1.0}, config.model.vocab_size),
                   LanguageModelling,
                   TrainerOptions(faults=parse_faults([faults] if faults else [], place.size)))
