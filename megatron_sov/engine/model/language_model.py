"""The language model: megatron-core's GPTModel that ends in hidden states,
so that objectives apply the head in chunks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, set_tensor_model_parallel_attributes)
from megatron.core.transformer import mlp
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules, get_mtp_layer_spec)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from torch.autograd.function import once_differentiable

from megatron_sov.engine.lanes import LibraryPredictionLayer
from megatron_sov.engine.model import quantized_weights
from megatron_sov.engine.model.added_parts import Adapters, MediaEncoders
from megatron_sov.engine.model.attention import PackedDocuments, SharedPrompts, pack
from megatron_sov.engine.model.cache_rows import PackedSpans, ReadRow
from megatron_sov.engine.model.gpu_settings import mend_extra_state
from megatron_sov.engine.model.rotary import rotate_by, rotate_by_token
from megatron_sov.engine.model.specs import (
    block_norm, bound_gates, layer_specs, mtp_layer_spec, transformer_config, uses_transformer_engine)
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import local_device, on_gpu
from megatron_sov.engine.router import BalancedRouter, let_routes_go
from megatron_sov.model.config import (
    GpuConfig, LoraConfig, MediaConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig)
from megatron_sov.model.config.gpu import AUTO
from megatron_sov.model.modality import EncoderInputs
from megatron_sov.runs.checkpoints import AdapterBase

# Where a model's weights lie: on the device of its process, every one of them.
#
# The library makes some of them on the CPU whatever it is told (0.16.1: the router's weight, the norms of
# torch) and moves what it finds there with the whole model, or in the first forward pass. By then the
# gradient hooks of its data-parallel wrapper watch a weight that is no longer used, and the weight is never
# learned.

def made_here() -> contextlib.AbstractContextManager[object]:
    """Return a context in which tensors are made on this process's GPU unless they name a device; without a
    GPU it changes nothing."""
    return local_device() if on_gpu() else contextlib.nullcontext()


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Move every parameter and buffer to a device, before anything else holds on to them, and check it."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and parameter.device != device:
                parameter.data = parameter.data.to(device)  # marks and ties stay
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    refuse_elsewhere(module, device)


def refuse_elsewhere(module: torch.nn.Module, device: torch.device) -> None:
    """Raise `RuntimeError` where a parameter or buffer is not on a device; the message names it."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device != device:
            raise RuntimeError(f"{name} is on {tensor.device} and the model on {device}: it would get no "
                               "gradient")


# The output head beside fused accumulation of weight gradients.
#
# With it, the library's own `ColumnParallelLinear` demands APEX, whatever Transformer Engine can: the output
# head is one, also in a model of Transformer Engine's modules. Losses take the head's weight and never call
# its module, so its own configuration may say no.

class OutputHead(ColumnParallelLinear):
    """A head whose weight gradient comes from the losses."""

    def __init__(self, *args: Any, config: Any, **settings: Any) -> None:
        # not dataclasses.replace: the library's checks refuse the per-layer lists that are set behind them
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False
        super().__init__(*args, config=own, **settings)


@contextlib.contextmanager
def without_fusion() -> Iterator[None]:
    """Have the library make the output head, which it looks up in its package, without the fusion."""
    tensor_parallel.ColumnParallelLinear = OutputHead
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear = ColumnParallelLinear


VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Weights with a row per token id, split by rows over the tensor-parallel group."""
NO_ADAPTERS = LoraConfig()
ENCODER_TRAINING = MediaConfig()


# The multi-token prediction layer of rows of packed documents.


class PredictionLayer(LibraryPredictionLayer):
    """Multi-token prediction layer for rows of packed documents, wherever they are cut.

    The library moves tokens ahead in a loop over documents, and under context parallelism cuts each
    document for itself, and tells experts nothing of padding.

    Applied several times (`ModelConfig.mtp_depths`), it gives the states of all depths one behind the other.
    Recomputation then repeats all of them at once: gradients of a weight arrive once in a pass, as the
    wrapper for data parallelism expects.
    """

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
        return self.embeddings(ahead, position_ids, padding_mask, together, states)

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


# The gate of a feed-forward block on CPUs, where the library's kernel for it would be compiled: op by op it
# adds an offset of zero, and autograd concatenates what it had split.


def gate_without_compiler() -> None:
    """Have the library's blocks gate by these where they would by its kernels."""
    mlp.bias_swiglu_impl, mlp.weighted_bias_swiglu_impl = _gated, _weighted


