"""Jobs for ranks: train with our trainer, and continue with Megatron-Core's own model, optimizer, scheduler
and pipeline."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, silu

from tests.convert.library_written import save_state

VOCAB_SIZE, PADDED_VOCAB_SIZE, BATCH_SIZE = 368, 384, 4
SIZES = ("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8",
         "model.init_std=0.2", "model.tied_embeddings=false", "model.rope_theta=1e6", "model.norm_eps=1e-5")
MODELS = {"tiny-qwen3": ("model.dense_ffn_dim=48",), "tiny-solar-open": (
    "model.num_experts=4", "model.num_experts_per_token=2", "model.expert_ffn_dim=16",
    "model.seq_aux_loss_coeff=0")}
MODELS["tiny-qwen3-moe"] = MODELS["tiny-solar-open"]
"""Recipe -> settings of its models."""
TRAINING = ("optim.lr=0.01", "optim.min_lr=0.001", "optim.warmup_steps=2", "optim.schedule=cosine",
            "optim.clip_grad=0", "optim.eps=1e-4", "train.steps=24", f"train.global_batch_size={BATCH_SIZE}",
            "train.micro_batch_size=1", "train.async_save=false", "guards.skip=false",
            "guards.hang_timeout_s=0", "data.packing=concat")
"""Settings that both sides compute alike: no clipping (Megatron-Core sums the norm in float32), no
padding (Megatron-Core counts it as routed tokens), and an epsilon far above rounding errors."""
ARGUMENTS = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
    "group_query_attention": True, "ffn_hidden_size": 48, "swiglu": True, "normalization": "RMSNorm",
    "norm_epsilon": 1e-5, "qk_layernorm": True, "add_bias_linear": False, "position_embedding_type": "rope",
    "rotary_base": 1_000_000, "untie_embeddings_and_output_weights": True, "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64, "global_batch_size": BATCH_SIZE}
"""Arguments of Megatron-LM for the model of tiny-qwen3."""
Row = tuple[torch.Tensor, ...]
"""Tokens, labels, weights, and first tokens of documents."""


def train_ours(data: str, run: str, recipe: str, precision: str, first: int, steps: int) -> list[float]:
    """Train our trainer on one rank, save after step `first`, and return the losses of the `steps` steps
    after it, whose rows are in RUN/batches.pt."""
    from megatron_sov.train.loop import train_step

    trainer = build_ours(data, run, recipe, precision)
    batches: list[list[Row]] = []
    collect = trainer.objective.collect

    def record(policy: Any, step: int) -> Any:
        batch = collect(policy, step)
        batches.append([tuple(tensor.clone() for tensor in (m.inputs.tokens, m.labels, m.weights,
                                                            m.inputs.cu_seqlens))
                        for m in batch.micro_batches])
        return batch

    trainer.objective.collect = record
    losses = []
    for step in range(first + steps):
        if step == first:
            trainer.save()
        result = train_step(trainer)
        assert result is not None
        losses.append(result.loss)
    torch.save(batches[first:], Path(run) / "batches.pt")
    trainer.close()
    return losses[first:]


def resume_ours(data: str, run: str, recipe: str, precision: str, checkpoint: str, num_skipped: int,
                steps: int) -> list[float]:
    """Resume our trainer from an imported checkpoint after some batches of the data order, and return the
    losses of the next steps."""
    from megatron_sov.train.loop import train_step

    trainer = build_ours(data, run, recipe, precision)
    trainer.resume(Path(checkpoint))
    for _ in range(num_skipped):
        trainer.batches.skip()
    results = [train_step(trainer) for _ in range(steps)]
    trainer.close()
    return [result.loss for result in results if result is not None]


def build_ours(data: str, run: str, recipe: str, precision: str) -> Any:
    """Return our trainer of a model, on one rank."""
    from tests.tiny import tiny_trainer

    return tiny_trainer(data, *SIZES, *MODELS[recipe], *TRAINING, f"train.precision={precision}", run=run,
                        recipe=recipe)


def continue_stock(folder: str, batches: str, recipe: str, precision: str, layout: dict[str, Any],
                   distributed: bool, saved_after: int = 0, saved: str = "") -> list[float]:
    """Load weights, optimizer and schedule with Megatron-Core, train on the rows in `batches` (`train_ours`)
    and return the losses; save to `saved` after the step `saved_after` (0: never). With `distributed`,
    Megatron's distributed optimizer shards the state."""
    from megatron.core import parallel_state
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_sov.engine.parallel.world import join_world
    from megatron_sov.model.config import ParallelConfig

    join_world(ParallelConfig(**layout))
    dtype = {"fp64": torch.float64, "fp32": torch.float32}[precision]
    model, optimizer = build_stock(recipe, dtype, layout, distributed)
    # placeholder learning rates: loading replaces them by the checkpoint's
    scheduler = OptimizerParamScheduler(optimizer, 0.0, 1.0, 0.0, 1, 2, "constant", 0.1, 0.1, 1, "constant")
    load_stock(Path(folder), model, optimizer, scheduler)
    losses, run = [], get_forward_backward_func()
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    for rows in torch.load(batches):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        # Megatron-Core's own division by the number of tokens rounds to float32.
        local, num_targets = rows[rank::size], sum(row[2].sum().double() for row in rows)
        outputs = run(forward_step_func=partial(forward_step, len(rows) / num_targets),
                      data_iterator=iter(local), model=[model], num_microbatches=len(local),
                      seq_length=len(rows[0][0]), micro_batch_size=1, forward_only=False)
        assert optimizer.step()[0]
        scheduler.step(increment=BATCH_SIZE)
        sums = torch.zeros(2, dtype=torch.float64)
        if parallel_state.is_pipeline_last_stage():
            sums = torch.stack([output["sums"] for output in outputs]).sum(0)
        dist.all_reduce(sums)  # ranks of tensor parallelism add equal sums and counts
        losses.append(float(sums[0] / sums[1]))
        if len(losses) == saved_after:
            save_stock(Path(saved), model, optimizer, scheduler)
    return losses


