"""A checkpoint becomes a Hugging Face folder; memory holds one tensor at a time (of experts: one expert's)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_sov import models
from megatron_sov.artifacts import atomic_write, new_artifact, refuse_existing, to_json
from megatron_sov.convert import MAX_SHARD_BYTES
from megatron_sov.convert.companions import carry, ids_beside
from megatron_sov.convert.shards import TensorSpec, plan_shards, write_shards
from megatron_sov.convert.sources import CONFIG, CheckpointWeights, newest_of_run
from megatron_sov.errors import UserError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
KEEP = "keep"


def to_hf(checkpoint: str | Path, out: str | Path, dtype: str = KEEP, *, max_shard_bytes: int = MAX_SHARD_BYTES,
          overwrite: bool = False) -> None:
    """Write a checkpoint as a Hugging Face folder (an artifact of kind "hf_model").

    Args:
        checkpoint: a checkpoint folder.
        out: the folder to write; it appears only when complete.
        dtype: "float32", "bfloat16", "float16", "float64", or "keep" for the checkpoint's own (float32 for one of float64,
            which few readers expect); router biases are float32 always.
        max_shard_bytes: largest size of one safetensors file.
        overwrite: replace an "hf_model" artifact that is already there.

    Raises:
        UserError: the checkpoint is damaged, its family cannot express its model, values overflow `dtype`, the disk is full.
    """
    checkpoint, out = newest_of_run(Path(checkpoint)), Path(out)
    if dtype not in (KEEP, *DTYPES):
        raise UserError(f"--dtype {dtype!r}: does not exist{nearest(dtype, DTYPES)} (dtypes: {', '.join(DTYPES)}, {KEEP})")
    if max_shard_bytes <= 0:
        raise UserError(f"--max-shard-bytes {max_shard_bytes}: must be positive")
    refuse_existing(out, "hf_model", overwrite)
    source = CheckpointWeights(checkpoint)
    specs = planned_tensors(source, dtype)
    main_dtype = specs[0].dtype
    tokens = ids_beside(checkpoint / "tokenizer")
    config = models.get(source.model.family).to_hf_config(source.model, str(main_dtype).removeprefix("torch."), tokens)
    _check_space(out, sum(spec.size_bytes for spec in specs))
    with new_artifact(out, "hf_model", overwrite=overwrite) as artifact, \
            tqdm(total=len(specs), desc="to-hf", unit="tensor", disable=None) as bar:
        def read(spec: TensorSpec) -> torch.Tensor:
            bar.update()
            return cast(source.read(spec.name), spec)

        artifact.known_files |= write_shards(artifact.path, plan_shards(specs, max_shard_bytes), read)
        atomic_write(artifact.path / CONFIG, to_json(config))
        carry(checkpoint / "tokenizer", artifact.path, tokens)
        artifact.add_input(checkpoint)
        artifact.content = {"family": source.model.family, "num_tensors": len(specs), "dtype": config["dtype"],
                            "num_parameters": sum(spec.size_bytes // spec.dtype.itemsize for spec in specs)}
        artifact.settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}


def planned_tensors(source: CheckpointWeights, dtype: str) -> list[TensorSpec]:
    """Return name, shape and dtype of every Hugging Face tensor that a checkpoint becomes."""
    def of(name: str) -> torch.dtype:
        own = source.dtype(name)
        return DTYPES.get(dtype) or (torch.float32 if own == torch.float64 else own)

    return [TensorSpec(name, shape, torch.float32 if link.fp32 else of(name))
            for link in source.links for name, shape in link.hf_shapes().items()]


def cast(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the tensor in the planned dtype.

    Raises:
        UserError: a finite value becomes infinite (float16 ends at 65504).
    """
    result = tensor.to(spec.dtype)
    if spec.dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        raise UserError(f"{spec.name}: its largest value {tensor.abs().max().item():g} does not fit float16 (65504); "
                        "use --dtype bfloat16")
    return result


def _check_space(out: Path, needed_bytes: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(f"{out}: needs {needed_bytes / 1e9:.1f} GB, but {folder} has {free_bytes / 1e9:.1f} GB free; "
                        "free some space or choose another disk")
