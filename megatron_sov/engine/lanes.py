"""What differs between the two versions of megatron-core that this project runs on, each difference once.

Python 3.11 has 0.16.1, the last one for it, and newer Pythons have 0.19.2.  Nothing else asks which it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import package_info
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

VERSION: str = package_info.__shortversion__
IS_NEW: bool = package_info.VERSION[:2] >= (0, 19)
PAIRED = "mla_rotary_interleaved" if IS_NEW else "multi_latent_attention"
"""Keyword of the unfused rotations: channels that rotate together lie side by side."""
GRAPHS_OF = "cuda_graph_modules" if IS_NEW else "cuda_graph_scope"
"""Field of the library's configuration: which parts of a layer CUDA graphs hold."""
EXCHANGE_SMS = (dict.fromkeys(("deepep", "hybridep"), "moe_flex_dispatcher_num_sms") if IS_NEW else
                {"deepep": "moe_deepep_num_sms", "hybridep": "moe_hybridep_num_sms"})
"""Dispatcher -> field of the library's configuration: how many multiprocessors its kernels take."""

# Each model says so by a warning, and nobody who trains can move it: `HybridModel` takes its place upstream.
logging.getLogger(gpt_model.__name__).addFilter(lambda record: "IS DEPRECATED" not in record.getMessage())


def parts(spec: Any) -> Any:
    """Return what a module is made of: 0.19 describes feed-forward blocks and experts by partial calls."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """Return an optimizer's gradients that count in the norm on this process."""
    found: list[torch.Tensor] = (optimizer.get_grads_for_grad_norm() if IS_NEW
                                 else optimizer.get_main_grads_for_grad_norm())
    return found


def finish_forced_sync(wrapped: Any) -> None:
    """Have products read weights in 8 bits that were gathered at once, of a chunk whose gathers are otherwise
    waited for in its forward pass.

    Defect of 0.16: the pass finds nothing left to wait for then, and makes nothing of what was gathered.
    """
    settings = wrapped.ddp_config
    if IS_NEW or not (settings.overlap_param_gather and settings.fp8_param_gather):
        return
    for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
        if not settings.reuse_grad_buf_for_mxfp8_param_ag:
            post_all_gather_processing([p for p in group.params if is_float8tensor(p)])
            continue
        for bucket in group.buckets:
            for parameter, (start, stop) in bucket.param_to_index.items():
                parameter.data.copy_(bucket.param_data.view(-1)[start:stop].view(parameter.data.shape))
            bucket.param_data.zero_()


def mend_places(wrapped: Any) -> None:
    """Have each bucket know where its weights begin, for copies out of what was gathered.

    Defect of 0.16: it adds up sizes, and forgets that each weight begins at a multiple of 64 elements.
    """
    for buffer in wrapped.buffers + wrapped.expert_parallel_buffers:
        for bucket in buffer.buckets:
            for parameter in bucket.param_to_index:
                start, stop, _ = buffer.param_index_map[parameter]
                bucket.param_to_index[parameter] = (start - bucket.offset, stop - bucket.offset)


def numbered_behind_trunk(spec: Any) -> Any:
    """Have a prediction layer numbered behind the trunk's layers, and return its spec.

    0.19 counts prediction layers from 1, and looks windows and rotations up by that number, in lists whose
    entry of the prediction layer is behind the trunk's: with the first layer's attention it would learn
    something else, and nothing would say so.
    """
    if not IS_NEW:
        return spec

    class NumberedBehind(spec.module):
        def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
            super().__init__(config, *args, layer_number=config.num_layers + layer_number, **kwargs)

    spec.module = NumberedBehind
    return spec


class LibraryPredictionLayer(MultiTokenPredictionLayer):
    """The library's multi-token prediction layer, with the names of 0.16 for its parts and its recomputation
    mended there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if IS_NEW:  # one name for weights in checkpoints; their order stays
            children = list(self._modules.items())
            self._modules.clear()
            self._modules.update(
                {"transformer_layer" if n == "mtp_model_layer" else n: child for n, child in children})

    if IS_NEW:
        @property
        def mtp_model_layer(self) -> Any:
            """The layer inside, as 0.19 calls it."""
            return self.transformer_layer
    else:
        def _checkpointed_forward(self, forward_func: Callable[..., torch.Tensor], *,
                                  hidden_states: torch.Tensor, decoder_input: torch.Tensor,
                                  rotary_pos_emb: torch.Tensor, **constants: Any) -> torch.Tensor:
            # defect of 0.16.1: it hands all its arguments to the autograd function, which takes tensors only
            def forward(states: torch.Tensor, embedded: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
                return forward_func(hidden_states=states, decoder_input=embedded, rotary_pos_emb=rotary,
                                    **constants)

            outputs: torch.Tensor = super()._checkpointed_forward(forward, hidden_states, decoder_input,
                                                                  rotary_pos_emb)
            return outputs

    def embeddings(self, tokens: torch.Tensor, positions: torch.Tensor, padding: torch.Tensor | None,
                   embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return these in the order of the library's `_get_embeddings`; 0.16 knows no padding there."""
        return (tokens, positions, *([padding] if IS_NEW else []), embedded, hidden)
