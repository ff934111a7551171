"""Encoders for images and audio, at any layout: their features replace placeholder embeddings.

The first pipeline stage replicates the encoders on every process. A process encodes the records that the
local tokens need (context and sequence parallelism). Under sequence parallelism Megatron-Core sums the
gradient over the tensor-parallel group as for norms; otherwise every process computes the full gradient."""

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch.utils.checkpoint import checkpoint

from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.modality import (
    ENCODERS, EncoderInput, EncoderInputs, load_modality, select_placeholders)

Block = tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class MediaEncoders(torch.nn.Module):
    """A model's encoders, owned by the first `Chunk`."""

    def __init__(self, model: ModelConfig, config: Any) -> None:
        """Create the encoders; `initial_weights.initialize_weights` or a checkpoint sets their weights.

        Args:
            model: the architecture.
            config: Megatron-Core's `TransformerConfig`.
        """
        super().__init__()
        create_encoder = load_modality().encoder
        self.vision = create_encoder(model.vision, model.hidden_size) if model.vision is not None else None
        self.audio = create_encoder(model.audio, model.hidden_size) if model.audio is not None else None
        # models that scale embeddings scale encoder features as well
        self._factor = float(model.embedding_multiplier)
        self._recomputed = config.recompute_granularity == "full"
        self._sequence_parallel = config.sequence_parallel
        self.overlapped = False
        """Whether gradient or parameter messages overlap with computation."""
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, embedded: torch.Tensor, row_tokens: int, inputs: EncoderInputs | None,
                *, cut_for_context: bool = True) -> torch.Tensor:
        """Replace placeholder embeddings [local tokens, 1, hidden] by encoder features.

        Args:
            embedded: embeddings of the local tokens.
            row_tokens: tokens of the whole row.
            inputs: records to encode. None: no records.
            cut_for_context: whether context parallelism splits the row.
        """
        local_index = _compute_local_index(row_tokens, self._sequence_parallel,
                                           cut_for_context) if inputs else None
        for kind, name in ENCODERS.items():
            encoder, part = getattr(self, name), (inputs or {}).get(kind)
            local_part = None
            if part is not None and local_index is not None:
                targets = local_index[part.places]
                local_part = select_placeholders(part, targets >= 0, targets[targets >= 0])
            if local_part is not None and len(local_part.places):
                if encoder is None:
                    raise ValueError(f"a row has {kind}, and the model has no model.{name}")
                embedded = self._insert_features(embedded, encoder, local_part)
            elif encoder is not None and self.overlapped and encoder.trains and torch.is_grad_enabled():
                # overlapped reduction sends every parameter's gradient as soon as it exists, and the order
                # must be equal on all processes, with or without records in the row
                no_tokens = torch.zeros(0, dtype=torch.int64, device=embedded.device)
                features = self._encode_records(encoder, None)
                embedded = embedded.index_copy(0, no_tokens, features[no_tokens][:, None])
        return embedded

    def _insert_features(self, embedded: torch.Tensor, encoder: Any,
                         local_part: EncoderInput) -> torch.Tensor:
        arrays = np.stack(local_part.records), local_part.features, local_part.places
        records, feature_index, places = (to_device(torch.from_numpy(values), embedded.device)
                                          for values in arrays)
        features = self._encode_records(encoder, records)[feature_index] * self._factor
        return embedded.index_copy(0, places, features[:, None].to(embedded.dtype))

    def _encode_records(self, encoder: Any, records: torch.Tensor | None) -> torch.Tensor:
        if self._recomputed and torch.is_grad_enabled():
            features: torch.Tensor = checkpoint(encoder, records, use_reentrant=False)
        else:
            features = encoder(records)
        return features.flatten(0, 1)

    def blocks(self) -> list[Block]:
        """Return the fields of `local_shards.LocalShard` for each parameter: name, data, global shape,
        offset, replica. The blocks are whole tensors."""
        replica = (0, int(parallel_state.get_tensor_model_parallel_rank()),
                   int(parallel_state.get_data_parallel_rank(with_context_parallel=True)))
        return [(name, p.detach(), tuple(p.shape), (0,) * p.dim(), replica)
                for name, p in self.named_parameters()]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: `local_shards` reads `blocks`."""
        return {}


def _compute_local_index(row_tokens: int, sequence_parallel: bool, cut_for_context: bool) -> np.ndarray:
    """Return [row tokens] int64: local token index, -1 on other processes."""
    if cut_for_context:
        local_tokens = context.compute_row_index(row_tokens, sequence_parallel, torch.device("cpu")).numpy()
    else:
        local_tokens = np.arange(row_tokens)
        if sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            local_tokens = local_tokens.reshape(size, -1)[parallel_state.get_tensor_model_parallel_rank()]
    local_index = np.full(row_tokens, -1, np.int64)
    local_index[local_tokens] = np.arange(len(local_tokens))
    return local_index
