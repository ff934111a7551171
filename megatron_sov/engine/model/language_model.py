"""`LanguageModel`, a process's part of the model: build it from chunks, and prepare its parameters."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import mlp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.autograd.function import once_differentiable

from megatron_sov.engine.model import quantized_weights
from megatron_sov.engine.model.adapters import Adapters
from megatron_sov.engine.model.chunk import Chunk
from megatron_sov.engine.model.media_encoders import MediaEncoders
from megatron_sov.engine.model.rotary import patch_packed_rotation, set_frequencies
from megatron_sov.engine.model.specs import build_transformer_config, clamp_gates, uses_transformer_engine
from megatron_sov.engine.parallel.device import get_local_device, on_gpu
from megatron_sov.engine.router import BalancedRouter, ExpertSpill, patch_dispatcher_combine
from megatron_sov.model.config import (
    GpuConfig, LoraConfig, MediaConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig)
from megatron_sov.model.config.gpu import DEFAULT_GPU
from megatron_sov.runs.checkpoints import AdapterBase

VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Weights with one row per token id, split by rows over the tensor-parallel group."""
NO_ADAPTERS = LoraConfig()
ENCODER_TRAINING = MediaConfig()


class LanguageModel(torch.nn.ModuleList):
    """The local part of the model: a `Chunk`, or several with an interleaved pipeline."""

    def __init__(self, chunks: list[Chunk], architecture: ModelConfig, lora: LoraConfig = NO_ADAPTERS,
                 encoder_training: MediaConfig = ENCODER_TRAINING) -> None:
        super().__init__(chunks)
        self.architecture = architecture
        """The architecture in our own settings."""
        self.lora = lora
        """LoRA settings."""
        self.encoder_training = encoder_training
        """Settings that say which encoder weights train."""
        self.adapter_base: AdapterBase | None = None
        """Checkpoint with the frozen weights. None: the weights train, or were initialized from a seed."""
        self.chunks: tuple[Any, ...] = tuple(chunks)
        """Chunks in layer order."""
        self.config = chunks[0].config
        """Megatron-Core's `TransformerConfig`."""
        self.vocab_size = architecture.vocab_size
        """Token ids; a chunk's `vocab_size` is padded to a multiple of the tensor-parallel size."""
        self.fp8_placeholders = quantized_weights.create_placeholders(self)
        """`id(parameter)` -> meta tensor that stands for an FP8 weight, see `quantized_weights`."""
        self.iter_masters: Callable[[Any, torch.nn.Parameter | None], Iterator[Any]] | None = None
        """Maps an FP8 weight's block to its local float32 master blocks. None: no optimizer made any."""
        self.quantize_masters: Callable[[], None] | None = None
        """Quantizes the FP8 weights from their master weights."""
        self.pending_gather: Callable[[], None] | None = None
        """All-gathers updated weights over the data-parallel group. None: every process has them."""

    def finish_param_gather(self) -> None:
        """Wait until every process holds the updated weights. Collective.

        Every reader outside a training step calls this: `local_shards`, `ForwardModel.map`, `CachedDecoder`.
        """
        if self.pending_gather is not None:
            run_gather, self.pending_gather = self.pending_gather, None
            run_gather()

    def requantize_weights(self) -> None:
        """Quantize FP8 weights after a caller wrote their masters through `local_shards`. Collective."""
        if self.quantize_masters is not None:
            self.quantize_masters()

    @property
    def head_weight(self) -> torch.Tensor:
        """Output head weight [padded vocab_size / tp, hidden], on the last stage."""
        last = self.chunks[-1]
        tied = last.share_embeddings_and_output_weights
        weight: torch.Tensor = last.shared_embedding_or_output_weight() if tied else last.output_layer.weight
        adapter = last.adapters.head if last.adapters is not None else None
        return weight if adapter is None else adapter.merge_weight(weight)


def build_run_model(config: RunConfig, gpu: GpuConfig | None = None) -> LanguageModel:
    """Build a run config's model, see `build_model`; `gpu` replaces `config.gpu`."""
    return build_model(config.model, config.parallel, config.train, config.gpu if gpu is None else gpu,
                       config.lora, config.media)


def build_model(model: ModelConfig, parallel: ParallelConfig, train: TrainConfig,
                gpu: GpuConfig = DEFAULT_GPU, lora: LoraConfig = NO_ADAPTERS,
                encoder_training: MediaConfig = ENCODER_TRAINING) -> LanguageModel:
    """Build this process's part of a `LanguageModel`, with uninitialized weights."""
    config = build_transformer_config(model, parallel, train, gpu)
    patch_packed_rotation()
    patch_dispatcher_combine()
    if not uses_transformer_engine(config.params_dtype):
        patch_swiglu_kernels()
    chunks = [_build_chunk(model, config, i if parallel.vpp > 1 else None) for i in range(parallel.vpp)]
    for chunk in chunks:
        if chunk.encoders is not None:
            chunk.encoders.overlapped = parallel.overlap_grad_reduce or parallel.overlap_param_gather
        with use_local_device():
            chunk.adapters = Adapters(chunk, model, lora) if lora.on else None
        clamp_gates(chunk, model)
    language_model = LanguageModel(chunks, model, lora, encoder_training)
    if gpu.expert_spill and train.recompute is not True and "moe" not in gpu.recompute_modules:
        config.routing_step.spill = spill = ExpertSpill(gpu.expert_spill)
        for layer in language_model.modules():
            if isinstance(layer, MoELayer):
                spill.attach(layer)
    return language_model