def _gated(values: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """[..., gate and up], [gate and up] -> [..., up]."""
    found: torch.Tensor = _Gated.apply(values if bias is None else values + bias)
    return found


def _weighted(values: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor,
              *_: Any) -> torch.Tensor:
    """[tokens, gate and up], [gate and up], [tokens, 1] -> [tokens, up]."""
    return (_gated(values, bias) * weights).to(values.dtype)


class _Gated(torch.autograd.Function):
    """``silu(gate) * up`` of both in one tensor, with the bits of autograd's own derivative."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        """[..., gate and up] -> [..., up]."""
        gate, up = values.chunk(2, dim=-1)
        passed = torch.nn.functional.silu(gate)
        ctx.save_for_backward(values, passed)
        return passed * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Write both derivatives where they belong."""
        values, passed = ctx.saved_tensors
        gate, up = values.chunk(2, dim=-1)
        found = torch.empty_like(values)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.mul(gradient, passed, out=of_up)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=of_gate)
        return found


# What the library is told of parameters: how their gradients are summed, and who counts them in the norm.


def mark_parameters(chunk: torch.nn.Module) -> None:
    """Have gradients of routed experts summed over the expert data-parallel group, and every tensor-parallel
    process count its own part of a split weight in the gradient norm.

    Defect of 0.16.1: the library marks experts only for expert parallel sizes above 1, so with ep = 1 and
    etp != tp each tensor-parallel process keeps the gradient of its own tokens.  What is split
    it marks only while it initialises weights, which `checkpoint.load` does in its place.  Transformer Engine
    marks its layers' weights, but since 2.13 not those of grouped ones, the experts: the processes of a
    tensor-parallel group would compute different norms, and clip differently.
    """
    for module in chunk.modules():
        split = isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear))
        # a tied head has no weight of its own
        if split and module.weight is not None:
            _mark_split(cast(torch.Tensor, module.weight), int(isinstance(module, RowParallelLinear)))
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = parameter.sequence_parallel = False  # type: ignore[attr-defined]
            _mark_split(parameter, int("linear_fc2" in name))


def _mark_split(parameter: torch.Tensor, axis: int) -> None:
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)


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


