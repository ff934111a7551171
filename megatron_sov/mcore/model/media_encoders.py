"""Encoders of pictures and sounds in a model, at any layout: their features take the place of placeholders'
embeddings.

The first pipeline stage holds them, whole on every process.  Each process computes the features of the
records that its own part of a row needs: its pieces under context parallelism, its stretch of them under
sequence parallelism.  A gradient is then a sum over these processes, which the library makes as it does for
norms; without sequence parallelism all processes of a tensor-parallel group compute the same one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch.utils.checkpoint import checkpoint

from megatron_sov.codecs.encoders.networks import MediaEncoder
from megatron_sov.config import ModelConfig
from megatron_sov.mcore.parallel import context
from megatron_sov.mcore.parallel.device import to_device
from megatron_sov.media.banks import PICTURES, SOUNDS
from megatron_sov.media.placed import Media, Placed, chosen

Block = tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
OF_BANK = {PICTURES: "vision", SOUNDS: "audio"}
"""Kind of bank -> the encoder of its records."""


class MediaEncoders(torch.nn.Module):
    """The encoders of a model, which its first chunk owns."""

    def __init__(self, model: ModelConfig, config: Any) -> None:
        """Make them; their values are set by `init` or loaded.

        Args:
            model: the architecture.
            config: the library's TransformerConfig.
        """
        super().__init__()
        self.vision = MediaEncoder(model.vision, model.hidden_size) if model.vision is not None else None
        self.audio = MediaEncoder(model.audio, model.hidden_size) if model.audio is not None else None
        self._recomputed = config.recompute_granularity == "full"
        self._sequence_parallel = config.sequence_parallel
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, embedded: torch.Tensor, row_tokens: int, media: Media | None,
                *, cut_for_context: bool = True) -> torch.Tensor:
        """Return embeddings [local tokens, 1, hidden] with features over those of placeholders.

        Args:
            embedded: those of this process's part of a row.
            row_tokens: tokens of the whole row.
            media: what stands at which place of the row; None: nothing.
            cut_for_context: whether the row is cut over the context-parallel group.
        """
        mine = _index(row_tokens, self._sequence_parallel, cut_for_context)
        used = set()
        for kind, part in (media or {}).items():
            encoder = getattr(self, OF_BANK[kind])
            if encoder is None:
                raise ValueError(f"a row has {kind}, and the model has no model.{OF_BANK[kind]}")
            here = local(part, mine)
            if len(here.places):
                used.add(OF_BANK[kind])
                embedded = self._over(embedded, encoder, here)
        for name in {"vision", "audio"} - used:
            if getattr(self, name) is not None:
                _announce(getattr(self, name))
        trained = [p for p in self.parameters() if p.requires_grad]
        if trained and torch.is_grad_enabled():
            embedded = _Connected.apply(embedded, *trained)
        return embedded

    def _over(self, embedded: torch.Tensor, encoder: MediaEncoder, here: Placed) -> torch.Tensor:
        device = embedded.device
        records, features_of, places = (to_device(torch.from_numpy(values), device)
                                        for values in (here.records, here.features, here.places))
        if self._recomputed and torch.is_grad_enabled():
            features = checkpoint(encoder, records, use_reentrant=False)
        else:
            features = encoder(records)
        over = features.flatten(0, 1)[features_of]
        return embedded.index_copy(0, places, over[:, None].to(embedded.dtype))

    def blocks(self) -> list[Block]:
        """Return the blocks of this process, which are whole tensors: name, memory, global shape, place in
        it, and place among the processes that hold the same (as `local_shards.LocalShard`)."""
        replica = (0, int(parallel_state.get_tensor_model_parallel_rank()),
                   int(parallel_state.get_data_parallel_rank(with_context_parallel=True)))
        return [(name, p.detach(), tuple(p.shape), (0,) * p.dim(), replica)
                for name, p in self.named_parameters()]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: `local_shards` asks for `blocks`."""
        return {}


def _index(row_tokens: int, sequence_parallel: bool, cut_for_context: bool) -> np.ndarray:
    """Return the row index of each local token."""
    if cut_for_context:
        return context.row_index(row_tokens, sequence_parallel, torch.device("cpu")).numpy()
    index = np.arange(row_tokens)
    if sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        index = index.reshape(size, -1)[parallel_state.get_tensor_model_parallel_rank()]
    return index


def local(part: Placed, mine: np.ndarray) -> Placed:
    """Return what of a row's media stands at local tokens, placed among them.

    Args:
        part: the media, by row index.
        mine: [local tokens] row index of each.
    """
    order = np.argsort(mine)
    found = np.searchsorted(mine, part.places, sorter=order).clip(max=len(mine) - 1)
    at = order[found]
    here = mine[at] == part.places
    return chosen(part, here, at[here])


def _announce(part: torch.nn.Module) -> None:
    """Do before a part that is not used what is done before one that is: the library brings updated weights
    to a module before it runs, and refuses to bring them again where it never did."""
    for module in part.modules():
        for hook in module._forward_pre_hooks.values():
            hook(module, ())


class _Connected(torch.autograd.Function):
    """Passes embeddings on, and gives parameters that no record has reached a gradient of zero: the library
    waits for every trained parameter's gradient in each step."""

    @staticmethod
    def forward(ctx: Any, embedded: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.like = parameters
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads[0], *(torch.zeros_like(p) for p in ctx.like)
