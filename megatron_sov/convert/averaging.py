"""The mean of checkpoints of one architecture, tensor by tensor, in float64.

Memory holds the tensor that is written, the next one, and a million elements of each checkpoint in turn.  Of
adapters, which belong to one base, it is the mean of the models that they make; what they do not change stays
the base's own bits, and a tensor that they change is made whole for each.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import MANIFEST, FileRecord, manifest_sha256, read_manifest, refuse_existing
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import refuse_other_tokenizer
from megatron_sov.checkpoint.sharded_tensors import block_name, write_index
from megatron_sov.checkpoint.writer import TensorSpec
from megatron_sov.convert.dtypes import KEEP, check_space, convert_tensor
from megatron_sov.convert.hf_import import (
    checked_source, copy_carried_fields, digest_of, index_of, planned_files, write_files)
from megatron_sov.convert.peft import AdaptedWeights, add_inputs, checkpoint_weights
from megatron_sov.convert.sources import PART, CheckpointWeights
from megatron_sov.model.config import LoraConfig, ModelConfig, RunConfig
from megatron_sov.model.config.train import AVERAGES
from megatron_sov.model.families.family import OF_TRAINING
from megatron_sov.model.families.weights import Link
from megatron_sov.runs.checkpoints import (
    CHECKPOINTS_OF_A_RUN, IMPORTED, KIND, MERGED, adapter_base, complete, find_checkpoint, refuse_missing,
    settings_of, step_of)
from megatron_sov.work.progress.resumable import resumable_artifact

Opened = CheckpointWeights | AdaptedWeights


@dataclass(frozen=True)
class Derived:
    """What a checkpoint is made of."""

    sources: Sequence[Opened]
    """Checkpoints that are read; the tokenizer is the first one's."""
    links: Mapping[str, Link]
    """Block -> its link, of the checkpoint that is written."""
    files: Mapping[str, list[TensorSpec]]
    """File -> its blocks."""
    block: Callable[[TensorSpec], torch.Tensor]
    """Computes one."""
    needs: Callable[[TensorSpec], Iterable[str]]
    """Hugging Face names of the tensors of the sources that a block is computed from."""
    settings: RunConfig
    """Of the checkpoint that is written."""
    content: Mapping[str, Any]
    """Of its manifest."""


def write_derived(out: Path, what: str, derived: Derived, plan: Mapping[str, Any], *, workers: int,
                  overwrite: bool, redo: bool) -> None:
    """Write a checkpoint (part "model"); it appears only when complete.

    Args:
        out: the checkpoint.
        what: name of the work, for its bar.
        derived: what it is made of.
        plan: with the files, all that decides its bytes.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: a source is damaged, other work on it is unfinished, or the disk refuses.
    """
    files, links = dict(derived.files), dict(derived.links)
    whole = {**plan, "files": digest_of(files)}
    with resumable_artifact(out, KIND, f"megatron-sov convert {what}", whole, overwrite=overwrite,
                            redo=redo) as artifact, ExitStack() as held, tqdm(
                total=len(links), desc=what, unit="block", disable=None) as bar:
        missing = {name: blocks for name, blocks in files.items() if name not in artifact.finished}
        check_space(out, sum(spec.size_bytes for blocks in missing.values() for spec in blocks))
        bar.update(len(links) - sum(map(len, missing.values())))

        def read(spec: TensorSpec) -> torch.Tensor:
            block = derived.block(spec)
            bar.update()
            return block

        checks = [held.enter_context(checked_source(source, workers)) for source in derived.sources]

        def finish(name: str, record: FileRecord) -> None:
            for check in checks:
                # before the file counts as finished: a killed command would go on behind a file that was made
                # from damaged ones
                check.require(hf_name for spec in files[name] for hf_name in derived.needs(spec))
            artifact.finish(name, record)

        write_files(artifact.path, missing, read, workers, finish)
        write_index(artifact.path, PART, [index_of(files, links)])
        tokenizer = derived.sources[0].path / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, artifact.path / "tokenizer", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(MANIFEST))
        for source in derived.sources:
            add_inputs(artifact.writer, source)
        artifact.writer.content = {"parts": [PART], "tokens": 0, **derived.content}
        artifact.writer.settings = derived.settings.to_dict()


