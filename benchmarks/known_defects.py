"""Reproduce silent layout defects of stock Megatron-Core, and prove that training here does not have them.

Usage: python benchmarks/known_defects.py [NUMBER ...]

Each defect of `data/known_defects.yaml` gets up to three results. stock: a number of Megatron-Core's on one
rank and on each of two ranks, which should be equal. here: `plan --prove` at a layout that would show the
defect. planted: the first difference that the proof finds with the same mistake in our code.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from planted_faults import Fault, mutated

from layout_proof import cpu_shims

cpu_shims.prepare_without_gpu()
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.distributed.finalize_model_grads import (  # noqa: E402
    _allreduce_non_tensor_model_parallel_grads as sum_gradients)
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.gated_delta_net import common, gdn  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, process_mtp_loss  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from layout_proof.simulated_world import SimulatedRanks  # noqa: E402
from megatron_sov.engine.parallel.world import form_groups  # noqa: E402
from megatron_sov.model import recipes  # noqa: E402
from megatron_sov.model.config import ParallelConfig, apply_settings  # noqa: E402
from megatron_sov.proof.layout_proof import prove_run  # noqa: E402

MASKS, LOSSES = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1.0], [5.0]])
"""Learned tokens of two ranks, and the loss of each of a rank's tokens."""
LOGITS, LABEL = torch.arange(8.0).view(1, 1, 8), torch.tensor([[7]])
CONFIG = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "use_cpu_initialization": True,
          "softmax_type": "learnable", "mtp_num_layers": 1, "mtp_loss_scaling_factor": 1.0}


# Each function returns a number that Megatron-Core computes on a rank; it should be the same on one rank and
# on each of two. `masks` and `losses` are the rank's rows of MASKS and LOSSES.


def smoothed_loss(config: Any, group: Any, masks: Any, losses: Any) -> torch.Tensor:
    logits = LOGITS.chunk(group.size(), -1)[group.rank()].clone()
    return tensor_parallel.vocab_parallel_cross_entropy(logits, LABEL, 0.1, group)


def loss_of_gathered_logits(config: Any, group: Any, masks: Any, losses: Any) -> torch.Tensor:
    return tensor_parallel.vocab_parallel_cross_entropy(LOGITS.clone(), LABEL, 0.0, group)


def sinks_in_the_norm(config: Any, group: Any, masks: Any, losses: Any) -> int:
    [sinks] = DotProductAttention(config, 1, None, "self").parameters()
    return len(sinks) * tensor_parallel.param_is_not_tensor_parallel_duplicate(sinks, group)


def four_local_tokens(config: Any, group: Any, masks: Any, losses: Any) -> torch.Tensor:
    routes = torch.ones(4 // group.size(), 2, dtype=torch.bool)
    return group.size() * moe_utils.get_tokens_per_expert_and_token_count(routes, group, 2, True)[1]


def sum_of_output_norm_gradients(config: Any, group: Any, masks: Any, losses: Any) -> torch.Tensor:
    with mock.patch.object(common, "HAVE_FLA", True), mock.patch.object(gdn, "chunk_gated_delta_rule", id):
        layer: Any = gdn.GatedDeltaNet(config, common.GatedDeltaNetSubmodules(
            tensor_parallel.ColumnParallelLinear, WrappedTorchNorm, tensor_parallel.RowParallelLinear),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    layer.ddp_config = mock.Mock(use_megatron_fsdp=False)
    for parameter in layer.parameters():
        parameter.main_grad = torch.full_like(parameter, 1 / group.size())
    sum_gradients([layer], config, group)
    return layer.out_norm.weight.main_grad[0]


def masked_gradient(config: Any, group: Any, masks: Any, losses: Any) -> torch.Tensor:
    theta = torch.ones((), requires_grad=True)
    outputs: Any = (theta * losses * masks).sum(), masks.sum(), {}
    forward_step_calc_loss(mock.Mock(vp_stage=None), theta, lambda _: outputs, config, None, False, 1, [],
                           group.size(), True)[0].backward()
    torch.distributed.all_reduce(theta.grad, group=group)
    return theta.grad / group.size()


def prediction_scale_over_router_scale(config: Any, group: Any, masks: Any, losses: Any) -> Any:
    config.num_moe_experts = 2
    masked_gradient(config, group, masks, losses)
    router_scale: Any = moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale
    return MTPLossAutoScaler.main_loss_backward_scale / router_scale


def prediction_gradient(config: Any, group: Any, masks: Any, losses: Any) -> torch.Tensor:
    theta: Any = torch.ones((), requires_grad=True)
    config.calculate_per_token_loss = True
    MTPLossAutoScaler.main_loss_backward_scale = torch.ones(())
    process_mtp_loss(torch.zeros(8, len(masks), 1), masks, masks, lambda states, **_: (states, None), None,
                     None, False, lambda labels, logits: theta * losses, config).sum().backward()
    sums = torch.stack([theta.grad, masks.sum()])
    torch.distributed.all_reduce(sums, group=group)
    return sums[0] / sums[1]


def run_stock(name: str, axis: str) -> str:
    """Return the numbers of a function above on one rank and on two ranks of `axis`."""
    def run_rank(_: Any) -> float:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        config = TransformerConfig(**CONFIG, tensor_model_parallel_size=groups.tp.size())
        group = getattr(groups, axis)
        own_rows = slice(group.rank(), group.rank() + 1) if group.size() == 2 else slice(2)
        return float(globals()[name](config, group, MASKS[own_rows], LOSSES[own_rows]))

    parallel = ParallelConfig(tp=2) if axis == "tp" else ParallelConfig(cp=2)
    one = SimulatedRanks(1).run(form_groups(ParallelConfig()), run_rank)
    two = SimulatedRanks(2).run(form_groups(parallel), run_rank)
    return f"{name.replace('_', ' ')} {one[0]:.4g} on one rank, {two[0]:.4g} and {two[1]:.4g} at {axis} 2"


def prove(run: str) -> str:
    """Prove the layout `RECIPE RANKS SETTING ...`; return the outcome and the first difference, if any."""
    recipe, num_ranks, *settings = run.split()
    verdict = prove_run(apply_settings(recipes.get(recipe), [
        *settings, "train.global_batch_size=8", "train.micro_batch_size=1"]), int(num_ranks))[1]
    if verdict.places:
        return f"{verdict.outcome}, {verdict.places[0]}"
    return f"{verdict.outcome}, {verdict.largest:.1e} apart at most, {verdict.messages:,} messages"


DEFECTS = yaml.safe_load((Path(__file__).parent / "data/known_defects.yaml").read_text(encoding="utf-8"))
for title, row in DEFECTS.items():
    if sys.argv[1:] and title.split()[0] not in sys.argv[1:]:
        continue
    print(f"{title} ({row['code']})")
    if "stock" in row:
        print(f"  stock: {run_stock(*row['stock'].split())}")
    print(f"  here: {row['here']}: {prove(row['here'])}", flush=True)
    if "planted" in row:
        with mutated(fault := Fault("source", **row["planted"])):
            print(f"  planted: {fault}: {prove(row['here'])}", flush=True)
