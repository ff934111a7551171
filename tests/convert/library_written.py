"""Models of Megatron-Core's own classes, saved by its `torch_dist` writer: jobs for ranks."""

import argparse
import queue
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.functional import silu

VOCAB_SIZE, PADDED_VOCAB_SIZE, NUM_LAYERS = 120, 128, 4
DENSE = {"num_layers": NUM_LAYERS, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
         "kv_channels": 8, "ffn_hidden_size": 48, "gated_linear_unit": True, "normalization": "RMSNorm",
         "add_bias_linear": False, "layernorm_epsilon": 1e-6, "init_method_std": 0.3}
EXPERTS = {**DENSE, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24,
           "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall"}
SIGMOID = {**EXPERTS, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
           "moe_router_topk_scaling_factor": 1.7, "moe_shared_expert_intermediate_size": 24}
MODELS = {"llama": DENSE, "qwen3": {**DENSE, "qk_layernorm": True},
          "qwen3_moe": {**EXPERTS, "qk_layernorm": True}, "solar_open": SIGMOID}


def arguments(settings: dict[str, Any]) -> argparse.Namespace:
    """Return the settings that Megatron-LM would store for a model."""
    known_settings = {name: value for name, value in settings.items()
                      if name not in ("gated_linear_unit", "layernorm_epsilon", "num_moe_experts")}
    return argparse.Namespace(
        **known_settings, swiglu=True, norm_epsilon=settings["layernorm_epsilon"], group_query_attention=True,
        num_experts=settings.get("num_moe_experts"), position_embedding_type="rope", rotary_base=10000,
        rotary_percent=1.0, untie_embeddings_and_output_weights=True, vocab_size=VOCAB_SIZE,
        padded_vocab_size=PADDED_VOCAB_SIZE, max_position_embeddings=64, seq_length=64, data_path=["/data/a"],
        params_dtype=torch.float32, pipeline_dtype=None)


def save_megatron_checkpoint(out: str, name: str, layout: dict[str, int],
                             metadata: dict[str, bool]) -> list[float]:
    """Save a random model as Megatron-LM does; return the flat logits of rank 0."""
    from megatron_sov.engine.parallel.world import join_world
    from megatron_sov.model.config import ParallelConfig

    join_world(ParallelConfig(**layout))
    torch.manual_seed(7)
    model = _model(MODELS[name], layout)
    logits = _logits(model)
    save_state({"model": model.sharded_state_dict(metadata=metadata), "args": arguments(MODELS[name]),
                "iteration": 12, "checkpoint_version": 3.0}, Path(out) / "iter_0000012")
    if dist.get_rank() == 0:
        (Path(out) / "latest_checkpointed_iteration.txt").write_text("12")
    return [float(x) for x in logits.flatten()]


def _model(settings: dict[str, Any], layout: dict[str, int]) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **settings, activation_func=silu, use_cpu_initialization=True, params_dtype=torch.float32,
        pipeline_dtype=torch.float32, bias_dropout_fusion=False, masked_softmax_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0, cuda_graph_scope=[],
        tensor_model_parallel_size=layout.get("tp", 1), pipeline_model_parallel_size=layout.get("pp", 1),
        expert_model_parallel_size=layout.get("ep", 1))
    spec = get_gpt_layer_local_spec(num_experts=settings.get("num_moe_experts"), normalization="RMSNorm",
                                    qk_layernorm=settings.get("qk_layernorm", False))
    model = GPTModel(config, spec, vocab_size=PADDED_VOCAB_SIZE, max_sequence_length=64, rotary_base=10000,
                     position_embedding_type="rope", share_embeddings_and_output_weights=False,
                     parallel_output=False, pre_process=parallel_state.is_pipeline_first_stage(),
                     post_process=parallel_state.is_pipeline_last_stage())
    with torch.no_grad():  # norms and biases are drawn as ones and zeros, which hide a mix-up
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("expert_bias") or tensor.dim() == 1:
                generator = torch.Generator().manual_seed(sum(key.encode()))
                tensor += 0.2 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
    if model.pre_process and model.post_process:
        return model(ids, positions, mask)
    hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size)
    if model.pre_process:
        dist.send(model(ids, positions, mask), 1)
        logits = torch.empty(*ids.shape, PADDED_VOCAB_SIZE)
        dist.recv(logits, 1)
        return logits
    dist.recv(hidden, 0)
    model.set_input_tensor(hidden)
    logits = model(ids, positions, mask)
    dist.send(logits.contiguous(), 0)
    return logits