# How much each of a run's checkpoints counts in their mean.

def weights_of(count: int, kind: str, decay: float) -> list[float]:
    """Return the weights of checkpoints in order, the newest last.

    Args:
        count: how many.
        kind: "uniform"; "linear": 1, 2, 3, ...; "ema": each `decay` times that of the one behind it, which is
            what an exponential moving average over them, begun with the first, comes to for many.
        decay: 0 to 1.
    """
    if kind == "uniform":
        return [1.0] * count
    if kind == "linear":
        return [float(i) for i in range(1, count + 1)]
    return [decay ** (count - 1 - i) for i in range(count)]


def choose_checkpoints(run: Path, last: int | None, steps: Sequence[int | None] = (None, None),
                       kind: str = "uniform", decay: float = 0.5) -> list[tuple[Path, float]]:
    """Return a run's complete checkpoints that are averaged, and their weights.

    Args:
        run: its folder.
        last: how many of the newest; None: all.
        steps: from which step to which; None: no bound.
        kind: see `weights_of`.
        decay: of "ema".

    Raises:
        UserError: there are fewer than two, or fewer than `last`.
    """
    refuse_missing(run)
    first, end = steps
    found = [path for path in complete(run / CHECKPOINTS_OF_A_RUN)
             if (first is None or step_of(path) >= first) and (end is None or step_of(path) <= end)]
    bounds = ""
    if first is not None or end is not None:
        bounds = f" between steps {first or 0} and {'the last' if end is None else end}"
    if last is not None and not 2 <= last <= len(found):
        raise UserError(f"--last {last}: must be at least 2, and at most the {len(found)} complete "
                        f"checkpoints of {run}{bounds}")
    if len(found) < 2:
        raise UserError(f"{run}: has {len(found)} complete checkpoints{bounds}, and a mean needs two; keep "
                        "more (train.keep_checkpoints), or choose other steps")
    if kind not in AVERAGES:
        raise UserError(f"--weights {kind}: is none of {', '.join(AVERAGES)}")
    if not 0 < decay <= 1:
        raise UserError(f"--decay {decay}: must lie above 0 and be at most 1")
    found = found[-(last or 0):]
    return list(zip(found, weights_of(len(found), kind, decay), strict=True))


SLAB_ELEMENTS = 1 << 20
"""Elements of a tensor that are averaged at a time."""


def average(checkpoints: Sequence[tuple[Path, float]], out: str | Path, *, workers: int = 1,
            overwrite: bool = False, redo: bool = False, fewest: int = 2) -> None:
    """Write the weighted mean of checkpoints as a checkpoint (part "model"): sum w x / sum w.

    Args:
        checkpoints: folders (a run stands for its newest one) and weights; equal weights give the plain mean.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        workers: files that are written at a time, each with two tensors in memory.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.
        fewest: checkpoints that it is given; 1 where a choice may come to one alone.

    Raises:
        UserError: there are fewer, a weight is not positive, they are of other architectures,
            tokenizers or bases, one is damaged, the disk is full; nothing is left then.
    """
    out = Path(out)
    refuse_existing(out, KIND, overwrite)
    paths = [_find_start(path) for path, _ in checkpoints]
    if len(paths) < fewest:
        raise UserError(f"{', '.join(map(str, paths)) or 'no checkpoint'}: a mean needs at least two "
                        "checkpoints; name another one")
    weights = _checked_weights(paths, [weight for _, weight in checkpoints])
    sources = [checkpoint_weights(path) for path in paths]
    links = {block_name(link.key, link.offset): link for link in sources[0].links}
    files = planned_files(links, sources[0].dtype, KEEP)
    merged = [{"path": str(path), "step": read_manifest(path, KIND).content.get("step", 0),
               "weight": weight,
               "manifest_sha256": manifest_sha256(path)} for path, weight in zip(paths, weights, strict=True)]
    derived = Derived(
        sources, links, files,
        lambda spec: mean_block(sources, weights, links[spec.name], spec.dtype),
        lambda spec: links[spec.name].hf_names,
        dataclasses.replace(settings_of(paths[0]), recipe=IMPORTED, lora=LoraConfig()),
        {"step": max(m["step"] for m in merged), MERGED: merged, **copy_carried_fields(paths[0])})
    write_derived(out, "average", derived, {"merged": merged}, workers=workers, overwrite=overwrite,
                  redo=redo)


