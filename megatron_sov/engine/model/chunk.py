"""A run of layers of the model, made of the library's embedding, transformer block and prediction block: it
ends in hidden states, so that objectives apply the head in chunks."""

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

from megatron_sov.engine.model.added_parts import Adapters, MediaEncoders
from megatron_sov.engine.model.attention import PackedDocuments, SharedPrompts, pack
from megatron_sov.engine.model.cache_rows import PackedSpans, ReadRow
from megatron_sov.engine.model.specs import block_norm, layer_specs, mtp_layer_spec, uses_transformer_engine
from megatron_sov.engine.parallel import context
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.modality import EncoderInputs


class OutputHead(ColumnParallelLinear):
    """The output head, whose weight gradient comes from the losses: they take the weight and never call the
    module, so its own configuration has no fused accumulation of weight gradients, for which the library's
    class demands APEX even where Transformer Engine accumulates."""

    def __init__(self, *args: Any, config: Any, **settings: Any) -> None:
        # not dataclasses.replace: the library's checks refuse the per-layer lists that are set after them
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False
        super().__init__(*args, config=own, **settings)


class PredictionLayer(MultiTokenPredictionLayer):
    """Multi-token prediction layer for rows of packed documents, wherever they are cut.

    The library moves tokens ahead in a loop over documents, and under context parallelism cuts each
    document for itself, and tells experts nothing of padding.

    Applied several times (`ModelConfig.mtp_depths`), it gives the states of all depths one behind the other.
    Recomputation then repeats all of them at once: gradients of a weight arrive once in a pass, as the
    wrapper for data parallelism expects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # checkpoints name the layer inside `transformer_layer`, as the library's own checkpoints do
        children = list(self._modules.items())
        self._modules.clear()
        for name, child in children:
            self._modules["transformer_layer" if name == "mtp_model_layer" else name] = child

    @property
    def mtp_model_layer(self) -> Any:
        """The layer inside, under the name by which the library calls it."""
        return self.transformer_layer

    def _get_embeddings(self, input_ids: torch.Tensor, position_ids: torch.Tensor,
                        embedding: Callable[..., torch.Tensor], hidden_states: torch.Tensor,
                        packed_seq_params: PackedDocuments | None = None,
                        padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        """Return the whole row's tokens [tokens] moved a place further for each depth, and the local ones'
        embeddings, one depth behind the other."""
        assert packed_seq_params is not None
        ahead, embedded = input_ids, []
        for _ in range(self.config.mtp_depths):
            ahead = next_tokens(ahead, packed_seq_params.bounds)
            embedded.append(embedding(input_ids=context.local(ahead)[None], position_ids=position_ids))
        states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        together = embedded[0] if len(embedded) == 1 else torch.cat(embedded)
        return ahead, position_ids, padding_mask, together, states

    def _proj_and_transformer_layer(self, hidden_states: torch.Tensor, decoder_input: torch.Tensor,
                                    **kwargs: Any) -> torch.Tensor:
        """Apply the layer to as many depths as there are embeddings of, each to the states of the one
        before."""
        found = []
        for embedded in decoder_input.chunk(len(decoder_input) // len(hidden_states)):
            hidden_states = super()._proj_and_transformer_layer(
                hidden_states=hidden_states, decoder_input=embedded, **kwargs)
            found.append(hidden_states)
        return found[0] if len(found) == 1 else torch.cat(found)

    def transform(self, hidden: torch.Tensor, embedded: torch.Tensor, rotary: torch.Tensor,
                  packed: PackedSpans) -> torch.Tensor:
        """Run the layer on given states and embeddings of the tokens ahead, both [tokens /
        sequence-parallel size, 1, hidden]."""
        states: torch.Tensor = self._proj_and_transformer_layer(
            hidden_states=hidden, decoder_input=embedded, rotary_pos_emb=rotary, packed_seq_params=packed)
        return states


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


@dataclass(frozen=True)
class ModelInputs:
    """What the model reads of a micro-batch: one row of packed documents, whole on every process."""

    tokens: torch.Tensor
    """[tokens] int64."""
    positions: torch.Tensor
    """[tokens] int64, counted from the start of each document."""
    cu_seqlens: torch.Tensor
    """[documents + 1] int32: cumulative document lengths, from 0 to the number of tokens."""
    max_document_tokens: int
    """Length of the longest document."""
    padding: torch.Tensor
    """[tokens] bool, True where a token is padding."""
    host_bounds: Sequence[int] | None = None
    """`cu_seqlens` on the host; None: they are fetched where they are needed, and the host waits."""
    routes: np.ndarray | None = None
    """[tokens, layers, top_k] on the host: experts that tokens visit (`documents.shard_files`); None: routers
    choose."""
    shared: SharedPrompts | None = None
    """What documents share, of which the row holds each token once; None: nothing."""
    encoder_inputs: EncoderInputs | None = None
    """Pictures and sounds whose features stand over placeholders, on the host; None: there are none."""


@contextlib.contextmanager
def offloaded_activations(config: Any) -> Iterator[None]:
    """Let the library offload activations (`gpu.offload_modules`) in training passes alone.

    The library fixes its plan of groups in the first pass and walks through that plan in every later pass,
    with or without gradients: an evaluation would become the plan, or leave it at another place.
    """
    if not config.fine_grained_activation_offloading:
        yield
        return
    FineGrainedActivationOffloadingInterface.enable_offload()
    try:
        yield
    finally:
        FineGrainedActivationOffloadingInterface.disable_offload()


class BegunRow(NamedTuple):
    """A row in front of a chunk's first layer, as far as this process has it."""

    embedded: torch.Tensor | None
    """[tokens, 1, hidden] embeddings; None: layers take what the stage before has sent."""
    positions: torch.Tensor
    """[1, tokens] places in documents."""
    rotary: torch.Tensor
    """Angles."""
    packed: Any
    """Its documents, as attention takes them."""
    padding: torch.Tensor
    """[1 or more, tokens] mask, see `Chunk._local_padding`."""


