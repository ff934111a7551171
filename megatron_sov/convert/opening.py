"""Which kind of folder a path names, and its weights under their Hugging Face names."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.convert.peft import checkpoint_weights
from megatron_sov.convert.sources import HfWeights, Weights, newest_of_run
from megatron_sov.pretrained import CONFIG
from megatron_sov.runs.checkpoints import HF_MODEL, KIND, RUN, refuse_missing, refuse_other_kind


def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    An adapter's checkpoint is opened as the model that it makes of its base.

    Raises:
        UserError: it is none of them, or its tensors are not exactly those of its model.
    """
    refuse_missing(Path(path))
    path = newest_of_run(Path(path))
    refuse_other_kind(path, (RUN, KIND, HF_MODEL), "a checkpoint, a run or a Hugging Face folder")
    if (path / CONFIG).is_file():
        return HfWeights(path)
    return checkpoint_weights(path)
