"""Saves a checkpoint outside a run."""

from pathlib import Path
from typing import Any

from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.optimizer.optimizer import Optimizer


def save_checkpoint(path: Path, model: LanguageModel, optimizer: Optimizer | None, state: dict[str, Any],
                    settings: dict[str, Any], tokenizer: Path | None) -> None:
    """Save a checkpoint and wait for its completion (collective).

    Args:
        path: folder of the checkpoint; must not exist.
        state: state of the loop, equal on every process; must include `step` and `tokens`.
        settings: config of the run.
        tokenizer: tokenizer folder to copy.

    Raises:
        UserError: on every process, if a process could not write; `path` is then not created.
    """
    saver = CheckpointSaver()
    saver.begin(path, model, optimizer, CheckpointMetadata(state, settings, tokenizer), wait=True)
    saver.finish()