class Chunk(LanguageModule):
    """A run of layers that takes `ModelInputs` and ends in hidden states [depths * local tokens, 1, hidden].

    Depth 0 is the trunk's output after its final norm; depth k that of the k-th multi-token prediction layer.
    Local tokens are those of this process, where context and sequence parallelism cut the row.
    """

    def __init__(self, config: Any, model: ModelConfig, vp_stage: int | None) -> None:
        """Make the modules of this process's stage.

        Args:
            config: the library's TransformerConfig.
            model: the architecture.
            vp_stage: number of the chunk under an interleaved pipeline; None: it is the stage's only one.
        """
        super().__init__(config)
        self.adapters: Adapters | None = None
        """Low-rank adapters of its linear layers, which are trained in the place of the weights."""
        self.encoders: MediaEncoders | None = None
        """Encoders of pictures and sounds, on the first run of a model that has some."""
        self.before_head: Callable[[], None] | None = None
        """Waits for the head's weight while its update is being gathered; None: there is nothing to wait
        for."""
        self._weights_stay = False
        """Whether weights are marked as none of the activations that are offloaded."""
        # the library's schedules, sums of gradients and data-parallel wrapper read these by their names
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.mtp_process = self.post_process and model.num_mtp_layers > 0
        self.share_embeddings_and_output_weights = model.tied_embeddings
        tp = config.tensor_model_parallel_size
        vocab_size = -(-model.vocab_size // tp) * tp
        if self.pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                config, vocab_size, model.max_position_tokens, "rope", tp_group=self.pg_collection.tp)
        self.rotary_pos_emb = _rotary_embedding(config, model, self.pg_collection.cp)
        self.decoder = TransformerBlock(
            config, _block_spec(config, model, vp_stage), pre_process=self.pre_process,
            post_process=self.post_process, pg_collection=self.pg_collection, vp_stage=vp_stage)
        if self.mtp_process:
            self.mtp = MultiTokenPredictionBlock(config, _prediction_spec(config, model), vp_stage=vp_stage,
                                                 pg_collection=self.pg_collection)
        if self.post_process:
            self.output_layer = OutputHead(
                config.hidden_size, vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_bias_add=False, gather_output=False, tp_group=self.pg_collection.tp,
                skip_weight_param_allocation=self.pre_process and model.tied_embeddings)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        for module in self.modules():
            if hasattr(module, "finish_init"):  # Transformer Engine's, without a recipe of their own
                module.finish_init(None)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states that the stage before has sent: a tensor, or a list with one."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the library's declaration of the weights, without the head's extra state, which is empty."""
        declared: dict[str, Any] = super().sharded_state_dict(prefix, *args, **kwargs)
        declared.pop(f"{prefix}output_layer._extra_state", None)
        return declared

    def forward(self, inputs: ModelInputs, first_route: int | None = None) -> torch.Tensor:
        """Run the model on this process's part of the row.

        Args:
            inputs: the row.
            first_route: place of its first token in the table of routes (`router.replay_routes`); None:
                routers choose.
        """
        row = self.begin(inputs, first_route)
        hidden = self.decoder(
            hidden_states=row.embedded, attention_mask=None, rotary_pos_emb=row.rotary,
            packed_seq_params=row.packed, padding_mask=row.padding)
        return self.end(hidden, inputs, row)

    def build_schedule_plan(self, inputs: ModelInputs, first_route: int | None) -> OverlappedPasses:
        """Return the passes of a micro-batch cut into the parts that the library's schedule interleaves
        (`parallel.expert_overlap` = micro_batches); arguments as of `forward`."""
        return OverlappedPasses(self, inputs, first_route)

    def begin(self, inputs: ModelInputs, first_route: int | None) -> BegunRow:
        """Return what layers take of a row, see `forward`."""
        if self.config.fine_grained_activation_offloading and torch.is_grad_enabled():
            self._begin_offloading()
        own, bucketed = self.config.own_attention, self.config.attention_backend.name != "unfused"
        packed = pack(inputs.cu_seqlens, inputs.max_document_tokens, len(inputs.tokens), own=own,
                      host_bounds=inputs.host_bounds, shared=inputs.shared, bucketed=bucketed)
        self.config.routing_step.shared = inputs.shared
        tokens, positions = context.local(inputs.tokens)[None], context.local(inputs.positions)[None]
        embedded = self._with_features(self._embed(tokens, positions), len(inputs.tokens),
                                       inputs.encoder_inputs)
        rotary = self._angles(packed)
        # the fused kernel finds each token's angles itself
        if not self.config.apply_rope_fusion:
            rotary = rotary[positions[0]]
        return BegunRow(embedded, positions, rotary, packed, self._local_padding(inputs.padding, first_route))

    def end(self, hidden: torch.Tensor, inputs: ModelInputs, row: BegunRow) -> torch.Tensor:
        """Return the trunk's hidden states and behind them those of prediction layers, where they are."""
        if self.mtp_process:
            # no place in a table of routes: what generates records the trunk's alone
            row.packed.padding = self._local_padding(inputs.padding, None)
            hidden = self.mtp(input_ids=inputs.tokens, position_ids=row.positions, hidden_states=hidden,
                              attention_mask=None, rotary_pos_emb=row.rotary, packed_seq_params=row.packed,
                              embedding=self.embedding)
        if self.before_head is not None:
            self.before_head()
        return hidden

    def read(self, row: ReadRow) -> torch.Tensor:
        """Run the trunk's layers on new tokens of sequences whose keys and values attention
        keeps (`kv_cache`).

        Returns:
            Hidden states [tokens / sequence-parallel size, 1, hidden] of a row that is not cut for
            context parallelism.
        """
        embedded = self._with_features(self._embed(row.tokens[None], row.positions[None]), len(row.tokens),
                                       row.encoder_inputs, cut_for_context=False)
        return self.decoder(
            hidden_states=embedded, attention_mask=None,
            rotary_pos_emb=self._angles(row.packed)[row.positions],
            packed_seq_params=row.packed, padding_mask=row.padding(self.config.sequence_parallel)[None])

    def predict(self, row: ReadRow, hidden: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """Run the multi-token prediction layer on new tokens of sequences whose keys and values it keeps.

        Args:
            row: the tokens' places.
            hidden: states of the depth before, as `read` returns them.
            ahead: [tokens] int64, the token that follows each.

        Returns:
            Hidden states, as `read` does, behind which the head predicts one token further.
        """
        embedded = self.embedding(input_ids=ahead[None], position_ids=row.positions[None])
        return self.mtp.layers[0].transform(hidden, embedded, self._angles(row.packed)[row.positions],
                                            row.packed)

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Return embeddings of tokens [1, tokens]; None: layers take what the stage before has sent."""
        if not self.pre_process:
            return None
        embedded: torch.Tensor = self.embedding(input_ids=tokens, position_ids=positions)
        return embedded

    def _angles(self, packed: Any) -> torch.Tensor:
        """Return the angles of every place of the longest document, [places, 1, 1, channels]."""
        found = self.rotary_pos_emb(max(packed.max_seqlen_q, packed.max_seqlen_kv), packed_seq=True)
        angles: torch.Tensor = found[0] if isinstance(found, tuple) else found  # YaRN's come with a factor
        return angles

    def _begin_offloading(self) -> None:
        """Have the library offload activations of the pass that begins, and no weights."""
        config, offload = self.config, FineGrainedActivationOffloadingInterface
        offload.init_chunk_handler(
            pp_rank=self.pg_collection.pp.rank(), vp_size=config.virtual_pipeline_model_parallel_size,
            vp_stage=self.vp_stage, min_offloaded_tensor_size=config.min_offloaded_tensor_size,
            delta_offload_bytes_across_pp_ranks=config.delta_offload_bytes_across_pp_ranks,
            activation_offload_fraction=config.activation_offload_fraction,
            max_inflight_offloads=config.fine_grained_offloading_max_inflight_offloads)
        if not self._weights_stay:
            self._weights_stay = True
            for weight in self.parameters():
                offload.mark_not_offload(weight)

    def _with_features(self, embedded: Any, row_tokens: int, inputs: EncoderInputs | None, *,
                       cut_for_context: bool = True) -> Any:
        """Return embeddings with features over those of placeholders, on the run that embeds tokens."""
        if self.encoders is not None:
            with_features: torch.Tensor = self.encoders(embedded, row_tokens, inputs,
                                                        cut_for_context=cut_for_context)
            return with_features
        if self.pre_process and inputs:
            raise ValueError(f"a row has {' and '.join(inputs)}, and the model has no encoder of such")
        return embedded

    def _local_padding(self, padding: torch.Tensor, first_route: int | None) -> torch.Tensor:
        """Return this process's part of the padding mask, [1, tokens], or [1 + bits, tokens] with the places
        of routes.

        Every stage splits it: the library's own model splits it on the first stage only.
        """
        mine = context.row_index(len(padding), self.config.sequence_parallel, padding.device)
        if first_route is None:
            return padding[mine][None]
        mask: torch.Tensor = self.config.routing_step.table.mask(padding[mine], first_route + mine)
        return mask


class OverlappedPasses(TransformerModelChunkSchedulePlan):
    """A micro-batch's passes through a chunk, cut where tokens travel to experts and back, so that the
    library computes a part of another micro-batch meanwhile (`parallel.expert_overlap`).

    Its own first and last part know neither padding nor our losses, and it takes no prediction layer of
    packed rows: such layers, one of many, run behind the trunk in one piece.
    """

    pre_process: Any
    post_process: Any

    def __init__(self, chunk: Chunk, inputs: ModelInputs, first_route: int | None) -> None:
        super().__init__(chunk, None, None, None)
        state, stream = self.state, self.pre_process.stream

        def begin() -> torch.Tensor:
            row = state.row = chunk.begin(inputs, first_route)
            state.rotary_pos_emb, state.packed_seq_params = row.rotary, row.packed
            state.rotary_pos_cos = state.rotary_pos_sin = state.sequence_len_offset = None
            chunk.config.routing_step.padding = row.padding
            states = chunk.decoder.input_tensor if row.embedded is None else row.embedded
            # of frozen embeddings: a pass back must have something to end at
            return states if states.requires_grad else states.requires_grad_()

        self.pre_process = ScheduleNode(begin, stream, self.event, name="pre_process")
        if self.post_process is None:
            return

        def back(outputs: Any, gradients: Any) -> Any:
            node.default_backward_func(outputs, gradients)
            for module in chunk.mtp.modules() if chunk.mtp_process else ():
                # weight gradients of the trunk that are left for later are the plan's, these are nobody's
                if hasattr(module, "need_backward_dw") and module.need_backward_dw():
                    module.backward_dw()
            return gradients

        node: Any = ScheduleNode(lambda hidden: chunk.end(hidden, inputs, state.row), stream, self.event,
                                 back, name="post_process")
        self.post_process = node

    def _build_layer_schedule_plan(self, module: Any, *streams: Any) -> None:
        if isinstance(module, TransformerBlock):
            super()._build_layer_schedule_plan(module, *streams)


def _rotary_embedding(config: Any, model: ModelConfig, cp_group: Any) -> Any:
    """Return the library's module that makes angles, with YaRN's scaling where the model has it; latent
    attention takes its angles from YaRN's module always."""
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


def _block_spec(config: Any, model: ModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the spec of a chunk's trunk layers."""
    first = get_transformer_layer_offset(config, vp_stage)
    local = layer_specs(config, model)[first:first + get_num_layers_to_build(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=local, layer_norm=block_norm(config))


def _prediction_spec(config: Any, model: ModelConfig) -> MultiTokenPredictionBlockSubmodules:
    """Return the spec of the multi-token prediction layers."""
    layer = get_mtp_layer_spec(mtp_layer_spec(config, model),
                               use_transformer_engine=uses_transformer_engine(config.params_dtype))
    layer.module = PredictionLayer
    norm = block_norm(config)
    layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = norm
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * model.num_mtp_layers)
