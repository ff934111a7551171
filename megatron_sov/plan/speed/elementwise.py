"""Bytes that kernels without matrix products pass through a GPU's memory in a forward pass of a micro-batch.

Each operand is read once and each result written once, as fused kernels do; a backward pass has twice that.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_sov.plan.speed.work import Product, local_tokens
from megatron_sov.plan.speed.workload import Workload

NUMBER_BYTES = 2
NORM, RESIDUAL = 2, 3
"""A norm reads and writes, a residual sum reads two and writes one."""
LOGIT_BYTES = 14
"""Of each logit, both passes: written in bf16, read for the largest, read and written for the sum's
exponentials, read and written for the gradient in 4 or 2 bytes."""
SCORE_BYTES = 24
"""Of each router score: logits, scores, chosen ones and map, in 4 bytes."""
PERMUTED = {"alltoall": 8, "allgather": 6, "deepep": 4, "hybridep": 4}
"""Dispatcher -> how often a routed token's numbers are read or written around its expert's products."""
MAMBA_PASSES = 20
"""Of the inner width: convolution (in, out), scan (in, out, states of chunks in 4 bytes), gate and norm."""
SCAN_CHUNK = 128
"""Tokens of a chunk of the scan (arXiv 2405.21060, section 6)."""


def _residual(w: Workload) -> float:
    """Return the bytes of a block's norms and residual sum."""
    tokens = local_tokens(w) / (w.tp if w.sp else 1)
    return (NORM * w.shape.norms_per_block + RESIDUAL) * tokens * w.shape.hidden_size * NUMBER_BYTES


def attention_bytes(w: Workload) -> float:
    """Return the bytes of an attention block: norm, rotation of queries and keys, residual."""
    s = w.shape
    kv_heads = s.num_heads if s.kv_lora_rank else s.num_kv_heads
    rotated = (s.num_heads + kv_heads) * s.query_dim / w.tp
    # under latent attention the parts of queries and keys are put together in one more copy
    copies = 4 if s.kv_lora_rank else 2
    return _residual(w) + copies * local_tokens(w) * rotated * NUMBER_BYTES


def mamba_bytes(w: Workload) -> float:
    """Return the bytes of a Mamba-2 block."""
    inner = w.shape.mamba_num_heads * w.shape.mamba_head_dim / w.tp
    return _residual(w) + MAMBA_PASSES * local_tokens(w) * inner * NUMBER_BYTES


def mamba_scan_flops(w: Workload) -> float:
    """Return the FLOPs of a Mamba-2 block's chunked scan, forward (arXiv 2405.21060, section 6)."""
    s = w.shape
    inner = s.mamba_num_heads * s.mamba_head_dim
    per_token = 2 * SCAN_CHUNK * (s.mamba_num_groups * s.mamba_state_dim + inner)
    return local_tokens(w) / w.tp * (per_token + 4 * inner * s.mamba_state_dim)


def dense_bytes(w: Workload) -> float:
    """Return the bytes of a dense feed-forward network: norm, activation, residual."""
    return _residual(w) + _activation(w, local_tokens(w), w.shape.dense_ffn_dim / w.tp)


def activation_bytes(w: Workload) -> float:
    """Return the bytes of the routed experts' activation."""
    s = w.shape
    rows = local_tokens(w) / w.tp * w.etp * s.num_experts_per_token * w.imbalance
    return _activation(w, rows, s.expert_ffn_dim / w.etp)


def moe_bytes(w: Workload) -> float:
    """Return the bytes of a layer with experts, their activation left out: norm, router, sorting tokens by
    expert and back, shared experts' activation, residual."""
    s, own = w.shape, local_tokens(w) / w.tp
    sorted_bytes = (PERMUTED[w.dispatcher] * own * w.etp * s.num_experts_per_token * w.imbalance
                    * s.expert_width * NUMBER_BYTES)
    shared = _activation(w, local_tokens(w), s.num_shared_experts * s.expert_ffn_dim / w.tp)
    return _residual(w) + own * s.num_experts * SCORE_BYTES + sorted_bytes + shared


def head_bytes(w: Workload) -> float:
    """Return the bytes of the logits, both passes together."""
    return local_tokens(w) * w.shape.vocab_size / w.tp * LOGIT_BYTES


def quantized_bytes(products: Iterable[Product], frozen: bool) -> float:
    """Return the bytes of quantising the operands of products in 8 or 4 bits, both passes: inputs and
    gradients of outputs are read in bf16 and written along their rows and their columns; along rows alone
    where the weights are frozen."""
    each = 3 if frozen else 4
    return sum(each * (p.tokens * p.k + p.tokens * p.n) for p in products if p.quantized)


def adapter_bytes(products: Iterable[Product]) -> float:
    """Return the bytes of adapters beside frozen products, forward: their input is read once more, what they
    add is written into the product's output."""
    return sum((p.tokens * p.k + 2 * p.tokens * p.n) * NUMBER_BYTES for p in products)


def _activation(w: Workload, rows: float, width: float) -> float:
    """Return the bytes of a gate or another activation: all inputs read, one product written."""
    return w.shape.ffn_matrices * rows * width * NUMBER_BYTES
