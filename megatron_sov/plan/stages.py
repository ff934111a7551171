"""What the processes of each pipeline stage hold of a model, from its config alone.

The shapes are those of `models.count`, cut as megatron-core cuts them: matrices of attention and dense
layers, of shared experts and of the vocabulary over `tp`, experts over `ep` and their matrices over `etp`,
layers over stages.  Norms and routers are whole on every process.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.models.count import attention_params, swiglu_params


@dataclass(frozen=True)
class StageParams:
    """Parameters that one process of a pipeline stage holds."""

    dense: int
    """Those that every data-parallel process has: attention, norms, routers, shared experts, embeddings."""
    experts: int
    """Those of its routed experts."""
    layers: int
    """Layers of the trunk on it, and multi-token prediction layers."""


def stage_params(config: RunConfig) -> list[StageParams]:
    """Return what a process of each stage holds; the layout has to fit the model."""
    m, p = config.model, config.parallel
    expert = swiglu_params(m.hidden_size, m.expert_ffn_dim) // p.etp if m.num_experts else 0
    found = []
    for stage in range(p.pp):
        layers = p.layers_of_stage(stage, m.num_layers)
        num_moe = sum(layer >= m.num_layers - m.num_moe_layers() for layer in layers)
        last = stage == p.pp - 1
        dense = (_block(m, p.tp) * len(layers) + _moe_beside_experts(m, p.tp) * num_moe
                 + swiglu_params(m.hidden_size, m.dense_ffn_dim) // p.tp * (len(layers) - num_moe)
                 + vocabulary_tables(config, stage) * _table(m, p)
                 + last * (m.hidden_size + m.num_mtp_layers * _mtp_layer(m, p.tp)))
        found.append(StageParams(dense, num_moe * (m.num_experts // p.ep) * expert,
                                 len(layers) + last * m.num_mtp_layers))
    return found


def vocabulary_tables(config: RunConfig, stage: int) -> int:
    """Return how many embeddings and heads a pipeline stage holds, copies of tied ones included."""
    p, m = config.parallel, config.model
    last = stage == p.pp - 1
    return ((stage == 0) + (last and not (m.tied_embeddings and p.pp == 1))
            + (last and p.pp > 1 and m.num_mtp_layers > 0))


def _table(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the weights of a vocabulary's table, which is filled up to a multiple of `tp`."""
    return -(-model.vocab_size // parallel.tp) * model.hidden_size


def _block(model: ModelConfig, tp: int) -> int:
    """Return attention and the two norms of a layer."""
    norms = 2 * model.head_dim if model.qk_norm else 0
    return (attention_params(model) - norms) // tp + norms + 2 * model.hidden_size


def _moe_beside_experts(model: ModelConfig, tp: int) -> int:
    """Return router and shared experts of a layer."""
    shared = model.num_shared_experts * swiglu_params(model.hidden_size, model.expert_ffn_dim)
    return model.hidden_size * model.num_experts + shared // tp


def _mtp_layer(model: ModelConfig, tp: int) -> int:
    """Return a multi-token prediction layer (`models.count.num_params`)."""
    h = model.hidden_size
    return 3 * h + 2 * h * h // tp + _block(model, tp) + swiglu_params(h, model.dense_ffn_dim) // tp