def mean_block(sources: Sequence[Opened], weights: Sequence[float], link: Link,
               dtype: torch.dtype) -> torch.Tensor:
    """Return the mean of one block of a tensor."""
    if any(isinstance(source, AdaptedWeights) for source in sources):
        block = link.join({name: _mean_of_adapted(sources, weights, name) for name in link.hf_names})
        return torch.as_tensor(block).to(dtype)
    out = torch.empty(link.block_shape, dtype=dtype)
    flat, done = out.view(-1), 0
    for offset, extent in _slabs(link):
        mean = _mean((convert_tensor(source.read_stored(link.key, offset, extent), torch.float64, source.path,
                                link.key)
                      for source in sources if isinstance(source, CheckpointWeights)), weights)
        flat[done:done + mean.numel()] = mean.view(-1)
        done += mean.numel()
    return out


def _mean_of_adapted(sources: Sequence[Opened], weights: Sequence[float], name: str) -> torch.Tensor:
    if not any(source.files_of(name) for source in sources):  # no adapter changes it
        return sources[0].read(name)
    return _mean((convert_tensor(source.read(name), torch.float64, source.path, name) for source in sources),
                 weights).to(sources[0].dtype(name))


def _mean(tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return sum w x / sum w; changes the tensors, of float64."""
    total: torch.Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        total = tensor.mul_(weight) if total is None else total.add_(tensor.mul_(weight))
    assert total is not None
    return total.div_(sum(weights))


def _slabs(link: Link) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and extent, in the whole tensor, of the parts of a block, in order."""
    axis = next((i for i, n in enumerate(link.extent) if n > 1), len(link.extent) - 1)
    step = max(1, SLAB_ELEMENTS // math.prod(link.extent[axis + 1:]))
    for low in range(0, link.extent[axis], step):
        rows = min(step, link.extent[axis] - low)
        yield ((*link.offset[:axis], link.offset[axis] + low, *link.offset[axis + 1:]),
               (*link.extent[:axis], rows, *link.extent[axis + 1:]))


def _find_start(path: Path) -> Path:
    refuse_missing(path)
    return find_checkpoint(path)


def _checked_weights(paths: Sequence[Path], weights: Sequence[float]) -> list[float]:
    """Return the weights, after everything that can be checked from headers alone."""
    for path, weight in zip(paths, weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{path}: its weight {weight:g} must be a positive number; leave it out, or give "
                            "it more")
    for path in paths[1:]:
        _refuse_other(paths[0], path)
    return list(weights)


def _refuse_other(first: Path, path: Path) -> None:
    """Refuse a checkpoint of which a mean with the first one would mean nothing."""
    ours, theirs = settings_of(first).model, settings_of(path).model
    for name, value, found in _differing(ours, theirs):
        raise UserError(f"{path}: has model.{name} = {found}, and {first} has {value}; only checkpoints of "
                        "one architecture have a mean")
    bases = [adapter_base(p) for p in (first, path)]
    digests = [None if base is None else base.sha256 for base in bases]
    if digests[0] != digests[1]:
        told = ["all weights" if base is None else f"an adapter of {base.path}" for base in bases]
        raise UserError(f"{path}: holds {told[1]}, and {first} {told[0]}; convert adapters to whole "
                        "checkpoints first (`megatron-sov convert to-hf`, then `from-hf`)")
    refuse_other_tokenizer(first / "tokenizer", path / "tokenizer",
                           "only checkpoints of one tokenizer have a mean")


def _differing(ours: ModelConfig, theirs: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        if pair[0] != pair[1] and field.name not in OF_TRAINING:
            yield field.name, *pair