# Megatron-Core creates some parameters on the CPU regardless of the default device (router weights, torch's
# norms) and moves them with the whole model or in the first forward pass. The gradient hooks of the
# data-parallel wrapper would then watch the old tensor, and the weight would never train.

def use_local_device() -> contextlib.AbstractContextManager[object]:
    """Return a context that creates tensors on the local GPU by default, or a null context without a GPU."""
    return get_local_device() if on_gpu() else contextlib.nullcontext()


def move_to_device(module: torch.nn.Module, device: torch.device) -> None:
    """Move parameters and buffers to `device`, before hooks and buffers reference the old tensors."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and parameter.device != device:
                parameter.data = parameter.data.to(device)  # in place: keeps attributes and weight tying
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    check_device(module, device)


def check_device(module: torch.nn.Module, device: torch.device) -> None:
    """Raise `RuntimeError` naming the first parameter or buffer that is not on `device`."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device != device:
            raise RuntimeError(f"{name} is on {tensor.device} and the model on {device}: it would get no "
                               "gradient")


# SwiGLU for CPUs. Megatron-Core's function would have to be compiled: run eagerly, it adds an offset of
# zero and, in the backward pass, concatenates the two halves.


def patch_swiglu_kernels() -> None:
    """Replace Megatron-Core's fused SwiGLU kernels by `_apply_swiglu` and `_apply_weighted_swiglu`."""
    mlp.bias_swiglu_impl, mlp.weighted_bias_swiglu_impl = _apply_swiglu, _apply_weighted_swiglu


def _apply_swiglu(values: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """Apply SwiGLU: values [..., 2 * ffn], bias [2 * ffn] -> [..., ffn]."""
    output: torch.Tensor = _SwiGLU.apply(values if bias is None else values + bias)
    return output


def _apply_weighted_swiglu(values: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor,
                           *_: Any) -> torch.Tensor:
    """Apply SwiGLU and router weights: [tokens, 2 * ffn], [2 * ffn], [tokens, 1] -> [tokens, ffn]."""
    return (_apply_swiglu(values, bias) * weights).to(values.dtype)


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` for a tensor [gate, up]; the gradient has the same bits as autograd's."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        """[..., 2 * ffn] -> [..., ffn]."""
        gate, up = values.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(values, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Write the gradients for gate and up into the two halves of a tensor."""
        values, activated = ctx.saved_tensors
        gate, up = values.chunk(2, dim=-1)
        gradients = torch.empty_like(values)
        gate_gradient, up_gradient = gradients.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=up_gradient)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=gate_gradient)
        return gradients


def _build_chunk(model: ModelConfig, config: Any, vp_stage: int | None) -> Chunk:
    """Build chunk `vp_stage` of an interleaved pipeline stage. None: the only chunk of the stage."""
    with use_local_device():
        device = torch.get_default_device()
        chunk = Chunk(config, model, vp_stage)
        has_encoders = chunk.pre_process and (model.vision is not None or model.audio is not None)
        chunk.encoders = MediaEncoders(model, config) if has_encoders else None
    check_layers(chunk, get_transformer_layer_offset(config, vp_stage))
    move_to_device(chunk, device)
    for parameter in chunk.parameters():
        # parameters only: the router's bias buffer moves in steps that vanish in bf16, and its token
        # counts would stop at 256
        if not quantized_weights.is_quantized(parameter):
            parameter.data = parameter.data.to(config.params_dtype)
    set_frequencies(chunk.rotary_pos_emb, model, config.params_dtype)
    if model.embedding_multiplier != 1 and (chunk.pre_process or chunk.mtp_process):
        chunk.embedding.register_forward_hook(
            lambda module, inputs, embedded: embedded * model.embedding_multiplier)
    _zero_padding_rows(chunk, model.vocab_size)
    return chunk


def check_layers(chunk: Chunk, first: int) -> None:
    """Raise `RuntimeError` for an unexpected `layer_number`, or a router that is not a `BalancedRouter`.

    Our per-layer lists rely on these numbers; another Megatron-Core version could silently train another
    model.

    Args:
        chunk: the chunk.
        first: number of trunk layers in earlier chunks.
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
                raise RuntimeError(f"layer {number}: its router is Megatron-Core's {type(router).__name__}")


def count_token_rows(weight: torch.Tensor, vocab_size: int) -> int:
    """Return the number of local embedding or head rows that belong to token ids; padding rows follow."""
    first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    return min(max(vocab_size - first, 0), weight.shape[0])


@torch.no_grad()
def _zero_padding_rows(chunk: Chunk, vocab_size: int) -> None:
    """Zero the padding rows: no code writes padding rows later, and no gradient reaches them."""
    for name, weight in chunk.named_parameters():
        if name in VOCABULARY_WEIGHTS:
            weight[count_token_rows(weight, vocab_size):] = 0


def gather_hidden_states(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Gather hidden states [tokens, hidden] over the tensor-parallel group (sequence parallelism).

    The output head is split over the vocabulary, so the backward pass sums gradients over the group."""
    if config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return hidden.flatten(0, 1)


def prepare_head_input(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Gather hidden states and scale them by `logits_multiplier`, ready for the head weight."""
    states = gather_hidden_states(hidden, config)
    return states if config.logits_multiplier == 1 else states * config.logits_multiplier
