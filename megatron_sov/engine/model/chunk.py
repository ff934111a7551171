"""A model chunk: Megatron-Core's embedding, transformer block and prediction block, without the logits.

Objectives apply the output head to the hidden states in chunks of tokens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface)
from megatron.core.pipeline_parallel.utils import ScheduleNode
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock, MultiTokenPredictionBlockSubmodules, MultiTokenPredictionLayer,
    get_mtp_layer_spec)
from megatron.core.transformer.transformer_block import (
    TransformerBlock, TransformerBlockSubmodules, get_num_layers_to_build)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor

from megatron_sov.engine.model.adapters import Adapters
from megatron_sov.engine.model.attention import PackedDocuments, SharedPrompts, pack_documents
from megatron_sov.engine.model.cache_rows import SpanRow
from megatron_sov.engine.model.media_encoders import MediaEncoders
from megatron_sov.engine.model.specs import (
    build_layer_specs, build_mtp_layer_spec, get_norm_class, uses_transformer_engine)
from megatron_sov.engine.parallel import context
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.modality import EncoderInputs


class Chunk(LanguageModule):
    """Consecutive layers that map `ModelInputs` to hidden states [depths * local tokens, 1, hidden].

    Depth 0 holds the trunk's output (on the last stage after the final norm), depth k that of MTP layer k;
    only the last stage has MTP layers. Local tokens are the tokens that context and sequence parallelism
    assign to this process."""

    def __init__(self, config: Any, model: ModelConfig, vp_stage: int | None) -> None:
        """Create this pipeline stage's modules from `build_layer_specs`.

        Args:
            config: Megatron-Core's `TransformerConfig`.
            model: the architecture.
            vp_stage: index of the chunk in an interleaved pipeline. None: the stage has one chunk.
        """
        super().__init__(config)
        self.adapters: Adapters | None = None
        """Low-rank adapters on the linear layers, trained instead of the weights."""
        self.encoders: MediaEncoders | None = None
        """Image and audio encoders, only on a multimodal model's first chunk."""
        self.wait_for_head: Callable[[], None] | None = None
        """Waits until the updated head weight's all-gather finishes. None: no gather is pending."""
        self._excludes_weights = False
        """Whether `_start_offloading` has excluded the weights from activation offloading."""
        # Megatron-Core's schedules, gradient reductions and data-parallel wrapper read these attributes
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.mtp_process = self.post_process and model.num_mtp_layers > 0
        self.share_embeddings_and_output_weights = model.tied_embeddings
        tp = config.tensor_model_parallel_size
        vocab_size = -(-model.vocab_size // tp) * tp  # rounded up to equal shards
        if self.pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, model.max_position_tokens, "rope", tp_group=self.pg_collection.tp)
        self.rotary_pos_emb = _build_rotary_embedding(config, model, self.pg_collection.cp)
        self.decoder = TransformerBlock(
            config, _build_block_spec(config, model, vp_stage), pre_process=self.pre_process,
            post_process=self.post_process, pg_collection=self.pg_collection, vp_stage=vp_stage)
        if self.mtp_process:
            self.mtp = MultiTokenPredictionBlock(config, _build_mtp_spec(config, model), vp_stage=vp_stage,
                                                 pg_collection=self.pg_collection)
        if self.post_process:
            self.output_layer = OutputHead(
                config.hidden_size, vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_bias_add=False, gather_output=False, tp_group=self.pg_collection.tp,
                skip_weight_param_allocation=self.pre_process and model.tied_embeddings)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        for module in self.modules():
            if hasattr(module, "finish_init"):  # Transformer Engine modules without a quantization recipe
                module.finish_init(None)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the hidden states received from the previous stage: a tensor, or a list with one tensor."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return Megatron-Core's shards without the head's `_extra_state`, which is empty."""
        declared: dict[str, Any] = super().sharded_state_dict(prefix, *args, **kwargs)
        declared.pop(f"{prefix}output_layer._extra_state", None)
        return declared

    def forward(self, inputs: ModelInputs, first_route: int | None = None) -> torch.Tensor:
        """Run the chunk on a row's local tokens; returns hidden states [depths * local tokens, 1, hidden].

        Args:
            inputs: the whole row.
            first_route: row of its first token in the route table (`route_replay.replay_routes`). None:
                routers choose the experts.
        """
        row = self.prepare_layer_inputs(inputs, first_route)
        hidden = self.decoder(
            hidden_states=row.embedded, attention_mask=None, rotary_pos_emb=row.rotary,
            packed_seq_params=row.packed, padding_mask=row.padding)
        return self.run_mtp_layers(hidden, inputs, row)

    def build_schedule_plan(self, inputs: ModelInputs, first_route: int | None) -> OverlappedPasses:
        """Return the schedule plan for `parallel.expert_overlap` = micro_batches; see `forward`."""
        return OverlappedPasses(self, inputs, first_route)

    def prepare_layer_inputs(self, inputs: ModelInputs, first_route: int | None) -> LayerInputs:
        """Embed the local tokens and compute rotary angles, packing and padding for the first layer."""
        if self.config.fine_grained_activation_offloading and torch.is_grad_enabled():
            self._start_offloading()
        packed = pack_documents(inputs.cu_seqlens, inputs.max_document_tokens, len(inputs.tokens),
                                own=self.config.own_attention, host_bounds=inputs.host_bounds,
                                shared=inputs.shared,
                                bucketed=self.config.attention_backend.name != "unfused")
        self.config.routing_step.shared = inputs.shared  # the routers of all layers read it
        tokens = context.select_local(inputs.tokens)[None]
        positions = context.select_local(inputs.positions)[None]
        embedded = self._embed_tokens(tokens, positions)
        embedded = self._insert_features(embedded, len(inputs.tokens), inputs.encoder_inputs)
        rotary = self._compute_angles(packed)
        # the fused kernel looks up each token's angles in the table
        if not self.config.apply_rope_fusion:
            rotary = rotary[positions[0]]
        return LayerInputs(embedded, positions, rotary, packed,
                           self._local_padding(inputs.padding, first_route))

    def run_mtp_layers(self, hidden: torch.Tensor, inputs: ModelInputs, row: LayerInputs) -> torch.Tensor:
        """Append each `PredictionLayer`'s hidden states to the trunk's, and wait for the head weight."""
        if self.mtp_process:
            # MTP layers have no rows in the route table: generation records trunk routes only
            hidden = self.mtp(input_ids=inputs.tokens, position_ids=row.positions, hidden_states=hidden,
                              attention_mask=None, rotary_pos_emb=row.rotary, packed_seq_params=row.packed,
                              embedding=self.embedding,
                              padding_mask=self._local_padding(inputs.padding, None))
        if self.wait_for_head is not None:
            self.wait_for_head()
        return hidden

    def forward_cached(self, row: SpanRow) -> torch.Tensor:
        """Run the trunk on new tokens for cached sequences (`kv_cache`).

        Returns:
            Hidden states [tokens / sequence-parallel size, 1, hidden]; the row is not split for context
            parallelism.
        """
        embedded = self._embed_tokens(row.tokens[None], row.positions[None])
        embedded = self._insert_features(embedded, len(row.tokens), row.encoder_inputs, cut_for_context=False)
        return self.decoder(
            hidden_states=embedded, attention_mask=None,
            rotary_pos_emb=self._compute_angles(row.packed)[row.positions],
            packed_seq_params=row.packed, padding_mask=row.padding(self.config.sequence_parallel)[None])

    def _embed_tokens(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Embed tokens [1, tokens]. None: this stage reads the previous stage's hidden states."""
        if not self.pre_process:
            return None
        embedded: torch.Tensor = self.embedding(input_ids=tokens, position_ids=positions)
        return embedded

    def _compute_angles(self, packed: Any) -> torch.Tensor:
        """Return rotary angles for the longest document, [positions, 1, 1, channels]."""
        table = self.rotary_pos_emb(max(packed.max_seqlen_q, packed.max_seqlen_kv), packed_seq=True)
        angles: torch.Tensor = table[0] if isinstance(table, tuple) else table  # YaRN also returns a factor
        return angles

    def _start_offloading(self) -> None:
        """Start activation offloading for a forward pass, with weights excluded."""
        config, offload = self.config, FineGrainedActivationOffloadingInterface
        offload.init_chunk_handler(
            pp_rank=self.pg_collection.pp.rank(), vp_size=config.virtual_pipeline_model_parallel_size,
            vp_stage=self.vp_stage, min_offloaded_tensor_size=config.min_offloaded_tensor_size,
            delta_offload_bytes_across_pp_ranks=config.delta_offload_bytes_across_pp_ranks,
            activation_offload_fraction=config.activation_offload_fraction,
            max_inflight_offloads=config.fine_grained_offloading_max_inflight_offloads)
        if not self._excludes_weights:
            self._excludes_weights = True
            for weight in self.parameters():
                offload.mark_not_offload(weight)

    def _insert_features(self, embedded: Any, row_tokens: int, inputs: EncoderInputs | None, *,
                         cut_for_context: bool = True) -> Any:
        """Replace placeholder embeddings by `MediaEncoders` features on the chunk that embeds tokens.
        `cut_for_context`: the row is split for context parallelism."""
        if self.encoders is not None:
            with_features: torch.Tensor = self.encoders(embedded, row_tokens, inputs,
                                                        cut_for_context=cut_for_context)
            return with_features
        if self.pre_process and inputs:
            raise ValueError(f"a row has {' and '.join(inputs)}, but the model has no encoder for it")
        return embedded

    def _local_padding(self, padding: torch.Tensor, first_route: int | None) -> torch.Tensor:
        """Return the padding mask of the local tokens, [1, tokens]; with routes [1 + bits, tokens], where the
        `bits` further rows are the binary digits of each token's index in the route table.

        Every stage splits the mask: Megatron-Core's own model splits it on the first stage only."""
        local_index = context.compute_row_index(len(padding), self.config.sequence_parallel, padding.device)
        if first_route is None:
            return padding[local_index][None]
        table = self.config.routing_step.table
        mask: torch.Tensor = table.encode_mask(padding[local_index], first_route + local_index)
        return mask


@dataclass(frozen=True)
class ModelInputs:
    """Model inputs for a micro-batch: a row of packed documents, not split over processes."""

    tokens: torch.Tensor
    """[tokens] int64."""
    positions: torch.Tensor
    """[tokens] int64 position in the document."""
    cu_seqlens: torch.Tensor
    """[documents + 1] int32: cumulative document lengths, from 0 to the number of tokens."""
    max_document_tokens: int
    """Length of the longest document."""
    padding: torch.Tensor
    """[tokens] bool, True where a token is padding."""
    host_bounds: Sequence[int] | None = None
    """`cu_seqlens` on the host. None: copied from the device on first use, which makes the host wait."""
    routes: np.ndarray | None = None
    """[tokens, layers, top_k] expert indices on the host (`documents.shard_files`). None: routers choose."""
    shared: SharedPrompts | None = None
    """Prompts shared by several documents and stored once in the row. None: no shared prompts."""
    encoder_inputs: EncoderInputs | None = None
    """Images and audio clips whose features replace placeholder embeddings, on the host."""


class LayerInputs(NamedTuple):
    """Inputs for a chunk's first layer on this process."""

    embedded: torch.Tensor | None
    """[local tokens, 1, hidden]. None: layers read the tensor sent by the previous pipeline stage."""
    positions: torch.Tensor
    """[1, local tokens] int64 position in the document."""
    rotary: torch.Tensor
    """Rotary angles [local tokens, 1, 1, channels], or a table by position for the fused kernel."""
    packed: Any
    """`PackedDocuments` or Megatron-Core's `PackedSeqParams`."""
    padding: torch.Tensor
    """[1 or 1 + bits, local tokens] padding mask, see `Chunk._local_padding`."""


class PredictionLayer(MultiTokenPredictionLayer):
    """Multi-token prediction (MTP) layer for packed documents.

    Megatron-Core shifts tokens in a loop over documents and splits each document separately under context
    parallelism. This class shifts and splits whole rows.

    With `ModelConfig.mtp_depths` > 1 the layer runs several times and concatenates the states of all depths
    along the token axis. Recomputation repeats all depths together, so that the gradient of a weight arrives
    once per backward pass, as the data-parallel wrapper expects."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Checkpoints call the inner layer `transformer_layer`, as Megatron-Core's own checkpoints do.
        children = list(self._modules.items())
        self._modules.clear()
        for name, child in children:
            self._modules["transformer_layer" if name == "mtp_model_layer" else name] = child

    @property
    def mtp_model_layer(self) -> Any:
        """The inner transformer layer, under the name that Megatron-Core calls."""
        return self.transformer_layer

    def _get_embeddings(self, input_ids: torch.Tensor, position_ids: torch.Tensor,
                        embedding: Callable[..., torch.Tensor], hidden_states: torch.Tensor,
                        packed_seq_params: PackedDocuments | None = None,
                        padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        """Return (the whole row's tokens [tokens], shifted left once per depth; `position_ids`;
        `padding_mask`; embeddings [MTP depths * local tokens, 1, hidden]; `hidden_states`)."""
        assert packed_seq_params is not None
        next_ids, embedded = input_ids, []
        for _ in range(self.config.mtp_depths):
            next_ids = shift_tokens(next_ids, packed_seq_params.bounds)
            local_ids = context.select_local(next_ids)[None]
            embedded.append(embedding(input_ids=local_ids, position_ids=position_ids))
        states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        joined = embedded[0] if len(embedded) == 1 else torch.cat(embedded)
        return next_ids, position_ids, padding_mask, joined, states

    def _proj_and_transformer_layer(self, hidden_states: torch.Tensor, decoder_input: torch.Tensor,
                                    **kwargs: Any) -> torch.Tensor:
        """Apply the layer once per depth in `decoder_input`; depth k reads the states of depth k - 1."""
        outputs, num_depths = [], len(decoder_input) // len(hidden_states)
        for embedded in decoder_input.chunk(num_depths):
            hidden_states = super()._proj_and_transformer_layer(
                hidden_states=hidden_states, decoder_input=embedded, **kwargs)
            outputs.append(hidden_states)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class OverlappedPasses(TransformerModelChunkSchedulePlan):
    """A micro-batch's schedule plan, cut at expert dispatch and combine (`parallel.expert_overlap`).

    Megatron-Core computes a part of another micro-batch while tokens travel. Its first and last node handle
    neither padding nor our losses, and it accepts no MTP layer for packed rows, so the MTP layers run in the
    last node as one piece."""

    pre_process: Any
    post_process: Any

    def __init__(self, chunk: Chunk, inputs: ModelInputs, first_route: int | None) -> None:
        # without inputs: Megatron-Core's first and last node, which would read them, are replaced below
        super().__init__(chunk, None, None, None)
        state, stream = self.state, self.pre_process.stream

        def run_first_part() -> torch.Tensor:
            row = state.row = chunk.prepare_layer_inputs(inputs, first_route)
            state.rotary_pos_emb, state.packed_seq_params = row.rotary, row.packed
            state.rotary_pos_cos = state.rotary_pos_sin = state.sequence_len_offset = None
            chunk.config.routing_step.padding = row.padding
            states = chunk.decoder.input_tensor if row.embedded is None else row.embedded
            # frozen embeddings: the backward pass needs a tensor that requires a gradient
            return states if states.requires_grad else states.requires_grad_()

        self.pre_process = ScheduleNode(run_first_part, stream, self.event, name="pre_process")
        if self.post_process is None:
            return

        def run_backward(outputs: Any, gradients: Any) -> Any:
            node.default_backward_func(outputs, gradients)
            for module in chunk.mtp.modules() if chunk.mtp_process else ():
                # the plan computes delayed weight gradients of the trunk only
                if hasattr(module, "need_backward_dw") and module.need_backward_dw():
                    module.backward_dw()
            return gradients

        node: Any = ScheduleNode(lambda hidden: chunk.run_mtp_layers(hidden, inputs, state.row), stream,
                                 self.event, run_backward, name="post_process")
        self.post_process = node

    def _build_layer_schedule_plan(self, module: Any, *streams: Any) -> None:
        # only the trunk: the last node runs the MTP block
        if isinstance(module, TransformerBlock):
            super()._build_layer_schedule_plan(module, *streams)


class OutputHead(ColumnParallelLinear):
    """Output head, a `ColumnParallelLinear` that losses use as a bare weight.

    Losses read `weight` and never call `forward`, so `gradient_accumulation_fusion` stays off in its own
    config: with the fusion, Megatron-Core's class requires APEX even if Transformer Engine accumulates."""

    def __init__(self, *args: Any, config: Any, **settings: Any) -> None:
        # dataclasses.replace would rerun the config's checks, which refuse the per-layer lists set after them
        head_config = copy.copy(config)
        head_config.gradient_accumulation_fusion = False
        super().__init__(*args, config=head_config, **settings)


def shift_tokens(tokens: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Shift tokens left inside each document; a document's last token becomes 0.

    Args:
        tokens: [tokens] int64, the whole row.
        bounds: [documents + 1] cumulative document lengths.
    """
    next_tokens = tokens.roll(-1)
    # an empty first document gives index -1, the last token of the row, which ends a document as well
    last_index = (bounds[1:].long() - 1) % len(tokens)
    return next_tokens.index_fill(0, last_index, 0)


@contextlib.contextmanager
def offloaded_activations(config: Any) -> Iterator[None]:
    """Let Megatron-Core offload activations (`gpu.offload_modules`) in training passes alone.

    Megatron-Core records the order of offloaded groups in the first pass and follows it in every later pass,
    with or without gradients: a first evaluation pass would set the order, and a later one would advance the
    position in it."""
    if not config.fine_grained_activation_offloading:
        yield
        return
    FineGrainedActivationOffloadingInterface.enable_offload()
    try:
        yield
    finally:
        FineGrainedActivationOffloadingInterface.disable_offload()


def _build_rotary_embedding(config: Any, model: ModelConfig, cp_group: Any) -> Any:
    """Build the `RotaryEmbedding`; models with YaRN or latent attention use `YarnRotaryEmbedding`."""
    settings = {"kv_channels": config.kv_channels, "rotary_percent": model.rope_share,
                "rotary_interleaved": config.rotary_interleaved, "rotary_base": model.rope_theta,
                "use_cpu_initialization": config.use_cpu_initialization}
    if not model.yarn and not model.latent_attention:
        return RotaryEmbedding(**settings, cp_group=cp_group)
    return YarnRotaryEmbedding(
        **settings, scaling_factor=config.yarn_rotary_scaling_factor,
        original_max_position_embeddings=config.yarn_original_max_position_embeddings,
        beta_fast=config.yarn_beta_fast, beta_slow=config.yarn_beta_slow, mscale=config.yarn_mscale,
        mscale_all_dim=config.yarn_mscale_all_dim,
        correction_range_round_to_int=config.yarn_correction_range_round_to_int)


def _build_block_spec(config: Any, model: ModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layer specs for this chunk's trunk layers."""
    first = get_transformer_layer_offset(config, vp_stage)
    local = build_layer_specs(config, model)[first:first + get_num_layers_to_build(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=local, layer_norm=get_norm_class(config))


def _build_mtp_spec(config: Any, model: ModelConfig) -> MultiTokenPredictionBlockSubmodules:
    layer = get_mtp_layer_spec(build_mtp_layer_spec(config, model),
                               use_transformer_engine=uses_transformer_engine(config.params_dtype))
    layer.module = PredictionLayer
    norm = get_norm_class(config)
    layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = norm
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * model.num_mtp_layers)
