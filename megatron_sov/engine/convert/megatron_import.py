"""A `torch_dist` checkpoint of Megatron-LM or Megatron-Bridge becomes one that any layout can load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import refuse_existing
from megatron_sov.base.errors import UserError
from megatron_sov.engine.convert import DEFAULT_WORKERS
from megatron_sov.engine.convert.changed_values import KEEP, check_dtype_name
from megatron_sov.engine.convert.hf_import import Imported, write_imported
from megatron_sov.engine.convert.sources import check_dtypes
from megatron_sov.engine.convert.torch_dist.apart import read_apart
from megatron_sov.engine.convert.torch_dist.weights import (
    COMMON, METADATA, RUN_CONFIG, TorchDistWeights, find_iteration, iteration_of, num_padded_rows)
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.counterparts.architecture import architecture, of_arguments
from megatron_sov.model.counterparts.settings import read_sections
from megatron_sov.model.families.family import TokenIds
from megatron_sov.runs.checkpoints import KIND

FROM_MEGATRON = "from_megatron"
"""What a manifest's content says of it."""


@dataclass(frozen=True)
class ImportReport:
    """What is to be said of a conversion."""

    iteration: int | None
    """Of the checkpoint, where it says one."""
    num_padded_rows: int
    """Rows of the vocabulary's matrices that were left out, since no token id has them."""
    num_optimizer_tensors: int
    """Left out as well."""
    model: ModelConfig
    """The architecture that was read."""


def from_megatron(folder: str | Path, out: str | Path, dtype: str = KEEP, *, family: str = "",
                  overrides: Mapping[str, Any] | None = None, tokenizer: Path | None = None,
                  workers: int = DEFAULT_WORKERS, overwrite: bool = False,
                  redo: bool = False) -> ImportReport:
    """Write a checkpoint of Megatron-LM or Megatron-Bridge as one of ours (part "model", step 0).

    Args:
        folder: an iteration's, or the one that holds iterations; of NeMo 2 as well.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        dtype: as of `from_hf`.
        family: name of ours; empty: the only one that has such a model.
        overrides: fields of `ModelConfig`, in the place of what the checkpoint says.
        tokenizer: folder of the tokenizer to put beside the weights.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the checkpoint is of a format that is not read, its index holds anything but tensors'
            metadata, its settings are no model of ours, a tensor is missing or damaged; nothing is left then.
    """
    out = Path(out)
    check_dtype_name(dtype)
    refuse_existing(out, KIND, overwrite)
    found = find_iteration(Path(folder))
    stated, iteration = _stated(found)
    try:
        model = architecture(stated, family, overrides)
    except UserError as e:
        raise UserError(f"{found}: {e}") from None
    weights = TorchDistWeights(found, model)
    check_dtypes(weights)
    index_sha256 = hashlib.sha256((found / METADATA).read_bytes()).hexdigest()
    write_imported(out, Imported(weights, "from-megatron", tokenizer, TokenIds(), {
        FROM_MEGATRON: {"path": str(found), "iteration": iteration, "index_sha256": index_sha256}}),
        dtype, workers=workers, overwrite=overwrite, redo=redo)
    return ImportReport(iteration, num_padded_rows(weights), weights.tensors.num_skipped, model)


def _stated(folder: Path) -> tuple[dict[str, Any], int | None]:
    """Return what a checkpoint says of its model, and its iteration."""
    iteration = iteration_of(folder)
    if (folder / RUN_CONFIG).is_file():
        model = read_sections(folder / RUN_CONFIG).get("model")
        if model is None:
            raise UserError(f"{folder / RUN_CONFIG}: has no `model`, so it says nothing of the architecture; "
                            "restore it from its source")
        return model, iteration
    if not (folder / COMMON).is_file():
        return {}, iteration
    said = read_apart("settings", folder / COMMON)
    known = said["iteration"] if isinstance(said["iteration"], int) else None
    return of_arguments(said["args"]), iteration if known is None else known
