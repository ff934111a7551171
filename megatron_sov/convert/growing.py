"""A larger model that begins as a smaller one: what is read, and what is written and told of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sov import models
from megatron_sov.artifacts import manifest_sha256, refuse_existing
from megatron_sov.config import ModelConfig, RunConfig
from megatron_sov.convert.changed_values import KEEP
from megatron_sov.convert.derived import Derived, Opened, write_derived
from megatron_sov.convert.hf_import import planned_files
from megatron_sov.convert.peft import checkpoint_weights
from megatron_sov.mcore.checkpoint.sharded_tensors import block_name
from megatron_sov.models.weights import Link
from megatron_sov.runs.checkpoints import IMPORTED, KIND, find_checkpoint, refuse_missing, settings_of


class Growth(Protocol):
    """How each block of the larger model is made."""

    def origin(self, link: Link) -> Link:
        """Return the block of the smaller model that a block has its dtype from, and its numbers unless it is
        drawn."""
        ...

    def block(self, link: Link) -> torch.Tensor:
        """Return a block."""
        ...


def opened_source(checkpoint: Path, out: Path, overwrite: bool) -> Opened:
    """Open the smaller model, where `out` may be written.

    Args:
        checkpoint: its folder; a run stands for its newest.
        out: the checkpoint to write.
        overwrite: whether one that is there may be replaced.

    Raises:
        UserError: `out` is taken, or there is no sound checkpoint.
    """
    refuse_existing(out, KIND, overwrite)
    refuse_missing(checkpoint)
    return checkpoint_weights(find_checkpoint(checkpoint))


def block_of(source: Opened, link: Link) -> torch.Tensor:
    """Return a block of the smaller model."""
    block: torch.Tensor = link.join({name: source.read(name) for name in link.hf_names})
    return block


def write_grown(source: Opened, out: Path, model: ModelConfig, growth: Growth,
                told: tuple[str, Mapping[str, Any]], *, workers: int, overwrite: bool, redo: bool) -> None:
    """Write the larger model as a checkpoint (part "model"); a killed command goes on where it was.

    Args:
        source: the smaller one.
        out: the checkpoint.
        model: the larger architecture.
        growth: how its blocks are made.
        told: what the manifest's content says of it, under that name; with the source all that decides it.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the source is damaged, or the disk is full; nothing is left then.
    """
    links = {block_name(link.key, link.offset): link for link in models.get(model.family).links(model)}
    of_name = {name: link for link in links.values() for name in link.hf_names}
    name, asked = told
    grown = {name: {**asked, "path": str(source.path), "manifest_sha256": manifest_sha256(source.path)}}
    derived = Derived(
        [source], links,
        planned_files(links, lambda hf: source.dtype(growth.origin(of_name[hf]).hf_names[0]), KEEP),
        lambda spec: growth.block(links[spec.name]).to(spec.dtype),
        lambda spec: growth.origin(links[spec.name]).hf_names,
        RunConfig(IMPORTED, model, code=settings_of(source.path).code), {"step": 0, **grown})
    write_derived(out, name, derived, grown, workers=workers, overwrite=overwrite, redo=redo)
