"""Bytes of the quantised weights that Transformer Engine keeps beside the bf16 ones under `train.fp8`.

It quantises a weight in the first micro-batch of a step into buffers that stay (`_fp8_workspaces`, 2.20.2):
rowwise for the forward pass, columnwise for the gradients of inputs.  The shapes are those of its quantisers
(`pytorch/tensor/*_tensor.py`: data, and `get_scale_shape`).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.plan.states import FLOAT32_BYTES

BLOCK = 128
"""Rows and columns of a weight with one scale under `blockwise`."""
MX_VALUES, NVFP4_VALUES = 32, 16
"""Values with one scale of a byte."""


def kept_bytes(config: RunConfig, stage: int) -> int:
    """Return the bytes on a process of pipeline stage `stage` (0-based); 0 where nothing is quantised."""
    if config.train.fp8 == "none":
        return 0
    return sum(number * weight_bytes(config.train.fp8, *shape) for number, shape in _weights(config, stage))


def weight_bytes(fp8: str, rows: int, columns: int) -> int:
    """Return what is kept of one weight [rows, columns] under a recipe, both of its forms.

    `tensorwise` is counted as on a Hopper, whose products want a transposed copy; Blackwell has none of it.
    """
    numbers = rows * columns
    if fp8 == "tensorwise":
        return 2 * numbers + FLOAT32_BYTES
    if fp8 == "blockwise":
        down, across = -(-rows // BLOCK), -(-columns // BLOCK)
        return 2 * numbers + FLOAT32_BYTES * (down * _up(across, 4) + across * _up(down, 4))
    if fp8 == "mxfp8":
        return (2 * numbers + _up(rows, 128) * _up(columns // MX_VALUES, 4)
                + _up(rows // MX_VALUES, 4) * _up(columns, 128))
    # nvfp4: two values in a byte, and the largest value of the tensor for either form
    return (numbers + 2 * FLOAT32_BYTES + _up(rows, 128) * _up(-(-columns // NVFP4_VALUES), 4)
            + _up(columns, 128) * _up(-(-rows // NVFP4_VALUES), 4))


def _weights(config: RunConfig, stage: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (how many, [rows, columns]) of the weights that a process of a stage quantises."""
    m, p, train = config.model, config.parallel, config.train
    first_moe = m.num_layers - m.num_moe_layers()
    in_8_bits = range(train.fp8_bf16_layers_at_start, m.num_layers - train.fp8_bf16_layers_at_end)
    for layer in p.layers_of_stage(stage, m.num_layers):
        if layer in in_8_bits:
            yield from _attention(m, p)
            yield from (_experts(m, p) if layer >= first_moe
                        else _swiglu(m.hidden_size, m.dense_ffn_dim // p.tp))
    if stage == p.pp - 1 and train.fp8 != "nvfp4":  # which leaves the prediction layers in bf16
        for _ in range(m.num_mtp_layers):
            yield 1, (m.hidden_size // p.tp, 2 * m.hidden_size)
            yield from _attention(m, p)
            yield from _experts(m, p) if m.mtp_experts else _swiglu(m.hidden_size, m.dense_ffn_dim // p.tp)


def _attention(m: ModelConfig, p: ParallelConfig) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the projection to queries, keys and values, and the one of the output; of latent attention those
    to and from its narrow vectors."""
    if (latent := m.latent_attention) is not None:
        rank, queries = latent.q_lora_rank, m.num_heads * latent.query_dim // p.tp
        both = m.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim) // p.tp
        for shape in (*([(queries, m.hidden_size)] if rank is None
                        else [(rank, m.hidden_size), (queries, rank)]),
                      (latent.cached_dim, m.hidden_size), (both, latent.kv_lora_rank),
                      (m.hidden_size, m.num_heads * latent.v_head_dim // p.tp)):
            yield 1, shape
        return
    yield 1, ((m.num_heads + 2 * m.num_kv_heads) * m.head_dim // p.tp, m.hidden_size)
    yield 1, (m.hidden_size, m.num_heads * m.head_dim // p.tp)


def _experts(m: ModelConfig, p: ParallelConfig) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield routed experts and, where there are any, the shared ones, which are one wide network."""
    for _, shape in _swiglu(m.hidden_size, m.expert_ffn_dim // p.etp):
        yield m.num_experts // p.ep, shape
    if m.num_shared_experts:
        yield from _swiglu(m.hidden_size, m.num_shared_experts * m.expert_ffn_dim // p.tp)


def _swiglu(hidden: int, ffn: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield gate and up projection, which are one weight, and the down projection."""
    yield 1, (2 * ffn, hidden)
    yield 1, (hidden, ffn)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
