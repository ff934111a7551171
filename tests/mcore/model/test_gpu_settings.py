"""Each setting arrives in its field of the library, and what cannot be on a machine is refused there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_sov import recipes
from megatron_sov.config import GpuConfig, RunConfig, apply_settings
from megatron_sov.errors import UserError
from megatron_sov.mcore.model import gpu_settings
from megatron_sov.mcore.model.gpu_settings import (
    FUSIONS,
    LIBRARY_FIELDS,
    Here,
    expert_settings,
    gradient_settings,
    moment_settings,
    transformer_settings,
)
from megatron_sov.settings import SettingsError

ROOT = Path(__file__).parents[3]
OURS_ALONE = {"gc_every_steps", "profile_first_step", "profile_last_step", "peak_tflops",
              "optimizer_offload"}
"""Settings that no field of the library stands behind; each has a test of its own."""
CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "gpu.attention": (["gpu.attention=flash"], {"attention_backend": "flash"}),
    "gpu.rope_fusion": (["gpu.rope_fusion=off"], {"apply_rope_fusion": False}),
    "gpu.router_fusion": (["gpu.router_fusion=on"], {"moe_router_fusion": True}),
    "gpu.permute_fusion": (["gpu.permute_fusion=off"], {"moe_permute_fusion": False}),
    "gpu.swiglu_fusion": (["gpu.swiglu_fusion=off"], {"bias_activation_fusion": False}),
    "gpu.grad_accumulation_fusion": (["gpu.grad_accumulation_fusion=off"],
                                     {"gradient_accumulation_fusion": False}),
    "gpu.shared_expert_overlap": (["gpu.shared_expert_overlap=on"], {"moe_shared_expert_overlap": True}),
    "gpu.offload_modules": (['gpu.offload_modules=["moe_act"]'], {
        "fine_grained_activation_offloading": True, "offload_modules": ["moe_act"]}),
    "gpu.recompute_modules": (["train.recompute=selective",
                               'gpu.recompute_modules=["moe_act", "layernorm"]'], {
        "recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]}),
    "train.recompute": (["train.recompute=true"], {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "parallel.expert_dispatcher": (["parallel.expert_dispatcher=hybridep"], {
        "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}),
    "gpu.grad_dtype": (["gpu.grad_dtype=bf16"], {"grad_reduce_in_fp32": False}),
    "gpu.moment_dtype": (["gpu.moment_dtype=bf16"], {
        "use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16, "store_param_remainders": False, "fp8_recipe": "tensorwise"}),
    "gpu.pad_buckets": (["gpu.pad_buckets=on"], {"pad_buckets_for_high_nccl_busbw": True}),
    "gpu.nccl_user_buffers": (["gpu.nccl_user_buffers=on"], {"nccl_ub": True}),
}
"""Setting -> a change of it, and what the library's fields are then."""


def config_with(changes: list[str]) -> RunConfig:
    """Return a recipe that has every module: experts with a shared one, in bf16, with plain rotations."""
    return apply_settings(recipes.get("tiny-solar-open"),
                          ["train.precision=bf16", "model.yarn=null", *changes])


def fields(config: RunConfig, te: bool) -> dict[str, Any]:
    """Return the library's fields of a config, with Transformer Engine or without."""
    here = Here(te, config.model, config.parallel)
    found = (transformer_settings(config.gpu, config.train, here) | expert_settings(config.gpu, here)
             | gradient_settings(config.gpu, bf16=True) | moment_settings(config.gpu))
    return found | {"attention_backend": found["attention_backend"].name}


@pytest.mark.parametrize("setting", CHANGES)
def test_each_setting_arrives_in_its_fields(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    changes, expected = CHANGES[setting]
    before, after = fields(config_with([]), te=True), fields(config_with(changes), te=True)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name: after[name] for name in changed} == expected
    named = {name.rpartition(".")[2] for name in LIBRARY_FIELDS[setting]}
    assert changed - named <= {"recompute_granularity"} and named >= changed & named != set()


def test_the_table_is_whole_and_its_fields_exist() -> None:
    classes = {c.__name__: {f.name for f in dataclasses.fields(c)}
               for c in (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)}
    for names in LIBRARY_FIELDS.values():
        for cls, _, field in (name.rpartition(".") for name in names):
            assert field in classes[cls]
    ours = {f"gpu.{f.name}" for f in dataclasses.fields(GpuConfig)} - {f"gpu.{name}" for name in OURS_ALONE}
    assert ours == {name for name in LIBRARY_FIELDS if name.startswith("gpu.")}
    assert CHANGES.keys() == LIBRARY_FIELDS.keys()


def test_the_page_says_of_each_setting_where_it_goes_and_how_it_is_proven() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()
            if line.startswith(("| `gpu.", "| `train.", "| `parallel."))]
    assert all(len(row) == 3 for row in rows)
    named = [(re.findall(r"`([a-z_.0-9]+)`", row[0]), row[1], row[2]) for row in rows]
    settings = sorted(name for names, _, _ in named for name in names)
    everything = {f"gpu.{f.name}" for f in dataclasses.fields(GpuConfig)} | LIBRARY_FIELDS.keys()
    assert settings == sorted({"parallel.pipeline_layout"} | everything)
    for names, where, proof in named:
        fields = {name.rpartition(".")[2] for setting in names for name in LIBRARY_FIELDS.get(setting, ())}
        assert [field for field in fields if f"`{field}`" not in where] == [], names
        assert re.search(r"not yet|tests/|\.md\)|CPUs", proof), f"{names}: says not how it is proven"
        assert [f for f in re.findall(r"`(tests/[^`]+)`", proof) if not (ROOT / f).is_file()] == []


