"""A Hugging Face folder becomes a checkpoint that any layout can load; memory holds two blocks of each
file in the making."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sov import models
from megatron_sov.artifacts import MANIFEST, FileRecord, refuse_existing
from megatron_sov.config import RunConfig
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.companions import carry, ids_in
from megatron_sov.convert.copies import check_copies
from megatron_sov.convert.shard_writer import digest_of, plan_shards, write_files
from megatron_sov.convert.source_check import checked_source
from megatron_sov.convert.sources import PART, HfWeights, Weights, check_dtypes
from megatron_sov.convert.values import KEEP, check_dtype_name, check_space, converted, planned_dtype
from megatron_sov.digests import fingerprint
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.assembling import StoredBlock
from megatron_sov.mcore.checkpoint.sharded_tensors import (
    MAX_FILE_BYTES,
    Index,
    add_block,
    block_name,
    file_name,
    write_index,
)
from megatron_sov.mcore.checkpoint.writer import TensorSpec
from megatron_sov.models.family import TokenIds
from megatron_sov.models.weights import Link
from megatron_sov.obs.warning import warn
from megatron_sov.pretrained import CONFIG, hub_name
from megatron_sov.runs.checkpoints import HF_MODEL, IMPORTED, KIND, SOURCE, refuse_missing, refuse_other_kind
from megatron_sov.work.resumable_artifact import resumable_artifact


def from_hf(hf_dir: str | Path, out: str | Path, dtype: str = KEEP, *, workers: int = DEFAULT_WORKERS,
            overwrite: bool = False, redo: bool = False) -> None:
    """Write a Hugging Face folder as a checkpoint (part "model", step 0).

    Args:
        hf_dir: a folder with config.json and safetensors files.
        out: the checkpoint to write; it appears only when complete, and a killed command
            goes on where it was.
        dtype: "float32", "bfloat16", "float16", "float64", or "keep" for the folder's own;
            router biases are float32 always.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the config has fields that we do not honour, the tensors are not exactly those of its
            model, a value is not finite, the disk is full,
            or other work on the output is unfinished.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    check_dtype_name(dtype)
    refuse_existing(out, KIND, overwrite)
    refuse_missing(hf_dir)
    refuse_other_kind(hf_dir, (HF_MODEL,), "a Hugging Face folder")
    if not (hf_dir / CONFIG).is_file():
        raise UserError(f"{hf_dir}: has no {CONFIG}, so it is not a Hugging Face folder; "
                        "pass the folder that holds the model")
    source = HfWeights(hf_dir)
    check_dtypes(source)
    if source.left_out:
        warn(f"{hf_dir}: the {len(source.left_out)} tensors of what sees pictures "
             f"({source.left_out[0]}, ...) are left out: the checkpoint is the model without it")
    check_copies(source)
    content = {SOURCE: hub_name(hf_dir)}
    write_imported(out, Imported(source, "from-hf", hf_dir, ids_in(source.config), content), dtype,
                   workers=workers, overwrite=overwrite, redo=redo)


@dataclass(frozen=True)
class Imported:
    """What a checkpoint is made of, under Hugging Face names."""

    weights: Weights
    """Where the tensors come from; their folder decides, with the dtype, every byte."""
    what: str
    """Name of the work, for its bar."""
    tokenizer: Path | None
    """Folder of the tokenizer's files."""
    tokens: TokenIds
    """Ids of special tokens, where no file of the tokenizer says them."""
    content: Mapping[str, Any]
    """Of the manifest, besides what every checkpoint has."""


def write_imported(out: Path, source: Imported, dtype: str, *, workers: int, overwrite: bool,
                   redo: bool) -> None:
    """Write a checkpoint (part "model", step 0); it appears only when complete.

    Args:
        out: the checkpoint.
        source: what it is made of.
        dtype: as of `from_hf`.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: a tensor is damaged, a value is not finite, the disk is full,
            or other work on the output is unfinished.
    """
    weights, folder = source.weights, source.weights.path
    links = {block_name(link.key, link.offset): link for link in weights.links}
    files = planned_files(links, weights.dtype, dtype)
    plan = {"from": fingerprint(folder), "dtype": dtype, "model": dataclasses.asdict(weights.model),
            "files": digest_of(files)}
    with resumable_artifact(out, KIND, f"megatron-sov convert {source.what}", plan, overwrite=overwrite,
                            redo=redo) as artifact, \
            tqdm(total=len(links), desc=source.what, unit="block", disable=None) as bar:
        missing = {name: blocks for name, blocks in files.items() if name not in artifact.finished}
        check_space(out, sum(spec.size_bytes for blocks in missing.values() for spec in blocks))
        bar.update(len(links) - sum(map(len, missing.values())))

        def read(spec: TensorSpec) -> torch.Tensor:
            link = links[spec.name]
            parts = {name: converted(weights.read(name), spec.dtype, folder, name) for name in link.hf_names}
            block: torch.Tensor = link.join(parts)
            bar.update()
            return block

        with checked_source(weights, workers) as check:
            def finish(name: str, record: FileRecord) -> None:
                check.require(hf_name for spec in files[name] for hf_name in links[spec.name].hf_names)
                artifact.finish(name, record)

            write_files(artifact.path, missing, read, workers, finish)
        if (folder / MANIFEST).is_file():
            artifact.writer.add_input(folder)
        write_index(artifact.path, PART, [index_of(files, links)])
        if source.tokenizer is not None:
            carry(source.tokenizer, artifact.path / "tokenizer", source.tokens)
        artifact.writer.content = {"step": 0, "parts": [PART], "tokens": 0, **source.content}
        code = models.OWN.code(weights.model.family)
        artifact.writer.settings = RunConfig(IMPORTED, weights.model, code=(code,) if code else ()).to_dict()


def planned_files(links: dict[str, Link], dtype_of: Callable[[str], torch.dtype],
                  dtype: str) -> dict[str, list[TensorSpec]]:
    """Return every block of a checkpoint, once, by the name of its file.

    Args:
        links: block -> its link.
        dtype_of: Hugging Face name -> the dtype in which a tensor comes.
        dtype: as of `from_hf`.
    """
    specs = [
        TensorSpec(name, link.block_shape, planned_dtype(dtype, link.fp32, dtype_of(link.hf_names[0])))
        for name, link in links.items()]
    return {file_name(PART, 0, i): shard for i, shard in enumerate(plan_shards(specs, MAX_FILE_BYTES))}


def index_of(files: dict[str, list[TensorSpec]], links: dict[str, Link]) -> Index:
    """Return the index of the blocks of `planned_files`."""
    index: Index = {}
    for file, blocks in files.items():
        for spec in blocks:
            link = links[spec.name]
            add_block(index, link.key, spec.dtype, link.shape,
                      StoredBlock(file, spec.name, link.offset, link.extent))
    return index