class Chunk(GPTModel):
    """A run of layers: GPTModel that takes `ModelInputs` and ends in hidden states [depths * local
    tokens, 1, hidden].

    Depth 0 is the trunk's output after its final norm; depth k that of the k-th multi-token prediction layer.
    Local tokens are those of this process, where context and sequence parallelism cut the row.
    """

    adapters: Adapters | None
    """Low-rank adapters of its linear layers, where they are trained in the place of the weights."""
    encoders: MediaEncoders | None
    """Encoders of pictures and sounds, on the first run of a model that has some."""
    before_head: Callable[[], None] | None = None
    """Waits for the head's weight where updated ones are on their way; None: nothing is."""

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

    def begin(self, inputs: ModelInputs, first_route: int | None) -> BegunRow:
        """Return what layers take of a row, see `forward`."""
        if self.config.fine_grained_activation_offloading:
            self.preprocess_for_fine_grained_offloading()
        own, bucketed = self.config.own_attention, self.config.attention_backend.name != "unfused"
        packed = pack(inputs.cu_seqlens, inputs.max_document_tokens, len(inputs.tokens), own=own,
                      host_bounds=inputs.host_bounds, shared=inputs.shared, bucketed=bucketed)
        self.config.routing_step.shared = inputs.shared
        tokens, positions = context.local(inputs.tokens)[None], context.local(inputs.positions)[None]
        embedded, rotary, *_ = self._preprocess(input_ids=tokens, position_ids=positions,
                                                packed_seq_params=packed)
        embedded = self._with_features(embedded, len(inputs.tokens), inputs.encoder_inputs)
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
        embedded, rotary, *_ = self._preprocess(input_ids=row.tokens[None], position_ids=row.positions[None],
                                                packed_seq_params=row.packed)
        embedded = self._with_features(embedded, len(row.tokens), row.encoder_inputs,
                                       cut_for_context=False)
        return self.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=rotary[row.positions],
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
        _, rotary, *_ = self._preprocess(input_ids=ahead[None], position_ids=row.positions[None],
                                         packed_seq_params=row.packed, decoder_input=hidden)
        embedded = self.embedding(input_ids=ahead[None], position_ids=row.positions[None])
        return self.mtp.layers[0].transform(hidden, embedded,
                                            rotary[row.positions], row.packed)

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

        GPTModel itself splits it on the first pipeline stage only, and later stages would see masks
        of the wrong length.
        """
        mine = context.row_index(len(padding), self.config.sequence_parallel, padding.device)
        if first_route is None:
            return padding[mine][None]
        mask: torch.Tensor = self.config.routing_step.table.mask(padding[mine], first_route + mine)
        return mask


class LanguageModel(torch.nn.ModuleList):
    """This process's part of the model: one chunk, or several under an interleaved pipeline."""

    def __init__(self, chunks: list[Chunk], architecture: ModelConfig,
                 lora: LoraConfig = NO_ADAPTERS,
                 encoder_training: MediaConfig = ENCODER_TRAINING) -> None:
        super().__init__(chunks)
        self.architecture = architecture
        """What it is, in our own terms."""
        self.lora = lora
        """Its adapters."""
        self.encoder_training = encoder_training
        """Which weights of its encoders are trained."""
        self.adapter_base: AdapterBase | None = None
        """The checkpoint that the frozen weights are from; None: they are trained, or come of a seed."""
        self.chunks: tuple[Any, ...] = tuple(chunks)
        """In the order of their layers."""
        self.config = chunks[0].config
        """The library's TransformerConfig."""
        self.vocab_size = architecture.vocab_size
        """Token ids; a chunk's own `vocab_size` is padded to a multiple of the tensor parallel size."""
        self.stand_ins = quantized_weights.stand_ins(self)
        """Of its weights in 8 bits."""
        self.masters: Callable[[Any, torch.nn.Parameter | None], Iterator[Any]] | None = None
        """Gives for a block of a weight in 8 bits those of the masters that this process has; None: there are
        none yet."""
        self.make_of_masters: Callable[[], None] | None = None
        """Makes weights in 8 bits of their masters."""
        self.pending_gather: Callable[[], None] | None = None
        """Brings the last update's weights to the data-parallel processes that did not compute them;
        None: all have them."""

    def finish_param_gather(self) -> None:
        """Make every weight the same on all processes that hold it; called by all processes together.

        Whatever reads weights outside of a training step comes through here: `local_shards`,
        `ForwardModel.map` and `CachedDecoder`.
        """
        if self.pending_gather is not None:
            gather, self.pending_gather = self.pending_gather, None
            gather()

    def finish_writing(self) -> None:
        """Have products read what was written into blocks of `local_shards`; called by all processes
        together."""
        if self.make_of_masters is not None:
            self.make_of_masters()

    @property
    def head_weight(self) -> torch.Tensor:
        """[padded vocabulary / tensor parallel size, hidden] weight of the output head, which the last
        pipeline stage holds."""
        last = self.chunks[-1]
        tied = last.share_embeddings_and_output_weights
        weight: torch.Tensor = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
        adapter = last.adapters.head if last.adapters is not None else None
        return weight if adapter is None else adapter.merged(weight)


def build(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
          gpu: GpuConfig = AUTO, lora: LoraConfig = NO_ADAPTERS,
          encoder_training: MediaConfig = ENCODER_TRAINING) -> LanguageModel:
    """Build this process's part of the model; its weights are not initialised yet."""
    config = transformer_config(model, parallel, train, gpu)
    if config.fp8 or config.fp4:
        from megatron.core.extensions.transformer_engine import TEGroupedLinear

        mend_extra_state(TEGroupedLinear)
    rotate_by_token()
    let_routes_go()
    if not uses_transformer_engine(config.params_dtype):
        gate_without_compiler()
    with without_fusion():
        chunks = [_chunk(model, config, i if parallel.vpp > 1 else None) for i in range(parallel.vpp)]
    for chunk in chunks:
        if chunk.encoders is not None:
            chunk.encoders.overlapped = parallel.overlap_grad_reduce or parallel.overlap_param_gather
        with made_here():
            chunk.adapters = Adapters(chunk, model, lora) if lora.on else None
        bound_gates(chunk, model)
    return LanguageModel(chunks, model, lora, encoder_training)


def build_configured(config: RunConfig, gpu: GpuConfig | None = None) -> LanguageModel:
    """Build what a run's settings describe, see `build`; `gpu` replaces their part of that name."""
    return build(config.model, config.parallel, config.train, config.gpu if gpu is None else gpu,
                 config.lora, config.media)