def test_without_transformer_engine_auto_is_off_and_the_library_builds_its_config() -> None:
    found = fields(config_with([]), te=False)
    assert not any(found[fusion.field] for fusion in FUSIONS) and found["attention_backend"] == "auto"
    assert found["grad_reduce_in_fp32"] and found["moe_token_dispatcher_type"] == "alltoall"
    # as `plan` reads the settings of a GPU's run
    everything = [change for changes, _ in CHANGES.values() for change in changes]
    assert not any(fields(config_with(everything), te=False)[fusion.field] for fusion in FUSIONS)


def test_with_transformer_engine_auto_is_on_where_model_and_layout_can() -> None:
    found = fields(config_with([]), te=True)
    assert [f.setting for f in FUSIONS if not found[f.field]] == ["router_fusion"], "on only where asked for"
    yarn = 'model.yarn={"factor": 4.0, "original_max_position_tokens": 512}'
    assert fields(config_with([yarn]), te=True)["apply_rope_fusion"], "its factor is in the softmax"
    assert not fields(config_with(["parallel.cp=2"]), te=True)["apply_rope_fusion"]


def test_a_run_tells_what_auto_came_to() -> None:
    fused = {fusion.setting: fusion.setting != "router_fusion" for fusion in FUSIONS}
    assert gpu_settings.resolved(config_with([]), te=True) == fused | {"attention": "auto"}
    assert gpu_settings.resolved(config_with(["parallel.cp=2"]), te=True) == fused | {
        "rope_fusion": False, "attention": "local"}
    assert gpu_settings.resolved(config_with(["model.attention_softcap=50"]), te=True) == fused | {
        "attention": "local"}
    assert set(gpu_settings.resolved(config_with([]), te=False).values()) == {False, "local"}


@pytest.mark.parametrize(("changes", "te", "environment", "keys"), [
    ("gpu.swiglu_fusion=on", False, {}, "gpu.swiglu_fusion"),
    ("gpu.attention=fused", False, {}, "gpu.attention"),
    ("gpu.shared_expert_overlap=on", False, {}, "gpu.shared_expert_overlap"),
    ('train.recompute=selective gpu.recompute_modules=["layernorm"]', False, {}, "gpu.recompute_modules"),
    ('gpu.offload_modules=["core_attn"]', False, {}, "gpu.offload_modules"),
    ("gpu.moment_dtype=bf16", False, {}, "gpu.moment_dtype"),
    ("gpu.optimizer_offload=0.5", False, {}, "gpu.optimizer_offload"),
    ("gpu.nccl_user_buffers=on", False, {}, "gpu.nccl_user_buffers"),
    ("parallel.expert_dispatcher=deepep", False, {}, "parallel.expert_dispatcher"),
    ("gpu.attention=flash model.attention_sinks=true", True, {}, "gpu.attention"),
    ("gpu.attention=flash", True, {}, "gpu.attention"),
    ("gpu.attention=fused model.attention_softcap=50", True, {}, "gpu.attention"),
    ("", True, {"NVTE_FUSED_ATTN": "0"}, "gpu.attention"),
    ("gpu.attention=fused", True, {"NVTE_FLASH_ATTN": "1"}, "gpu.attention"),
    ('gpu.offload_modules=["core_attn"]', True, {}, "gpu.offload_modules"),
    ("gpu.nccl_user_buffers=on", True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
     "gpu.nccl_user_buffers"),
    # the library has none of its functions where Transformer Engine is not installed, or is an old one
    ("gpu.router_fusion=on", True, {}, "gpu.router_fusion"),
    ("gpu.router_fusion=on", False, {}, "gpu.router_fusion"),
    ("parallel.expert_dispatcher=deepep", True, {}, "parallel.expert_dispatcher"),
])
def test_what_cannot_be_here_is_refused(changes: str, te: bool, environment: dict[str, str], keys: str,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: te)
    for name in gpu_settings.TE_ATTENTION_VARIABLES.values():  # the library sets them with a model
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        gpu_settings.refuse(config_with(changes.split()), te)
    assert [key for _, key in refused.value.codes] == keys.split()


def test_sinks_over_packed_rows_need_new_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import utils
    from packaging.version import Version

    for name in ("FLASH", "FUSED", "UNFUSED"):  # the library sets them where it has built a model
        monkeypatch.delenv(f"NVTE_{name}_ATTN", raising=False)
    asked, sinks = "model.attention_sinks=true", r"attends packed rows with sinks .*; install a newer one"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91702)
    with pytest.raises(UserError, match=f"cannot be: no fused kernel of cuDNN 91702 {sinks}"):
        gpu_settings.refuse(config_with([asked]), te=True)
    for other in ("gpu.attention=local", "gpu.attention=unfused", "parallel.cp=2"):
        gpu_settings.refuse(config_with([asked, other]), te=True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91800)
    gpu_settings.refuse(config_with([asked]), te=True)
    monkeypatch.setattr(utils, "get_te_version", lambda: Version("2.12.0+5671fd36"))
    with pytest.raises(UserError, match=f"cannot be: Transformer Engine 2.12.0.5671fd36 never {sinks}"):
        gpu_settings.refuse(config_with([asked]), te=True)


def test_routing_that_the_kernels_do_not_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(transformer_engine, "fused_topk_with_score_function", lambda: None)
    gpu_settings.refuse(config_with(["gpu.router_fusion=on"]), te=True)
    with pytest.raises(UserError, match=r"gpu\.router_fusion = .* does not go with model\.norm_topk_prob = "
                                        r"True and model\.num_experts_per_token = 1: the kernels divide"):
        gpu_settings.refuse(config_with(["gpu.router_fusion=on", "model.num_experts_per_token=1"]), te=True)


def test_nothing_is_refused_where_nothing_is_asked() -> None:
    gpu_settings.refuse(config_with([]), te=False)
