"""The multi-token prediction layer of rows of packed documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor

from megatron_sov.mcore.model.attention import PackedDocuments
from megatron_sov.mcore.model.kv_cache import PackedSpans
from megatron_sov.mcore.parallel import context


class PredictionLayer(MultiTokenPredictionLayer):
    """Multi-token prediction layer for rows of packed documents, wherever they are cut,
    that can be recomputed.

    The library moves tokens ahead in a loop over documents, and under context parallelism cuts each
    document for itself, and tells experts nothing of padding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transformer_layer.register_forward_pre_hook(_with_padding, with_kwargs=True)

    def _get_embeddings(self, input_ids: torch.Tensor, position_ids: torch.Tensor,
                        embedding: Callable[..., torch.Tensor], hidden_states: torch.Tensor,
                        packed_seq_params: PackedDocuments | None = None) -> tuple[torch.Tensor, ...]:
        """Return the whole row's tokens [tokens] moved one place further, and the local ones' embedding."""
        assert packed_seq_params is not None
        ahead = next_tokens(input_ids, packed_seq_params.bounds)
        embedded = embedding(input_ids=context.local(ahead)[None], position_ids=position_ids)
        return (ahead, position_ids, embedded,
                make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True))

    def transform(self, hidden: torch.Tensor, embedded: torch.Tensor, rotary: torch.Tensor,
                  packed: PackedSpans) -> torch.Tensor:
        """Run the layer on given states and embeddings of the tokens ahead, both [tokens /
        sequence-parallel size, 1, hidden]."""
        states: torch.Tensor = self._proj_and_transformer_layer(
            hidden_states=hidden, decoder_input=embedded, rotary_pos_emb=rotary, packed_seq_params=packed)
        return states

    def _checkpointed_forward(self, forward_func: Callable[..., torch.Tensor], *, hidden_states: torch.Tensor,
                              decoder_input: torch.Tensor, rotary_pos_emb: torch.Tensor,
                              **constants: Any) -> torch.Tensor:
        # defect of 0.16.1: it hands all its arguments to the autograd function, which takes tensors only
        def forward(states: torch.Tensor, embedded: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
            return forward_func(hidden_states=states, decoder_input=embedded, rotary_pos_emb=rotary,
                                **constants)

        outputs: torch.Tensor = super()._checkpointed_forward(forward, hidden_states, decoder_input,
                                                              rotary_pos_emb)
        return outputs


def _with_padding(layer: Any, args: tuple[Any, ...],
                  kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand a layer the padding of its row, which comes with the row's documents, also when it is computed
    again."""
    padding = getattr(kwargs["packed_seq_params"], "padding", None)
    return args, {**kwargs, "padding_mask": padding}


def next_tokens(tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Return [tokens] int64: at each place the token that follows in its document,
    and 0 at the document's last place.

    Args:
        tokens: [tokens] int64, a whole row.
        bounds: [documents + 1], cumulative lengths of its documents.
    """
    ahead = tokens.roll(-1)
    # behind an empty document at the row's beginning: the row's last place, which is a document's too
    lasts = (bounds[1:].long() - 1) % len(tokens)
    return ahead.index_fill(0, lasts, 0)
