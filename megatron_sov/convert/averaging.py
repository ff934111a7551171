"""Average checkpoints with equal architectures, tensor by tensor, in float64.

Memory holds two output tensors and a million elements of each checkpoint. Adapters of one base are averaged
as merged models: tensors without an adapter keep the base's bits, the others are merged for each checkpoint.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megatron_sov.base.artifacts import MANIFEST, check_output_folder, manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokenizer
from megatron_sov.checkpoint.sharded_tensors import format_block_name, write_index
from megatron_sov.convert.companion_files import copy_carried_fields
from megatron_sov.convert.dtypes import KEEP, convert_tensor
from megatron_sov.convert.hf_import import build_index, hash_file_plan, plan_files, write_unfinished
from megatron_sov.convert.peft import AdaptedWeights, open_checkpoint_weights, record_inputs
from megatron_sov.convert.sources import PART, Weights
from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.config.train import AVERAGES
from megatron_sov.model.families.family import TRAINING_FIELDS
from megatron_sov.model.families.weights import Link
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, CHECKPOINTS_FOLDER, IMPORTED_RECIPE, MERGED, check_model_path, checkpoint_step,
    find_checkpoint, list_complete, read_adapter_base, read_checkpoint_settings)
from megatron_sov.work.progress.resumable import resumable_artifact


def compute_weights(count: int, kind: str, decay: float) -> list[float]:
    """Return averaging weights for checkpoints, oldest first. linear: 1, 2, 3, ...; ema: each weight is
    `decay` times the next, an exponential moving average that starts at the first checkpoint."""
    if kind == "uniform":
        return [1.0] * count
    if kind == "linear":
        return [float(i) for i in range(1, count + 1)]
    return [decay ** (count - 1 - i) for i in range(count)]


def choose_checkpoints(run: Path, last: int | None, steps: Sequence[int | None] = (None, None),
                       kind: str = "uniform", decay: float = 0.5) -> list[tuple[Path, float]]:
    """Return a run's complete checkpoints to average, with averaging weights (see `compute_weights`).

    `last` is the number of newest checkpoints, `steps` are first and last step; None means all. Raises
    `UserError`: there are fewer than two checkpoints, or fewer than `last`.
    """
    check_model_path(run)
    first, end = steps
    checkpoints = [path for path in list_complete(run / CHECKPOINTS_FOLDER)
                   if (first is None or checkpoint_step(path) >= first)
                   and (end is None or checkpoint_step(path) <= end)]
    bounds = ""
    if first is not None or end is not None:
        bounds = f" between steps {first or 0} and {'the last' if end is None else end}"
    if last is not None and not 2 <= last <= len(checkpoints):
        raise UserError(f"--last {last}: must be at least 2 and at most {len(checkpoints)}, the number of "
                        f"complete checkpoints of {run}{bounds}")
    if len(checkpoints) < 2:
        raise UserError(f"{run}: has {len(checkpoints)} complete checkpoints{bounds}, but a mean needs two; "
                        "keep more (train.keep_checkpoints), or choose other steps")
    if kind not in AVERAGES:
        raise UserError(f"--weights {kind}: must be one of {', '.join(AVERAGES)}")
    if not 0 < decay <= 1:
        raise UserError(f"--decay {decay}: must be above 0 and at most 1")
    checkpoints = checkpoints[-(last or 0):]
    return list(zip(checkpoints, compute_weights(len(checkpoints), kind, decay), strict=True))


MAX_SLAB_ELEMENTS = 1 << 20
"""Tensor elements averaged at a time."""


def average(checkpoints: Sequence[tuple[Path, float]], out: str | Path, *, workers: int = 1,
            overwrite: bool = False, redo: bool = False, min_checkpoints: int = 2) -> None:
    """Write the weighted mean sum w x / sum w over checkpoints as a checkpoint (part `model`).

    `checkpoints`: folders (a run means its newest checkpoint) and weights; `workers`: files written at a
    time, each with two tensors in memory; `min_checkpoints`: 1 if an automatic choice may select one
    checkpoint. For the other arguments see `from_hf`. Raises `UserError`: there are too few checkpoints, a
    weight is not positive, architectures, tokenizers or bases differ, a checkpoint is damaged, or the disk is
    full.
    """
    out = Path(out)
    check_output_folder(out, CHECKPOINT_KIND, overwrite)
    for path, _ in checkpoints:
        check_model_path(path)
    paths = [find_checkpoint(path) for path, _ in checkpoints]
    if len(paths) < min_checkpoints:
        raise UserError(f"{', '.join(map(str, paths)) or 'no checkpoint'}: a mean needs at least two "
                        "checkpoints; pass another checkpoint")
    weights = [weight for _, weight in checkpoints]
    _check_weights(paths, weights)
    sources = [open_checkpoint_weights(path) for path in paths]
    links = {format_block_name(link.key, link.offset): link for link in sources[0].links}
    files = plan_files(links, sources[0].get_dtype, KEEP)
    merged = [{"path": str(path), "step": read_manifest(path, CHECKPOINT_KIND).content.get("step", 0),
               "weight": weight, "manifest_sha256": manifest_sha256(path)}
              for path, weight in zip(paths, weights, strict=True)]
    plan = {"merged": merged, "files": hash_file_plan(files)}
    with resumable_artifact(out, CHECKPOINT_KIND, "megatron-sov convert average", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        write_unfinished(artifact, files,
                         lambda spec: average_block(sources, weights, links[spec.name], spec.dtype), sources,
                         lambda spec: links[spec.name].hf_names, "average", workers)
        write_index(artifact.path, PART, [build_index(files, links)])
        if (tokenizer := paths[0] / "tokenizer").is_dir():
            shutil.copytree(tokenizer, artifact.path / "tokenizer", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(MANIFEST))
        for source in sources:
            record_inputs(artifact.writer, source)
        artifact.writer.content = {"parts": [PART], "tokens": 0, "step": max(m["step"] for m in merged),
                                   MERGED: merged, **copy_carried_fields(paths[0])}
        artifact.writer.settings = dataclasses.replace(
            read_checkpoint_settings(paths[0]), recipe=IMPORTED_RECIPE, lora=LoraConfig()).to_dict()


def average_block(sources: Sequence[Weights], weights: Sequence[float], link: Link,
                  dtype: torch.dtype) -> torch.Tensor:
    if any(isinstance(source, AdaptedWeights) for source in sources):
        block = link.join({name: _average_adapted(sources, weights, name) for name in link.hf_names})
        return torch.as_tensor(block).to(dtype)
    out = torch.empty(link.block_shape, dtype=dtype)
    flat, num_done = out.view(-1), 0
    for offset, extent in _iter_slabs(link):
        slabs = (convert_tensor(source.tensors.read(link.key, offset, extent), torch.float64, source.path,
                                link.key) for source in sources)
        mean = _compute_mean(slabs, weights)
        flat[num_done:num_done + mean.numel()] = mean.view(-1)
        num_done += mean.numel()
    return out


def _average_adapted(sources: Sequence[Weights], weights: Sequence[float], name: str) -> torch.Tensor:
    if not any(source.list_files(name) for source in sources):  # no adapter changes this tensor
        return sources[0].read(name)
    tensors = (convert_tensor(source.read(name), torch.float64, source.path, name) for source in sources)
    return _compute_mean(tensors, weights).to(sources[0].get_dtype(name))


def _compute_mean(tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return sum w x / sum w; overwrites the float64 tensors."""
    total: torch.Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        total = tensor.mul_(weight) if total is None else total.add_(tensor.mul_(weight))
    assert total is not None
    return total.div_(sum(weights))


