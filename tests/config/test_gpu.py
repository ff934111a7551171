"""Rules of the use of GPUs that hold on any machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.config import GpuConfig, ParallelConfig, RunConfig
from megatron_sov.config.optim import GroupConfig

Small = Callable[..., RunConfig]
SELECTIVE = {"recompute": "selective"}
DENSE = {"num_experts": 0, "dense_ffn_dim": 64}


@pytest.mark.parametrize(("gpu", "train", "parallel", "model", "sentence"), [
    ({"recompute_modules": ("mlp",)}, {}, {}, DENSE,
     "gpu.recompute_modules = ['mlp'] must name modules exactly when train.recompute = selective"),
    ({}, SELECTIVE, {}, {}, "gpu.recompute_modules = [] must name modules exactly when"),
    ({"recompute_modules": ("moe",)}, SELECTIVE, {}, DENSE,
     "gpu.recompute_modules names moe, and the model has no"),
    ({"recompute_modules": ("shared_experts",)}, SELECTIVE, {}, {"num_shared_experts": 0},
     "gpu.recompute_modules names shared_experts, and model.num_shared_experts = 0"),
    ({"recompute_modules": ("moe", "moe_act")}, SELECTIVE, {}, {},
     "gpu.recompute_modules names moe and moe_act"),
    ({"recompute_modules": ("mlp",)}, SELECTIVE, {}, {},
     "gpu.recompute_modules names mlp, and the model has no"),
    ({"recompute_modules": ("shared_experts",), "shared_expert_overlap": "on"}, SELECTIVE, {}, {},
     "gpu.recompute_modules names shared_experts, which gpu.shared_expert_overlap = on cannot recompute"),
    ({"offload_modules": ("core_attn",)}, {"recompute": True}, {}, {},
     "gpu.offload_modules needs stored activations, and train.recompute = True"),
    ({"offload_modules": ("attn_proj",)}, {}, {}, {},
     "gpu.offload_modules names attn_proj without core_attn"),
    ({"offload_modules": ("expert_fc1",)}, {}, {}, DENSE,
     "gpu.offload_modules names expert_fc1, and the model has"),
    ({"offload_modules": ("mlp_norm",)}, {}, {}, DENSE, "gpu.offload_modules names mlp_norm, and the model"),
    ({"recompute_modules": ("layernorm",)}, SELECTIVE, {}, DENSE,
     "gpu.recompute_modules names layernorm, and the model has no"),
    ({"grad_dtype": "bf16"}, {"precision": "fp32"}, {}, {},
     "gpu.grad_dtype = bf16 needs train.precision = bf16"),
    ({"moment_dtype": "bf16"}, {"precision": "bf16"}, {}, {},
     "gpu.moment_dtype = bf16 needs train.precision = bf16 and parallel.zero1 = True, which are bf16 and "
     "False"),
    ({"optimizer_offload": 0.5}, {"precision": "bf16"}, {}, {},
     "gpu.optimizer_offload = 0.5 needs train.precision = bf16 and parallel.zero1 = True, which are bf16 and "
     "False"),
    ({"optimizer_offload": 1.5}, {}, {}, {}, "gpu.optimizer_offload = 1.5 must be a share from 0 to 1"),
    ({"optimizer_offload": 0.5, "moment_dtype": "bf16"}, {"precision": "bf16"}, {"zero1": True}, {},
     "gpu.optimizer_offload = 0.5 keeps moments in float32, and gpu.moment_dtype = bf16"),
    ({"permute_fusion": "on"}, {}, {}, DENSE, "gpu.permute_fusion = on sorts tokens by expert"),
    ({"rope_fusion": "on"}, {}, {"cp": 2}, {}, "gpu.rope_fusion = on knows no rows that are cut"),
    ({"attention": "flash"}, {}, {"cp": 2}, {}, "gpu.attention = flash: under parallel.cp = 2"),
    ({"shared_expert_overlap": "on"}, {}, {}, {"num_shared_experts": 0},
     "gpu.shared_expert_overlap = on needs a"),
    ({"shared_expert_overlap": "on"}, {}, {"ep": 2, "expert_dispatcher": "deepep"}, {},
     "gpu.shared_expert_overlap = on needs parallel.expert_dispatcher = alltoall, which is deepep"),
    ({}, {}, {"expert_dispatcher": "deepep"}, {},
     "parallel.expert_dispatcher = deepep needs parallel.ep x parallel.etp > 1"),
    ({}, {"precision": "fp32"}, {"expert_dispatcher": "hybridep", "ep": 2}, {},
     "parallel.expert_dispatcher = hybridep carries bf16 alone, and train.precision = fp32"),
    ({"pad_buckets": "on"}, {}, {}, {}, "gpu.pad_buckets = on needs parallel.zero1 = True"),
    ({"gc_every_steps": -1}, {}, {}, {}, "gpu.gc_every_steps = -1 must not be negative"),
    ({"profile_first_step": 3, "profile_last_step": 2}, {}, {}, {},
     "gpu.profile_first_step = 3 and gpu.profile_last_step = 2 must be steps in order"),
    ({"peak_tflops": -1.0}, {}, {}, {}, "gpu.peak_tflops = -1.0 must be a number that is not negative"),
])
def test_every_rule_is_one_sentence(gpu: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any],
                                    model: dict[str, Any], sentence: str, small: Small) -> None:
    config = small(**model)
    config = replace(config, gpu=GpuConfig(**gpu), parallel=ParallelConfig(**parallel),
                     train=replace(config.train, **train))
    (problem,) = config.problems(2)
    assert problem.startswith(sentence)


def test_muon_stays_on_the_gpu(small: Small) -> None:
    base = small()
    config = replace(base, gpu=GpuConfig(optimizer_offload=1.0), parallel=ParallelConfig(zero1=True),
                     train=replace(base.train, precision="bf16"))
    assert config.problems(2) == []
    for optim in (replace(config.optim, name="muon"),
                  replace(config.optim, groups=(GroupConfig("decoder.*", optimizer="muon"),))):
        (problem,) = replace(config, optim=optim).problems(2)
        assert problem.startswith("gpu.optimizer_offload = 1.0 is for AdamW, and the settings under optim ")
