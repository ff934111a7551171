"""Memory of one process while it trains: weights, gradients, optimizer and activations,
as an account of single items.  Transformer Engine's quantised weights are in `quantized_weights`.

Of activations, each layer keeps its input (`train.recompute` true) or what is neither recomputed nor
offloaded (`activations`), and one layer's inside exists at a time.  The account leaves out what the
allocator, the communication library and the CUDA context take beside it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from megatron_sov.config import DistillationConfig, RunConfig
from megatron_sov.config.lora import HEAD
from megatron_sov.models.adapters import adapted_modules
from megatron_sov.plan.activations import kept, saved
from megatron_sov.plan.quantized_weights import kept_bytes
from megatron_sov.plan.stages import StageParams, vocabulary_tables

ACTIVATION_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
MASTER = 4
"""Bytes of a parameter's float32 master weight, under bf16."""
MOMENT = {"fp32": 4, "bf16": 2}
"""Bytes of each of AdamW's two moments under bf16, by `gpu.moment_dtype`; Muon keeps one, in float32."""
LOGIT_BYTES = 4
"""A softmax is computed in float32, or in the model's dtype where that is wider."""
DISTILL = "distill"
"""The objective that compares two distributions over the vocabulary."""
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
"""Gradients are summed in `gpu.grad_dtype`."""
FP32_GRADIENT = 4
"""Where they are summed in bf16, those that this process updates become float32 for the update."""
HOST = MASTER + 2 * MOMENT["fp32"] + FP32_GRADIENT
"""Bytes of the host for a parameter whose AdamW is there (`mcore/optimizer/host_adamw.py`)."""


@dataclass(frozen=True)
class Account:
    """Bytes of one process."""

    weights: int
    gradients: int
    optimizer: int
    layer_inputs: int
    """Kept for the backward pass by each layer and micro-batch under way: its input, or more."""
    one_layer: int
    """The inside of the layer that is being recomputed, and the gradients of as much again."""
    head: int
    """Logits of one chunk, the head's gradients that a loss leaves in its forward pass, and the head with its
    adapter inside."""
    quantized_weights: int = 0
    """What Transformer Engine keeps of weights in 8 or 4 bits beside `weights`, under `train.fp8`."""
    on_host: int = 0
    """In the host's memory, under `gpu.optimizer_offload`: masters, moments and gradients; in no total."""

    @property
    def total(self) -> int:
        """All of it that the device holds."""
        return sum(asdict(self).values()) - self.on_host


def account(config: RunConfig, params: StageParams, num_ranks: int, stage: int, seq_len: int) -> Account:
    """Return the account of a process on pipeline stage `stage` (0-based).

    Args:
        config: model, layout, precision, recomputation, use of GPUs.
        params: what it holds.
        num_ranks: processes.
        stage: pipeline stage; stage i of p has p - i micro-batches under way (1F1B, arXiv 2104.04473).
        seq_len: tokens of a sample.
    """
    p, item = config.parallel, ACTIVATION_BYTES[config.train.precision]
    # of a frozen model the adapters alone have gradients and state
    extra = adapter_params(config) if config.lora.on else (0, 0)
    dense, experts = extra if config.lora.on else (params.dense, params.experts)
    count = dense + experts
    shards, expert_shards = ((num_ranks // (p.tp * p.pp), num_ranks // (p.etp * p.ep * p.pp)) if p.zero1
                             else (1, 1))
    bf16 = config.train.precision == "bf16"
    beside = MASTER * bf16 + FP32_GRADIENT * (config.gpu.grad_dtype == "bf16")
    state = beside + 2 * (MOMENT[config.gpu.moment_dtype] if bf16 else item)
    of_matrices = beside + (MOMENT["fp32"] if bf16 else item) if config.optim.name == "muon" else state
    tables = (0 if config.lora.on else
              vocabulary_tables(config, stage) * (config.model.vocab_size // p.tp) * config.model.hidden_size)
    of_dense = min(dense, tables) * state + max(0, dense - tables) * of_matrices
    local = seq_len * config.train.micro_batch_size // p.cp
    inside = layer_bytes(config, seq_len * config.train.micro_batch_size)
    # recomputed: the input alone, and then all of the inside again
    stays, again = ((local // (p.tp if p.sp else 1) * config.model.hidden_size * item, inside)
                    if config.train.recompute is True else
                    (item * kept(config, seq_len * config.train.micro_batch_size), 0))
    if config.train.recompute == "selective":
        again = inside - stays
    share = config.gpu.optimizer_offload
    return Account(
        weights=(params.dense + params.experts + sum(extra)) * item,
        gradients=count * GRADIENT_BYTES[config.gpu.grad_dtype],
        optimizer=int((of_dense // shards + experts * of_matrices // expert_shards) * (1 - share)),
        on_host=int((dense // shards + experts // expert_shards) * HOST * share),
        layer_inputs=stays * params.layers * (p.pp - stage), one_layer=again + inside,
        head=_head_bytes(config, local) if stage == p.pp - 1 else 0,
        quantized_weights=kept_bytes(config, stage))


def adapter_params(config: RunConfig) -> tuple[int, int]:
    """Return the parameters of the adapters that one process holds, at most: those of routed experts
    second.  What tensor-parallel processes share of them is counted on each."""
    counts = [0, 0]
    for of in adapted_modules(config.model, config.lora):
        counts[bool(of.num_experts)] += sum(math.prod(shape) for shape in of.shapes(config.lora).values())
    p = config.parallel
    return -(-counts[0] // p.pp), -(-counts[1] // (p.pp * p.ep))


def _head_bytes(config: RunConfig, local_tokens: int) -> int:
    """Return what the output head takes while a micro-batch's loss is computed."""
    m, item = config.model, ACTIVATION_BYTES[config.train.precision]
    # float32 logits become the softmax and then their gradient in place; products take bf16, which is a copy,
    # and are summed in float32
    logit_bytes = item if item >= LOGIT_BYTES else LOGIT_BYTES + item
    if config.objective.name == DISTILL:
        logit_bytes = _divergence_buffers(config.distillation) * max(item, LOGIT_BYTES)
    chunk = min(config.train.head_chunk_tokens, local_tokens) * logit_bytes
    adapted = HEAD in config.lora.adapted(m)
    gradients = (0 if config.lora.on and not adapted
                 else (1 + m.num_mtp_layers) * m.hidden_size * max(item, LOGIT_BYTES))
    copy = m.hidden_size * item if adapted else 0  # the head with its adapter inside
    return m.vocab_size // config.parallel.tp * (chunk + gradients + copy)


def _divergence_buffers(distillation: DistillationConfig) -> int:
    """Return how many times a chunk of logits is there at most while `mcore.model.divergence` compares."""
    if distillation.top_k:
        return 3  # the student's log-probabilities, its probabilities, and their product
    # the log-probabilities and probabilities of both; beside a mixture also that, and a difference
    return 6 if 0 < distillation.beta < 1 else 4


def layer_bytes(config: RunConfig, row_tokens: int) -> int:
    """Return the bytes of what a layer with experts and global attention saves for its backward pass,
    routing being even.

    Args:
        config: model, layout, precision.
        row_tokens: tokens of a micro-batch, before it is cut over processes.
    """
    return ACTIVATION_BYTES[config.train.precision] * saved(config, row_tokens).total
