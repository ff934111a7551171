"""A low-rank adapter of the token embedding, at any layout: row t of E becomes that of E + alpha / rank B A.

B has a row per token id and is cut as the embedding is; all of A is on every process.  What travels between
processes is [tokens, rank].  A's gradient is, as a norm's, that of the process's own tokens under sequence
parallelism, and else the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel

from megatron_sov.config import LoraConfig
from megatron_sov.mcore.model.lora import Factors
from megatron_sov.models.adapters import Adapted


class EmbeddingAdapter(torch.nn.Module):
    """The adapter of a chunk's embedding."""

    def __init__(self, of: Adapted, lora: LoraConfig, config: Any, rows: int) -> None:
        """Make the factors; their values are set by `init`.

        Args:
            of: the embedding.
            lora: rank and scale.
            config: the library's TransformerConfig.
            rows: this process's rows with those that belong to no token.
        """
        super().__init__()
        self.scale = lora.alpha / lora.rank
        self.factors = Factors(of, lora, config, None, rows)

    def forward(self, tokens: torch.Tensor, embedding: Any) -> torch.Tensor:
        """Return what is added to the output of the library's embedding of tokens [1, n] (or more rows)."""
        b, group = self.factors.B, embedding.tp_group
        places = tokens - embedding.vocab_start_index
        elsewhere = (places < 0) | (places >= len(b))
        places = places.masked_fill(elsewhere, 0)
        low = b[places] if embedding.deterministic_mode else torch.nn.functional.embedding(places, b)
        low = low.masked_fill(elsewhere[..., None], 0)
        if embedding.reduce_scatter_embeddings:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                low.transpose(0, 1).contiguous(), group=group)
        elif group.size() > 1:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group)
        return low @ self.factors.A * self.scale


def behind_embedding(adapter: EmbeddingAdapter) -> Callable[..., torch.Tensor]:
    """Return the hook that adds an adapter's output to an embedding's."""
    def hook(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + adapter(inputs[0], module)

    return hook
