"""A small valid config, which tests of settings modify."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov.model.config import DataConfig, ModelConfig, PhaseConfig, RunConfig, TrainConfig


@pytest.fixture
def small() -> Callable[..., RunConfig]:
    """Give a function that returns a sound config of a small mixture-of-experts model,
    with fields of the model changed."""

    def build(**model: Any) -> RunConfig:
        shape = {"family": "solar_open", "vocab_size": 512, "hidden_size": 64, "num_layers": 4,
                 "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_experts": 8,
                 "num_experts_per_token": 2, "expert_ffn_dim": 32} | model
        return RunConfig(recipe="small", model=ModelConfig(**shape),
                         train=TrainConfig(steps=10, global_batch_size=8),
                         data=DataConfig(phases=(PhaseConfig("main", seq_len=128),)))

    return build