def save_state(state: dict[str, Any], folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """Save a sharded state with Megatron-Core's writer, on all ranks."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron-Core starts a process for this queue, which costs seconds; a rank writes its own files
    filesystem_async._results_queue = queue.Queue()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder), content_metadata=metadata)


def save_fsdp_checkpoint(out: str, name: str) -> list[float]:
    """Save a random bfloat16 model under Megatron-FSDP as Megatron-LM does (`fsdp_dtensor`); return logits.

    The first moments are half the weights, the second moments their squares.
    """
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
        preprocess_state_dict_for_uneven_dtensor)
    from megatron.core.transformer.fsdp_dtensor_checkpoint import (
        handle_experts_in_state_dict, handle_swiglu_in_state_dict)

    from megatron_sov.engine.parallel.world import join_world
    from megatron_sov.model.config import ParallelConfig

    join_world(ParallelConfig())
    torch.manual_seed(7)
    model = _model(MODELS[name], {}).bfloat16().float()
    logits = _logits(model)
    # on a CPU all streams of the library are one
    with torch.no_grad(), patch.multiple(
            torch.cuda, Stream=MagicMock(), current_stream=MagicMock(), stream=MagicMock(),
            current_device=lambda: 0, get_rng_state=torch.get_rng_state, set_rng_state=MagicMock()):
        wrapped, optimizer = _shard_by_fsdp(model)
        weights = wrapped.module.state_dict_for_save_checkpoint()
        state = optimizer.sharded_state_dict(
            weights, metadata={"distrib_optim_sharding_type": "fsdp_dtensor"})
        weights, state = handle_swiglu_in_state_dict(wrapped.module, weights, state)
        weights = handle_experts_in_state_dict(weights, model.config.num_moe_experts)
    args = arguments(MODELS[name])
    args.global_batch_size = 8
    content = {"model": weights, "optimizer": state, "args": args, "iteration": 12, "checkpoint_version": 3.0,
               "opt_param_scheduler": {"max_lr": 0.01, "min_lr": 0.001, "num_steps": 96, "end_wd": 0.1,
                                       "lr_decay_style": "cosine", "lr_decay_steps": 800,
                                       "lr_warmup_steps": 16}}
    preprocess_state_dict_for_uneven_dtensor(content)
    dcp.save(content, storage_writer=dcp.FileSystemWriter(Path(out) / "iter_0000012"))
    dist.barrier()
    return [float(x) for x in logits.flatten()]


def _shard_by_fsdp(model: Any) -> tuple[Any, Any]:
    """Return the model in Megatron-FSDP's wrapper, and its optimizer after a step."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    model.config.bf16, model.config.params_dtype = True, torch.bfloat16
    wrapped = FullyShardedDataParallel(
        model.config, DistributedDataParallelConfig(use_megatron_fsdp=True, use_distributed_optimizer=True,
                                                    data_parallel_sharding_strategy="optim_grads_params"),
        Float16Module(model.config, model), device=torch.device("cpu"))
    settings = OptimizerConfig(optimizer="adam", lr=0.01, min_lr=0.001, weight_decay=0.1, adam_beta2=0.95,
                               bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    parameters = [param for group in optimizer.optimizer.param_groups for param in group["params"]]
    values = [param.to_local().clone() for param in parameters]
    for param in parameters:
        param.grad = torch.zeros_like(param)
    optimizer.optimizer.step()
    for param, value in zip(parameters, values, strict=True):
        param.to_local().copy_(value)
        optimizer.state[param]["exp_avg"].to_local().copy_(value / 2)
        optimizer.state[param]["exp_avg_sq"].to_local().copy_(value.square())
    return wrapped, optimizer
