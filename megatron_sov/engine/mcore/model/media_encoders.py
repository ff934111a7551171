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

from megatron_sov.engine.mcore.parallel import context
from megatron_sov.engine.mcore.parallel.device import to_device
from megatron_sov.model.config import ModelConfig
from megatron_sov.omni.codecs.encoders import MediaEncoder
from megatron_sov.omni.media.banks import PICTURES, SOUNDS
from megatron_sov.omni.media.placed import Media, PlacedMedia, chosen

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
        # families that scale embeddings scale what stands over them as well
        self._factor = float(model.embedding_multiplier)
        self._recomputed = config.recompute_granularity == "full"
        self._sequence_parallel = config.sequence_parallel
        self.overlapped = False
        """Whether gradients or weights are sent while there is computation."""
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
        places = _places(row_tokens, self._sequence_parallel, cut_for_context) if media else None
        for kind, name in OF_BANK.items():
            encoder, part = getattr(self, name), (media or {}).get(kind)
            here = None
            if part is not None and places is not None:
                at = places[part.places]
                here = chosen(part, at >= 0, at[at >= 0])
            if here is not None and len(here.places):
                if encoder is None:
                    raise ValueError(f"a row has {kind}, and the model has no model.{name}")
                embedded = self._over(embedded, encoder, here)
            elif encoder is not None and self.overlapped and encoder.trains and torch.is_grad_enabled():
                # the library waits for every parameter's gradient, and sends them as they come: which must be
                # the same order on all processes, whatever their rows hold
                nothing = torch.zeros(0, dtype=torch.int64, device=embedded.device)
                embedded = embedded.index_copy(0, nothing, self._features(encoder, None)[nothing][:, None])
        return embedded

    def _over(self, embedded: torch.Tensor, encoder: MediaEncoder, here: PlacedMedia) -> torch.Tensor:
        """Return embeddings with features over some of them."""
        records, numbers, places = (to_device(torch.from_numpy(values), embedded.device)
                                    for values in (np.stack(here.records), here.features, here.places))
        over = self._features(encoder, records)[numbers] * self._factor
        return embedded.index_copy(0, places, over[:, None].to(embedded.dtype))

    def _features(self, encoder: MediaEncoder, records: torch.Tensor | None) -> torch.Tensor:
        """Return [records * slots, hidden]."""
        if self._recomputed and torch.is_grad_enabled():
            features: torch.Tensor = checkpoint(encoder, records, use_reentrant=False)
        else:
            features = encoder(records)
        return features.flatten(0, 1)

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


def _places(row_tokens: int, sequence_parallel: bool, cut_for_context: bool) -> np.ndarray:
    """Return [row tokens] int64: which local token each token of a row is, -1 for another process's."""
    if cut_for_context:
        mine = context.row_index(row_tokens, sequence_parallel, torch.device("cpu")).numpy()
    else:
        mine = np.arange(row_tokens)
        if sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            mine = mine.reshape(size, -1)[parallel_state.get_tensor_model_parallel_rank()]
    places = np.full(row_tokens, -1, np.int64)
    places[mine] = np.arange(len(mine))
    return places
