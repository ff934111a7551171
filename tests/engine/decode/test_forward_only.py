"""A whole optimizer step: expert counts and biases, recomputation, and the dtype of gradient reduction."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_sov.engine.decode import forward_only
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.expert_load import ExpertLoad
from megatron_sov.engine.model.logprobs import build_head
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from tests.tiny import tiny_model

SELECTIVE = ["train.recompute=selective", 'gpu.recompute_modules=["core_attn", "mlp", "moe"]']


@dataclasses.dataclass
class Row:
    """A micro-batch of 32 tokens: inputs, labels [32], and weights of the tokens' losses [32]."""

    inputs: ModelInputs
    labels: torch.Tensor
    weights: torch.Tensor


def compute_gradients(config: Any, model: Any, optimizer: Any, rows: list[Row]) -> float:
    """Inside ranks: compute the gradients of a step with 121 targets (four rows of 32 tokens, with 7 tokens
    of padding). Return the sum of all losses."""

    def loss(hidden: torch.Tensor, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        head = build_head(model, 7)
        total = -sum((head.logprobs(h, row.labels) * row.weights).sum()
                     for h in hidden.chunk(1 + config.model.num_mtp_layers))
        return total / 121, total.detach().double()

    optimizer.zero_grad()
    dp_rank, dp_size = collectives.get_data_rank()
    parts = forward_only.run_pipeline(optimizer.wrapped, rows[dp_rank::dp_size], loss, 32, forward_only=False)
    local = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
    return float(collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local)))


def take_step(recipe: str, layout: dict[str, Any], settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Inside ranks: take one optimizer step on four micro-batches of four documents each.

    Returns:
        "loss" (sum), gradient "norm", tokens per expert of each layer ("load"), dtype of reduced "gradients",
        update "rate" and values of the expert "bias" of each layer.
    """
    config, model = tiny_model(recipe, "model.num_experts=4", "model.seq_aux_loss_coeff=0.01",
                               "optim.eps=1e-3", *settings, layout=layout)
    optimizer = Optimizer(model, config.optim, gpu=config.gpu)
    load = ExpertLoad(model)
    model.config.finalize_model_grads_func = load.finalize_gradients
    model.config.routing_step.seq_len, model.config.routing_step.num_sequences = 16, 8
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(4):
        bounds = torch.tensor([0, 5 + number, 16, 25, 32], dtype=torch.int32)
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds.tolist())])
        padding = torch.arange(32) >= (25 if number == 3 else 32)
        rows.append(Row(ModelInputs(torch.randint(96, (32,), generator=generator), positions,
                                    bounds, 16, padding),
                        torch.randint(96, (32,), generator=generator), (~padding).float()))

    loss = compute_gradients(config, model, optimizer, rows)
    norm = optimizer.step(1e-3)
    biases = torch.zeros(config.model.num_layers + 1, config.model.num_experts, dtype=torch.float64)
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            biases[module.layer_number] = module.expert_bias.double()
    num_processes = torch.distributed.get_world_size()
    biases = collectives.all_reduce_world(biases) / (num_processes // layout.get("pp", 1))
    return {"loss": loss, "norm": norm, "load": load.gather().tolist(),
            "gradients": str(optimizer.wrapped[0].buffers[0].grad_dtype),
            "rate": config.model.router_bias_update_rate, "bias": biases.tolist()}


@pytest.mark.distributed
def test_biases_follow_counts_without_padding_and_recomputed_passes_have_the_same_bits(ranks, job) -> None:
    (fully_recomputed,), (partly_recomputed,), (stored,) = ranks(*(
        job(__file__, "take_step", 1, {"recipe": "tiny-k-exaone", "layout": {}, "settings": settings})
        for settings in (["train.recompute=true"], SELECTIVE, [])))
    assert fully_recomputed == partly_recomputed == stored
    assert sum(stored["load"][-1]) == 121 * 2  # 128 tokens minus 7 of padding, two experts each
    for counts, biases in zip(stored["load"], stored["bias"][1:], strict=True):
        mean = sum(counts) / len(counts)
        assert biases == pytest.approx([stored["rate"] * ((c < mean) - (c > mean)) for c in counts])


@pytest.mark.distributed
def test_gradients_summed_in_bf16_are_those_of_fp32_rounded(ranks, job) -> None:
    (fp32,), (bf16,) = ranks(*(
        job(__file__, "take_step", 1, {"recipe": "tiny-solar-open", "layout": {},
                                       "settings": ["train.precision=bf16", *settings]})
        for settings in ([], ["gpu.grad_dtype=bf16"])))
    assert (fp32["gradients"], bf16["gradients"]) == ("torch.float32", "torch.bfloat16")
    assert bf16["loss"] == fp32["loss"]
    assert bf16["norm"] != fp32["norm"] and bf16["norm"] == pytest.approx(fp32["norm"], rel=1e-2)


def record_offloading_plans() -> dict[str, Any]:
    """Inside a rank: alternate passes without and with gradients, with a group of offloaded activations.

    Returns Megatron-Core's number of cached chunks and its index before each forward pass.
    """
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    config, model = tiny_model("tiny-qwen3", layout={})
    model.config.fine_grained_activation_offloading = True
    optimizer = Optimizer(model, config.optim, gpu=config.gpu)
    rows = forward_only.DocumentBatch([[1, 2, 3]], torch.device("cpu"))
    plans = []

    def loss(hidden: torch.Tensor, row: Any) -> tuple[torch.Tensor, None]:
        group = offload.FineGrainedActivationOffloadingInterface(True, hidden, "group")
        hidden = offload.fine_grained_offloading_group_start(hidden, "group")
        hidden = group.group_offload(hidden)
        manager = offload.PipelineOffloadManager.get_instance()
        plans.append([len(manager._cached_chunks_forward), manager._cached_chunks_index_forward])
        return hidden.sum(), None

    for count, is_training in ((3, False), (2, True), (3, False), (2, True)):
        with torch.set_grad_enabled(is_training):
            chunks = optimizer.wrapped if is_training else model.chunks
            forward_only.run_pipeline(chunks, [rows] * count, loss, len(rows.inputs.tokens),
                                      forward_only=not is_training)
    return {"plans": plans}


@pytest.mark.distributed
def test_passes_without_gradients_leave_the_plan_of_offloading_alone(ranks: Any, job: Any) -> None:
    (result,), = ranks(job(__file__, "record_offloading_plans", 1))
    assert result["plans"] == [[0, 0]] * 3 + [[1, 0], [2, 0]] + [[2, 0]] * 3 + [[2, 1], [2, 2]]
