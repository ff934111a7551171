"""A model with more layers than the one that it is made from: whole layers are repeated.

`stack` repeats the whole trunk (stacking, arXiv 2405.15319), `interleave` each layer behind itself (block
expansion, arXiv 2401.02415).  With `identity` what repeated layers write to the residual is zero, so that the
model computes what it did, and these layers learn from there.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_sov import models
from megatron_sov.artifacts import manifest_sha256, refuse_existing
from megatron_sov.config import ModelConfig, RunConfig
from megatron_sov.convert.adapted_weights import checkpoint_weights
from megatron_sov.convert.derived import Derived, write_derived
from megatron_sov.convert.hf_import import planned_files
from megatron_sov.convert.values import KEEP
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.sharded_tensors import block_name
from megatron_sov.models.weights import Link
from megatron_sov.runs.checkpoints import IMPORTED, KIND, find_checkpoint, refuse_missing, settings_of

How = Literal["stack", "interleave"]
DEEPENED = "deepened"
"""What a manifest's content says of it."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
WRITES = ("self_attention.linear_proj.weight", "linear_fc2.weight")
"""Endings of the matrices that write to the residual."""


@dataclass(frozen=True)
class Deepening:
    """How layers are repeated."""

    num_layers: int
    """Of the trunk that is made."""
    how: How = "interleave"
    """stack: 0 1 2 0 1 2; interleave: 0 0 1 1 2 2."""
    identity: bool = False
    """Whether repeated layers write nothing to the residual at first."""

    def origins(self, num_layers: int) -> list[int]:
        """Return the layer that each one is made from, of a trunk of so many."""
        if self.how == "stack":
            return [i % num_layers for i in range(self.num_layers)]
        return [i * num_layers // self.num_layers for i in range(self.num_layers)]


def deepen(checkpoint: Path, out: Path, asked: Deepening, *, workers: int = 1,
           overwrite: bool = False) -> None:
    """Write a checkpoint with more layers (part "model").

    Args:
        checkpoint: the shallower one; a run stands for its newest.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        asked: how layers are repeated.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.

    Raises:
        UserError: layers would not be more, the family has no such model, the checkpoint is damaged, or the
            disk is full; nothing is left then.
    """
    refuse_existing(out, KIND, overwrite)
    refuse_missing(checkpoint)
    checkpoint = find_checkpoint(checkpoint)
    source = checkpoint_weights(checkpoint)
    model = deepened(source.model, asked)
    origins = asked.origins(source.model.num_layers)
    shallow = {(link.key, link.offset): link for link in source.links}
    links = {block_name(link.key, link.offset): link for link in models.get(model.family).links(model)}
    of_name = {name: link for link in links.values() for name in link.hf_names}

    def origin(link: Link) -> Link:
        found = _LAYER.fullmatch(link.key)
        key = f"decoder.layers.{origins[int(found[1])]}.{found[2]}" if found else link.key
        return shallow[key, link.offset]

    def block(link: Link) -> torch.Tensor:
        found, start = _LAYER.fullmatch(link.key), origin(link)
        made: torch.Tensor = start.join({name: source.read(name) for name in start.hf_names})
        is_repeated = found is not None and origins.index(origins[int(found[1])]) != int(found[1])
        is_silent = asked.identity and is_repeated and link.key.endswith(WRITES)
        return torch.zeros_like(made) if is_silent else made

    told = {**dataclasses.asdict(asked), "path": str(checkpoint), "origins": origins,
            "manifest_sha256": manifest_sha256(checkpoint)}
    derived = Derived(
        [source], links,
        planned_files(links, lambda name: source.dtype(origin(of_name[name]).hf_names[0]), KEEP),
        lambda spec: block(links[spec.name]), lambda spec: origin(links[spec.name]).hf_names,
        RunConfig(IMPORTED, model, code=settings_of(checkpoint).code), {"step": 0, DEEPENED: told})
    write_derived(out, "deepen", derived, {DEEPENED: told}, workers=workers, overwrite=overwrite)


def deepened(model: ModelConfig, asked: Deepening) -> ModelConfig:
    """Return the deeper architecture: each layer is of the kind of the one that it is made from.

    Raises:
        UserError: it is not deeper, a dense layer would stand behind one with experts, or the family has no
            such model.
    """
    if asked.num_layers <= model.num_layers:
        raise UserError(f"--layers {asked.num_layers}: must be more than the {model.num_layers} that the "
                        "model has")
    origins = asked.origins(model.num_layers)
    dense = [origin < model.num_layers - model.num_moe_layers() for origin in origins]
    if dense != sorted(dense, reverse=True):
        raise UserError(f"--how {asked.how}: a dense layer would stand behind one with experts; pass --how "
                        "interleave")
    kinds = model.layer_types()
    letters = "".join("L" if kinds[origin] == "sliding_attention" else "G" for origin in origins)
    pattern = next(letters[:n] for n in range(1, len(letters) + 1)
                   if (letters[:n] * len(letters))[:len(letters)] == letters)
    deeper = dataclasses.replace(model, num_layers=asked.num_layers, attention_pattern=pattern,
                                 num_dense_layers=sum(dense) if model.num_experts else 0)
    models.get(model.family).check(deeper)
    return deeper
