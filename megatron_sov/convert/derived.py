"""A checkpoint whose blocks are computed from other checkpoints; a killed command goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sov.artifacts import MANIFEST, FileRecord
from megatron_sov.config import RunConfig
from megatron_sov.convert.changed_values import check_space
from megatron_sov.convert.hf_import import checked_source, index_of
from megatron_sov.convert.peft import AdaptedWeights, add_inputs
from megatron_sov.convert.shard_writer import digest_of, write_files
from megatron_sov.convert.sources import PART, CheckpointWeights
from megatron_sov.mcore.checkpoint.sharded_tensors import write_index
from megatron_sov.mcore.checkpoint.writer import TensorSpec
from megatron_sov.models.weights import Link
from megatron_sov.runs.checkpoints import KIND
from megatron_sov.work.resumable_artifact import resumable_artifact

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
