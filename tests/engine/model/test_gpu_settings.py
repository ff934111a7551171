"""Every setting reaches its Megatron-Core field, and settings that a machine cannot use are refused."""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.engine.model import attention_kernels, gpu_settings
from megatron_sov.engine.model.gpu_settings import (
    FUSIONS, KernelContext, check_fp8_support, disable_quantization, expert_settings, fp8_settings,
    gradient_settings, keep_ends_in_bf16, moment_settings, transformer_settings)
from megatron_sov.engine.parallel import gpu_libraries
from megatron_sov.model.config import GpuConfig, RunConfig, TrainConfig, apply_settings


@pytest.fixture(autouse=True)
def simulate_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine, which is not installed, reports a kernel for every query."""
    monkeypatch.setattr(attention_kernels, "_query_backends", lambda *query: (False, ""))
    for name in gpu_settings.TE_ATTENTION_VARIABLES.values():  # set by Megatron-Core with each model
        monkeypatch.delenv(name, raising=False)


# FP8: Megatron-Core's settings, refusals before the start, checkpoints of experts

def test_each_recipe_has_megatrons_names() -> None:
    assert fp8_settings(TrainConfig()) == {}
    assert fp8_settings(TrainConfig(fp8="blockwise", fp8_bf16_layers_at_end=2)) == {
        "fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": False,
        "moe_router_padding_for_quantization": False}
    fp4 = fp8_settings(TrainConfig(fp8="nvfp4", fp8_pad_routed_tokens=True))
    assert (fp4["fp4"], fp4["fp4_recipe"]) == ("e2m1", "nvfp4")
    assert fp4["moe_router_padding_for_quantization"] and "fp8" not in fp4


def test_bf16_layers_are_counted_in_the_whole_model() -> None:
    """Three of four layers at the start, independent of stages: Megatron-Core's validation would refuse
    them at `parallel.pp` = 2, so they are set after it."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = SimpleNamespace(num_layers=4)
    keep_ends_in_bf16(config, TrainConfig(fp8="blockwise", fp8_bf16_layers_at_start=3))
    assert [is_first_last_bf16_layer(config, layer) for layer in range(4)] == [True, True, True, False]
    keep_ends_in_bf16(config, TrainConfig(fp8="blockwise"))
    assert not any(is_first_last_bf16_layer(config, layer) for layer in range(4))


def simulate_gpu(monkeypatch: pytest.MonkeyPatch, fp8_recipes: set[str]) -> None:
    """Simulate Transformer Engine on a GPU that supports these FP8 recipes."""
    def build_check(recipe: str) -> Callable[..., Any]:
        available = recipe in fp8_recipes
        reason = "" if available else "compute capability 10.0 or higher required"
        return lambda return_reason=False: (available, reason) if return_reason else available

    te = ModuleType("transformer_engine.pytorch")
    te.__dict__.update(
        is_fp8_available=build_check("tensorwise"), is_fp8_block_scaling_available=build_check("blockwise"),
        is_mxfp8_available=build_check("mxfp8"), is_nvfp4_available=build_check("nvfp4"))
    package = ModuleType("transformer_engine")
    package.pytorch = te  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)


def test_the_error_for_an_unsupported_recipe_names_supported_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch, {"tensorwise", "blockwise"})  # as on Hopper
    check_fp8_support(TrainConfig(fp8="blockwise"), te=True)
    for fp8 in ("mxfp8", "nvfp4"):
        with pytest.raises(UserError, match=f"{fp8} cannot run on this GPU .*10.0 or higher required.*"
                                            "tensorwise or blockwise or none"):
            check_fp8_support(TrainConfig(fp8=fp8), te=True)


def test_a_cpu_is_refused_before_anything_starts(run_checked, packed_data, tmp_path: Path) -> None:
    result = run_checked("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run",
                         str(tmp_path / "run"), "--set", "train.precision=bf16", "--set",
                         "train.fp8=tensorwise", "--set", "model.vocab_size=368", "--set", "train.steps=2",
                         code=2)
    assert "train.fp8 = tensorwise needs an NVIDIA GPU with Transformer Engine" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_quantization_is_disabled_in_a_context_and_restored() -> None:
    config = SimpleNamespace(fp8="e4m3", fp4=None, moe_router_padding_for_quantization=True)
    with pytest.raises(KeyError), disable_quantization(config):
        assert (config.fp8, config.fp4, config.moe_router_padding_for_quantization) == (None, None, False)
        raise KeyError
    assert (config.fp8, config.fp4, config.moe_router_padding_for_quantization) == ("e4m3", None, True)