def forward_step(factor: torch.Tensor, rows: Any, model: Any) -> Any:
    """Return a row's logits, and a function that computes its loss; Megatron-Core averages over rows."""
    tokens, labels, weights, bounds = next(rows)
    index = torch.arange(len(tokens))
    document = torch.searchsorted(bounds[1:].long(), index, right=True)
    is_hidden = (index[None] > index[:, None]) | (document[None] != document[:, None])
    logits = model(tokens[None], index[None], is_hidden[None, None])

    def compute_loss(output: torch.Tensor) -> Any:
        losses = cross_entropy(output[0, :, :VOCAB_SIZE], labels, reduction="none")
        total = (losses * weights).sum()
        return total * factor, {"sums": torch.stack([total.detach().double(), weights.sum().double()])}

    return logits, compute_loss


def build_stock(recipe: str, dtype: torch.dtype, layout: dict[str, Any], distributed: bool) -> Any:
    """Return Megatron-Core's `GPTModel` in its data-parallel wrapper, and its optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer import TransformerConfig

    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16,
               "moe_shared_expert_intermediate_size": 16, "moe_router_score_function": "sigmoid",
               "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 1e-3,
               "moe_router_topk_scaling_factor": 1.0, "moe_router_load_balancing_type": "none",
               "moe_token_dispatcher_type": "alltoall", "moe_router_dtype": "fp64"}
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        ffn_hidden_size=48, gated_linear_unit=True, activation_func=silu, normalization="RMSNorm",
        add_bias_linear=False, layernorm_epsilon=1e-5, qk_layernorm=recipe == "tiny-qwen3",
        use_cpu_initialization=True, params_dtype=dtype, pipeline_dtype=dtype, bias_dropout_fusion=False,
        masked_softmax_fusion=False, bias_activation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        cuda_graph_scope=[], finalize_model_grads_func=finalize_model_grads, batch_p2p_comm=False,
        tensor_model_parallel_size=layout.get("tp", 1), sequence_parallel=layout.get("sp", False),
        pipeline_model_parallel_size=layout.get("pp", 1), expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=1, **(experts if recipe == "tiny-solar-open" else {}))
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        if recipe == "tiny-solar-open":  # as with Transformer Engine, which fuses no norm before experts
            layer.submodules.sharded_state_dict_keys_map = {
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    model = GPTModel(config, spec, vocab_size=PADDED_VOCAB_SIZE, max_sequence_length=64,
                     rotary_base=1_000_000, position_embedding_type="rope", parallel_output=False,
                     share_embeddings_and_output_weights=False,
                     pre_process=parallel_state.is_pipeline_first_stage(),
                     post_process=parallel_state.is_pipeline_last_stage()).to(dtype)
    # Megatron-Core computes rotary frequencies in float32.
    model.rotary_pos_emb.inv_freq = 1e6 ** -(torch.arange(0, 8, 2, dtype=dtype) / 8)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    buffers = None
    if distributed:
        buffers = DistributedOptimizer.compute_full_param_layout(
            list(model.parameters()), None, parallel_state.get_data_parallel_world_size(), settings,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size())
    wrapped = DistributedDataParallel(config, settings, model, full_param_layout=buffers)
    return wrapped, get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=0.01, min_lr=0.001, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
        adam_eps=1e-4, clip_grad=0.0, params_dtype=dtype, use_distributed_optimizer=distributed), [wrapped],
        use_gloo_process_groups=False)


def load_stock(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Load a checkpoint as Megatron-LM does."""
    from megatron.core import dist_checkpointing

    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text())
    folder /= f"iter_{iteration:07d}"
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    declared = {"model": model.module.sharded_state_dict(metadata=metadata)}
    declared["optimizer"] = optimizer.sharded_state_dict(declared["model"], is_loading=True,
                                                         metadata=metadata)
    state = dist_checkpointing.load(declared, str(folder), verify_integrity=True)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])


def save_stock(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Save a training as Megatron-LM does, with the arguments of the loaded one."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    state = {"model": model.module.sharded_state_dict(metadata=metadata),
             "opt_param_scheduler": scheduler.state_dict(), "iteration": 12,
             "args": argparse.Namespace(**ARGUMENTS)}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=metadata)
    save_state(state, folder / "iter_0000012", metadata)