def _chunk(model: ModelConfig, config: Any, vp_stage: int | None) -> Chunk:
    """Build chunk number `vp_stage` of an interleaved pipeline's stage, or (None) the only one."""
    te = uses_transformer_engine(config.params_dtype)
    norm = block_norm(config)
    first = get_transformer_layer_offset(config, vp_stage)
    local = layer_specs(config, model)[first:first + get_num_layers_to_build(config, vp_stage)]
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    mtp = None
    if model.num_mtp_layers and last_stage:
        layer = get_mtp_layer_spec(mtp_layer_spec(config, model), use_transformer_engine=te)
        layer.module = PredictionLayer
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = norm
        mtp = MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * model.num_mtp_layers)
    with made_here():
        device = torch.get_default_device()
        chunk = Chunk(
            config, TransformerBlockSubmodules(layer_specs=local, layer_norm=norm),
            vocab_size=-(-model.vocab_size // config.tensor_model_parallel_size)
            * config.tensor_model_parallel_size, max_sequence_length=model.max_position_tokens,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="yarn" if model.yarn or model.latent_attention else "rope",
            post_process=last_stage, rotary_percent=model.rope_share, rotary_base=model.rope_theta,
            mtp_block_spec=mtp, share_embeddings_and_output_weights=model.tied_embeddings, vp_stage=vp_stage)
        encodes = chunk.pre_process and (model.vision is not None or model.audio is not None)
        chunk.encoders = MediaEncoders(model, config) if encodes else None
    check_layers(chunk, first)
    place(chunk, device)
    for parameter in chunk.parameters():
        # not the buffers: a router's bias moves in steps that vanish in bf16, and its counts stop at 256
        # there
        if not quantized_weights.is_quantized(parameter):
            parameter.data = parameter.data.to(config.params_dtype)
    rotate_by(chunk.rotary_pos_emb, model, config.params_dtype)
    if model.embedding_multiplier != 1 and (chunk.pre_process or chunk.mtp_process):
        chunk.embedding.register_forward_hook(
            lambda module, inputs, embedded: embedded * model.embedding_multiplier)
    _zero_padding_rows(chunk, model.vocab_size)
    mark_parameters(chunk)
    return chunk


def check_layers(chunk: Chunk, first: int) -> None:
    """Raise `RuntimeError` where a layer has not the number under which our lists have it, or a router is
    not ours: another version of the library would then train another model, and nothing would say so.

    Args:
        chunk: the run of layers.
        first: layers of the trunk before it.
    """
    layers = [*enumerate(chunk.decoder.layers, first + 1)]
    if chunk.mtp_process:
        layers += enumerate((outer.transformer_layer for outer in chunk.mtp.layers),
                            chunk.config.num_layers + 1)
    for number, layer in layers:
        routers = [part for part in layer.modules() if isinstance(part, Router)]
        for part in (layer, layer.self_attention, *routers):
            if part.layer_number != number:
                raise RuntimeError(f"layer {number}: {type(part).__name__} has number {part.layer_number}")
        for router in routers:
            if not isinstance(router, BalancedRouter):
                raise RuntimeError(f"layer {number}: its router is the library's {type(router).__name__}")


def valid_rows(weight: torch.Tensor, vocab_size: int) -> int:
    """Return how many rows of this process's part of an embedding or head weight belong to token ids;
    padding follows them."""
    first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    return min(max(vocab_size - first, 0), weight.shape[0])


@torch.no_grad()
def _zero_padding_rows(chunk: Chunk, vocab_size: int) -> None:
    """Set rows beyond the vocabulary to zero: nothing else ever writes them, and no gradient reaches them."""
    for name, weight in chunk.named_parameters():
        if name in VOCABULARY_WEIGHTS:
            weight[valid_rows(weight, vocab_size):] = 0


def gather_sequence(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Return hidden states [tokens, hidden] on every tensor-parallel process: of all tokens, or the local
    part of a cut row.

    The head that follows is split over the vocabulary, so gradients of its input are summed over the
    group on the way back.
    """
    if config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return hidden.flatten(0, 1)


def states_for_head(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Return what the output head's weight is multiplied with: the gathered hidden states, times the factor
    on its logits."""
    states = gather_sequence(hidden, config)
    return states if config.logits_multiplier == 1 else states * config.logits_multiplier