ROOT = Path(__file__).parents[3]
SETTINGS_WITHOUT_FIELD = {"gc_every_steps", "profile_first_step", "profile_last_step", "profiler",
                          "peak_tflops",
                          "optimizer_offload", "linear_attention", "expert_imbalance", "expert_spill"}
"""Settings without a field of Megatron-Core; each has its own test."""
ROUTER_GRAPHS = 'gpu.cuda_graphs=["moe_router"]'
CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "gpu.attention": (["gpu.attention=flash"], {"attention_backend": "flash"}),
    "gpu.rope_fusion": (["gpu.rope_fusion=off"], {"apply_rope_fusion": False}),
    "gpu.router_fusion": (["gpu.router_fusion=on"], {"moe_router_fusion": True}),
    "gpu.permute_fusion": (["gpu.permute_fusion=off"], {"moe_permute_fusion": False}),
    "gpu.swiglu_fusion": (["gpu.swiglu_fusion=off"], {"bias_activation_fusion": False}),
    "gpu.grad_accumulation_fusion": (["gpu.grad_accumulation_fusion=off"],
                                     {"gradient_accumulation_fusion": False}),
    "gpu.cuda_graphs": ([ROUTER_GRAPHS], {
        "cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe_router"],
        "cuda_graph_warmup_steps": 0}),
    "gpu.force_even_routing": (["gpu.force_even_routing=on"], {"moe_router_force_load_balancing": True}),
    "gpu.shared_expert_overlap": (["gpu.shared_expert_overlap=on"], {"moe_shared_expert_overlap": True}),
    "gpu.offload_modules": (['gpu.offload_modules=["moe_act"]'], {
        "fine_grained_activation_offloading": True, "offload_modules": ["moe_act"]}),
    "gpu.recompute_modules": (["train.recompute=selective",
                               'gpu.recompute_modules=["moe_act", "layernorm"]'], {
                                   "recompute_granularity": "selective",
                                   "recompute_modules": ["moe_act", "layernorm"]}),
    "train.recompute": (["train.recompute=true"], {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "parallel.expert_dispatcher": (["parallel.expert_dispatcher=hybridep"], {
        "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}),
    "parallel.expert_overlap": (["parallel.expert_overlap=micro_batches"], {
        "overlap_moe_expert_parallel_comm": True}),
    "parallel.delay_weight_grads": (["parallel.delay_weight_grads=true"], {"delay_wgrad_compute": True}),
    "gpu.exchange_sms": (["gpu.exchange_sms=32"], {"moe_flex_dispatcher_num_sms": 32}),
    "gpu.grad_dtype": (["gpu.grad_dtype=bf16"], {"grad_reduce_in_fp32": False}),
    "gpu.moment_dtype": (["gpu.moment_dtype=bf16"], {
        "use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16, "store_param_remainders": False, "fp8_recipe": "tensorwise"}),
    "gpu.pad_buckets": (["gpu.pad_buckets=on"], {"pad_buckets_for_high_nccl_busbw": True}),
    "gpu.nccl_user_buffers": (["gpu.nccl_user_buffers=on"], {"nccl_ub": True}),
    }
"""Setting -> (changes, the fields of Megatron-Core's config that they set)."""


def change_config(changes: list[str]) -> RunConfig:
    """Return a changed config of a model with shared and routed experts, in bf16 with plain RoPE, to which
    every GPU setting applies."""
    return apply_settings(recipes.get("tiny-solar-open"),
                          ["train.precision=bf16", "model.yarn=null", *changes])


def build_megatron_fields(config: RunConfig, te: bool) -> dict[str, Any]:
    """Return the fields of Megatron-Core's config, with or without Transformer Engine."""
    kernels = KernelContext(te, config.model, config.parallel)
    fields = (transformer_settings(config.gpu, config.train, kernels) | expert_settings(config.gpu, kernels)
              | gradient_settings(config.gpu, config.parallel, bf16=True) | moment_settings(config.gpu))
    return fields | {"attention_backend": fields["attention_backend"].name}


@pytest.mark.each("setting", CHANGES)
def test_each_setting_arrives_in_its_fields(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    changes, expected = CHANGES[setting]
    before = build_megatron_fields(change_config([]), te=True)
    after = build_megatron_fields(change_config(changes), te=True)
    changed_fields = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name: after[name] for name in changed_fields} == expected


def test_each_setting_has_a_case() -> None:
    settings = {f.name for f in dataclasses.fields(GpuConfig)} - SETTINGS_WITHOUT_FIELD
    assert {f"gpu.{name}" for name in settings} == {name for name in CHANGES if name.startswith("gpu.")}


def test_the_page_lists_field_and_proof_of_each_setting() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()
            if line.startswith(("| `gpu.", "| `train.", "| `parallel."))]
    assert all(len(row) == 3 for row in rows)
    parsed_rows = [(re.findall(r"`([a-z_.0-9]+)`", setting_cell), fields_cell, proof_cell)
                   for setting_cell, fields_cell, proof_cell in rows]
    expected_settings = {f"gpu.{f.name}" for f in dataclasses.fields(GpuConfig)} | CHANGES.keys()
    listed_settings = sorted(name for settings, _, _ in parsed_rows for name in settings)
    assert listed_settings == sorted({"parallel.pipeline_layout"} | expected_settings)
    for settings, fields_cell, proof_cell in parsed_rows:
        fields = {field for setting in settings if setting in CHANGES for field in CHANGES[setting][1]
                  if field != "recompute_granularity"}
        assert [field for field in fields if f"`{field}`" not in fields_cell] == [], settings
        assert re.search(r"not yet|tests/|\.md\)|CPUs", proof_cell), f"{settings}: names no proof"
        assert [f for f in re.findall(r"`(tests/[^`]+)`", proof_cell) if not (ROOT / f).is_file()] == []


def test_fusions_are_off_without_transformer_engine() -> None:
    fields = build_megatron_fields(change_config([]), te=False)
    assert not any(fields[fusion.field] for fusion in FUSIONS) and fields["attention_backend"] == "auto"
    assert fields["grad_reduce_in_fp32"] and fields["moe_token_dispatcher_type"] == "alltoall"
    # `plan` reads all settings of a run on GPUs on a machine without Transformer Engine
    all_changes = [change for changes, _ in CHANGES.values() for change in changes]
    fields = build_megatron_fields(change_config(all_changes), te=False)
    assert not any(fields[fusion.field] for fusion in FUSIONS)


def test_linear_attention_kernels_are_used_if_importable_and_nondeterminism_is_allowed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def uses_kernels(*changes: str, te: bool = True) -> bool:
        config = apply_settings(recipes.get("tiny-solar-open2"), ["train.precision=bf16", *changes])
        return bool(gpu_settings.resolve_auto_settings(config, te)["linear_attention"])

    fla_config = apply_settings(recipes.get("tiny-solar-open2"), ["train.precision=bf16",
                                                                  "gpu.linear_attention=fla"])
    assert not uses_kernels(), "fla is not installed here"
    with pytest.raises(SettingsError, match=r"attention does not work here \(Module.*fla"):
        gpu_settings.check_gpu_settings(fla_config, te=True)
    monkeypatch.setattr(gpu_settings, "find_fla_problem", lambda: "")
    assert uses_kernels() and not uses_kernels(te=False)
    assert not uses_kernels("gpu.linear_attention=torch") and not uses_kernels("train.deterministic=true")
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    gpu_settings.check_gpu_settings(fla_config, te=True)


def test_keys_that_are_too_wide_for_the_kernels_are_read_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels assert key heads of at most 256 channels."""
    monkeypatch.setattr(gpu_settings, "find_fla_problem", lambda: "")
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    for width, uses_kernels in ((256, True), (512, False)):
        config = apply_settings(recipes.get("tiny-solar-open2"), [
            "train.precision=bf16", f"model.linear_attention.key_head_dim={width}"])
        assert gpu_settings.resolve_auto_settings(config, te=True)["linear_attention"] == uses_kernels
    with pytest.raises(SettingsError, match="up to 256 channels"):
        gpu_settings.check_gpu_settings(apply_settings(config, ["gpu.linear_attention=fla"]), te=True)


@contextmanager
def import_anew(package: str, find_problem: Any) -> Iterator[None]:
    """Forget the cached result of `find_problem` before and after the body, then also the package."""
    find_problem.cache_clear()
    try:
        yield
    finally:
        find_problem.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


@pytest.mark.each(("version", "message"), [
    ("0.4.2", "version 0.4.2 is older than 0.6"), ("0.5.1", "version 0.5.1 is older than 0.6"),
    ("", "version unknown"), ("0.6.0", ""), ("0.10.0", ""), ("1.0.dev1", "")])
def test_older_kernels_are_refused(version: str, message: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fla/ops/kda").mkdir(parents=True)
    (tmp_path / "fla/ops/kda/__init__.py").write_text("def chunk_kda(**kwargs): pass\n")
    (tmp_path / "fla/ops/__init__.py").write_text("")
    (tmp_path / "fla/__init__.py").write_text(f"__version__ = {version!r}\n" if version else "")
    monkeypatch.syspath_prepend(str(tmp_path))
    with import_anew("fla", gpu_libraries.find_fla_problem):
        problem = gpu_libraries.find_fla_problem()
        assert problem.startswith(message) and bool(problem) == bool(message)


def test_a_run_records_the_resolved_auto_settings() -> None:
    def resolve(*changes: str, te: bool = True) -> dict[str, Any]:
        return gpu_settings.resolve_auto_settings(change_config(list(changes)), te=te)

    resolved: dict[str, Any] = {fusion.setting: fusion.setting != "router_fusion" for fusion in FUSIONS}
    resolved["linear_attention"] = False
    assert resolve() == resolved | {"attention": "auto"}
    assert resolve("parallel.cp=2") == resolved | {"rope_fusion": False, "attention": "local"}
    assert resolve("parallel.cp=2", "gpu.attention=fused")["attention"] == "fused", (
        "each process attends over whole rows with half of the heads")
    assert set(resolve(te=False).values()) == {False, "local"}


@pytest.mark.each(("changes", "te", "environment", "keys"), [
    ("gpu.swiglu_fusion=on", False, {}, "gpu.swiglu_fusion"),
    ("gpu.attention=fused", False, {}, "gpu.attention"),
    ("gpu.shared_expert_overlap=on", False, {}, "gpu.shared_expert_overlap"),
    ('train.recompute=selective gpu.recompute_modules=["layernorm"]', False, {}, "gpu.recompute_modules"),
    ('gpu.offload_modules=["core_attn"]', False, {}, "gpu.offload_modules"),
    (ROUTER_GRAPHS, False, {}, "gpu.cuda_graphs"),
    (ROUTER_GRAPHS, True, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "gpu.cuda_graphs"),
    ("gpu.moment_dtype=bf16", False, {}, "gpu.moment_dtype"),
    ("gpu.optimizer_offload=0.5", False, {}, "gpu.optimizer_offload"),
    ("gpu.nccl_user_buffers=on", False, {}, "gpu.nccl_user_buffers"),
    ("parallel.expert_dispatcher=deepep", False, {}, "parallel.expert_dispatcher"),
    ("gpu.attention=flash", True, {}, "gpu.attention"),
    ("", True, {"NVTE_FUSED_ATTN": "0"}, "gpu.attention"),
    ("gpu.attention=fused", True, {"NVTE_FLASH_ATTN": "1"}, "gpu.attention"),
    ('gpu.offload_modules=["core_attn"]', True, {}, "gpu.offload_modules"),
    ("gpu.nccl_user_buffers=on", True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
     "gpu.nccl_user_buffers"),
    # Megatron-Core lacks the function if Transformer Engine is missing or old
    ("gpu.router_fusion=on", True, {}, "gpu.router_fusion"),
    ("gpu.router_fusion=on", False, {}, "gpu.router_fusion"),
    ("parallel.expert_dispatcher=deepep", True, {}, "parallel.expert_dispatcher"),
    ("gpu.linear_attention=fla", True, {}, "gpu.linear_attention"),
])
def test_unsupported_gpu_settings_are_refused(changes: str, te: bool, environment: dict[str, str], keys: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: te)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        gpu_settings.check_gpu_settings(change_config(changes.split()), te)
    assert [key for _, key in error.value.codes] == keys.split()


def test_overlap_that_frees_inputs_of_bf16_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_settings, "find_deep_ep_problem", lambda name: "")
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    overlap = ["parallel.ep=2", "parallel.expert_overlap=micro_batches", "train.fp8=mxfp8",
               "parallel.expert_dispatcher=hybridep"]
    gpu_settings.check_gpu_settings(change_config(overlap), te=True)
    with pytest.raises(UserError, match=r"parallel\.expert_overlap = .*micro_batches"):
        gpu_settings.check_gpu_settings(change_config([*overlap, "train.fp8_bf16_layers_at_end=1"]), te=True)


@pytest.mark.parametrize(("import_code", "message"), [
    # the main branch since April 2026, and its assertion about NCCL at import
    ("", r"AttributeError: module 'deep_ep\.utils' has no attribute 'EventOverlap'"),
    ("raise AssertionError('Invalid NCCL versions: a v.s. b')", "AssertionError: Invalid NCCL versions: a v"),
])
def test_a_broken_deep_ep_is_reported_with_its_own_error(import_code: str, message: str, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deep_ep"
    package.mkdir()
    (package / "__init__.py").write_text(f"{import_code}\nclass Buffer: pass\n")
    (package / "utils.py").write_text("class EventHandle: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    with import_anew("deep_ep", gpu_libraries.find_deep_ep_problem):
        with pytest.raises(UserError, match=rf"expert_dispatcher .* DeepEP does not import \({message}.*; "
                                            r"install the commit that containers/install\.sh names"):
            gpu_settings.check_gpu_settings(change_config(["parallel.expert_dispatcher=deepep"]), te=True)
        gpu_libraries.hide_broken_deep_ep()  # otherwise importing Megatron-Core fails
        with pytest.raises(ImportError):
            from deep_ep.utils import EventOverlap  # noqa: F401


@pytest.mark.each(("capability", "cudnn", "changes", "is_local", "message"), [
    ((9, 0), 92500, "", False, ""), ((10, 0), 92500, "", False, ""),
    # rows with many documents exceed the limit of the deterministic fused kernel
    ((9, 0), 92500, "train.deterministic=true", True, "in every row on this GPU"),
    ((10, 0), 91800, "train.deterministic=true", True, "on this GPU before cuDNN 91801"),
    ((10, 0), 91801, "train.deterministic=true", True, ""),
    # Gemma's head size
    ((9, 0), 91900, "model.head_dim=256", False, ""), ((10, 0), 92500, "model.head_dim=256", False, ""),
    ((10, 0), 92401, "model.head_dim=256", True, "no fused kernel of cuDNN 92401 trains heads of 256"),
])
def test_attention_that_cannot_be_fused_is_our_own(capability: tuple[int, int], cudnn: int, changes: str,
                                                   is_local: bool, message: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """`message`: the error if the setting demands fused attention; "": the setting works."""
    monkeypatch.setattr(gpu_settings, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    config = change_config(changes.split())
    resolved = gpu_settings.resolve_auto_settings(config, te=True)
    assert resolved["attention"] == ("local" if is_local else "auto")
    gpu_settings.check_gpu_settings(config, te=True)
    fused_config = change_config([*changes.split(), "gpu.attention=fused"])
    if not message:
        return gpu_settings.check_gpu_settings(fused_config, te=True)
    with pytest.raises(UserError, match=f'gpu.attention = "fused" cannot be.*{message}'):
        gpu_settings.check_gpu_settings(fused_config, te=True)


def test_routing_that_the_kernels_do_not_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(transformer_engine, "fused_topk_with_score_function", lambda: None)
    gpu_settings.check_gpu_settings(change_config(["gpu.router_fusion=on"]), te=True)
    one_expert = "model.num_experts_per_token=1"
    assert [build_megatron_fields(change_config(changes), te=True)["moe_router_fusion"]
            for changes in ([], [one_expert], ["gpu.router_fusion=off"])] == [True, False, False]
    with pytest.raises(UserError, match=r"model\.num_experts_per_token = 1"):
        gpu_settings.check_gpu_settings(change_config(["gpu.router_fusion=on", one_expert]), te=True)
