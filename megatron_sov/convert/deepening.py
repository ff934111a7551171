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
from megatron_sov.config import ModelConfig
from megatron_sov.convert.derived import Opened
from megatron_sov.convert.growing import block_of, opened_source, write_grown
from megatron_sov.errors import UserError
from megatron_sov.models.hf_layers import shortest_pattern
from megatron_sov.models.weights import Link

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
           overwrite: bool = False, redo: bool = False) -> None:
    """Write a checkpoint with more layers (part "model").

    Args:
        checkpoint: the shallower one; a run stands for its newest.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        asked: how layers are repeated.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: layers would not be more, the family has no such model, the checkpoint is damaged, or the
            disk is full; nothing is left then.
    """
    source = opened_source(checkpoint, out, overwrite)
    origins = asked.origins(source.model.num_layers)
    write_grown(source, out, deepened(source.model, asked), _Repeated(source, origins, asked.identity),
                (DEEPENED, {**dataclasses.asdict(asked), "origins": origins}), workers=workers,
                overwrite=overwrite, redo=redo)


class _Repeated:
    """Blocks of layers that come again."""

    def __init__(self, source: Opened, origins: list[int], identity: bool) -> None:
        self._source, self._origins, self._identity = source, origins, identity
        self._shallow = {(link.key, link.offset): link for link in source.links}

    def origin(self, link: Link) -> Link:
        """Return the same block of the layer that a block's layer is made from."""
        found = _LAYER.fullmatch(link.key)
        key = f"decoder.layers.{self._origins[int(found[1])]}.{found[2]}" if found else link.key
        return self._shallow[key, link.offset]

    def block(self, link: Link) -> torch.Tensor:
        """Return a copy, or zeros of what a repeated layer writes to the residual."""
        made = block_of(self._source, self.origin(link))
        is_silent = self._identity and self._is_repeated(link) and link.key.endswith(WRITES)
        return torch.zeros_like(made) if is_silent else made

    def _is_repeated(self, link: Link) -> bool:
        found = _LAYER.fullmatch(link.key)
        return found is not None and self._origins[int(found[1])] in self._origins[:int(found[1])]


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
    pattern = shortest_pattern("".join("L" if kinds[origin] == "sliding_attention" else "G"
                                       for origin in origins))
    deeper = dataclasses.replace(model, num_layers=asked.num_layers, attention_pattern=pattern,
                                 num_dense_layers=sum(dense) if model.num_experts else 0)
    models.get(model.family).check(deeper)
    return deeper
