"""The language model of a process: its chunks, built, placed, marked and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import mlp
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.autograd.function import once_differentiable

from megatron_sov.engine.model import quantized_weights
from megatron_sov.engine.model.added_parts import Adapters, MediaEncoders
from megatron_sov.engine.model.chunk import Chunk
from megatron_sov.engine.model.rotary import rotate_by, rotate_by_token
from megatron_sov.engine.model.specs import bound_gates, transformer_config, uses_transformer_engine
from megatron_sov.engine.parallel.device import local_device, on_gpu
from megatron_sov.engine.router import BalancedRouter, let_routes_go
from megatron_sov.model.config import (
    GpuConfig, LoraConfig, MediaConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig)
from megatron_sov.model.config.gpu import AUTO
from megatron_sov.runs.checkpoints import AdapterBase

# Where a model's weights lie: on the device of its process, every one of them.
#
# The library makes some of them on the CPU whatever it is told (the router's weight, the norms of torch)
# and moves what it finds there with the whole model, or in the first forward pass. By then the gradient hooks
# of its data-parallel wrapper watch a weight that is no longer used, and the weight is never learned.

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


VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Weights with a row per token id, split by rows over the tensor-parallel group."""
NO_ADAPTERS = LoraConfig()
ENCODER_TRAINING = MediaConfig()


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
    process count its own part of an expert's split weight in the gradient norm.

    The library marks experts only for expert parallel sizes above 1, so with ep = 1 and etp != tp each
    tensor-parallel process would keep the gradient of its own tokens.  Transformer Engine marks its layers'
    split weights, but since 2.13 not those of grouped layers, the experts: the processes of a tensor-parallel
    group would compute different norms, and clip differently.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = parameter.sequence_parallel = False  # type: ignore[attr-defined]
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, int("linear_fc2" in name), 1)


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
    rotate_by_token()
    let_routes_go()
    if not uses_transformer_engine(config.params_dtype):
        gate_without_compiler()
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
    with made_here():
        device = torch.get_default_device()
        chunk = Chunk(config, model, vp_stage)
        encodes = chunk.pre_process and (model.vision is not None or model.audio is not None)
        chunk.encoders = MediaEncoders(model, config) if encodes else None
    check_layers(chunk, get_transformer_layer_offset(config, vp_stage))
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