def _iter_slabs(link: Link) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split a block into slabs; yield (offset, extent) in the global tensor, in order."""
    axis = next((i for i, n in enumerate(link.extent) if n > 1), len(link.extent) - 1)
    step = max(1, MAX_SLAB_ELEMENTS // math.prod(link.extent[axis + 1:]))
    for low in range(0, link.extent[axis], step):
        rows = min(step, link.extent[axis] - low)
        yield ((*link.offset[:axis], link.offset[axis] + low, *link.offset[axis + 1:]),
               (*link.extent[:axis], rows, *link.extent[axis + 1:]))


def _check_weights(paths: Sequence[Path], weights: Sequence[float]) -> None:
    for path, weight in zip(paths, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{path}: its weight {weight:g} must be a positive number; omit the checkpoint, "
                            "or increase its weight")
    for path in paths[1:]:
        _check_compatible(paths[0], path)


def _check_compatible(first: Path, path: Path) -> None:
    """Raise `UserError` if architecture, tokenizer or base differ."""
    models = [read_checkpoint_settings(folder).model for folder in (first, path)]
    for field in dataclasses.fields(ModelConfig):
        value, other_value = (getattr(model, field.name) for model in models)
        if value != other_value and field.name not in TRAINING_FIELDS:
            raise UserError(f"{path}: has model.{field.name} = {other_value}, but {first} has {value}; only "
                            "checkpoints of one architecture can be averaged")
    bases = [read_adapter_base(p) for p in (first, path)]
    digests = [None if base is None else base.sha256 for base in bases]
    if digests[0] != digests[1]:
        contents = ["all weights" if base is None else f"an adapter of {base.path}" for base in bases]
        raise UserError(f"{path}: contains {contents[1]}, but {first} contains {contents[0]}; convert "
                        "adapters to full checkpoints first (`megatron-sov convert to-hf`, then `from-hf`)")
    check_same_tokenizer(first / "tokenizer", path / "tokenizer",
                         "only checkpoints with the same tokenizer can be averaged")
