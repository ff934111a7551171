"""Fixtures for commands: their output, settings of a tiny model, and a trained run as a teacher."""

from pathlib import Path
from typing import Any

import pytest

from tests.typed_words import format_set_options

TINY = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_experts=4",
        'data.phases=[{"name": "main", "seq_len": 128}]', "train.global_batch_size=4",
        "train.micro_batch_size=2", "train.checkpoint_every_steps=1", "train.async_save=false",
        "optim.lr=0.004")
STEPS = ("--set", "train.steps=2")


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Return --set arguments of a model of some thousand parameters, with a checkpoint at each step."""
    return format_set_options(TINY)


@pytest.fixture(scope="session")
def teacher(packed_data: Any, run_checked: Any, tiny: list[str], tmp_path_factory: pytest.TempPathFactory
            ) -> Path:
    """Return a run of a wider model."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    run_checked("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(run),
                *tiny, *STEPS, "--set", "model.hidden_size=48")
    return run
