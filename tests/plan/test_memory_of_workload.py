"""Memory of a step that no recipe describes, against the account of recipes that it also describes, and
against counts by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_sov import recipes
from megatron_sov.clusters.chips import CHIPS, Gpu, default_links
from megatron_sov.clusters.cluster import ClusterProfile
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.errors import UserError
from megatron_sov.obs.units import GIB
from megatron_sov.plan import host_memory
from megatron_sov.plan.held import stage_params
from megatron_sov.plan.host_memory import node_bytes, refuse_on_nodes, refuse_on_this_node
from megatron_sov.plan.memory import account
from megatron_sov.plan.memory_of_workload import account_of
from megatron_sov.plan.speed.shape import ModelShape
from megatron_sov.plan.speed.workload import Workload, of_run

H100, LINKS = CHIPS["h100"], default_links(CHIPS["h100"])


@pytest.mark.parametrize(("recipe", "settings"), [
    ("solar-open-102b", ["parallel.pp=4", "parallel.ep=8", "parallel.zero1=true"]),
    ("k-exaone-236b", ["parallel.pp=8", "parallel.ep=16", "parallel.tp=2", "parallel.sp=true"]),
    ("qwen3-8b", ["parallel.pp=2", "parallel.vpp=2", "train.recompute=selective",
                  'gpu.recompute_modules=["core_attn"]', "gpu.offload_modules=[]"]),
    ("qwen3-4b", ["parallel.zero1=true", "gpu.grad_dtype=bf16", "train.recompute=false",
                  "gpu.recompute_modules=[]"])])
def test_a_recipes_step_is_weighed_as_the_recipe(recipe: str, settings: list[str]) -> None:
    """But for norms of heads, which a shape does not tell, and for which queries are copied."""
    config = apply_settings(recipes.get(recipe), settings)
    phase = config.data.phases[0]
    workload = of_run(config, phase, 256, H100, LINKS)
    for stage in (0, config.parallel.pp - 1):
        said = account(replace(config, train=replace(
            config.train, global_batch_size=workload.global_batch_size)), 256, stage, phase.seq_len, 1.0)
        found = account_of(workload, stage)
        assert found.states == pytest.approx(said.states, rel=2e-4)
        assert found.total == pytest.approx(said.total, rel=0.04)


LLAMA = ModelShape(num_layers=80, hidden_size=8192, num_heads=64, head_dim=128, num_kv_heads=8,
                   vocab_size=128_256, dense_ffn_dim=28_672)
"""Llama 3 70B (arXiv 2407.21783, table 3)."""
DEEPSEEK = ModelShape(
    num_layers=61, hidden_size=7168, num_heads=128, head_dim=128, num_kv_heads=128, vocab_size=129_280,
    dense_ffn_dim=18_432, num_experts=256, num_experts_per_token=8, expert_ffn_dim=2048,
    num_shared_experts=1, num_dense_layers=3, num_mtp_layers=1, mtp_moe=True, q_lora_rank=1536,
    kv_lora_rank=512, rope_head_dim=64, v_head_dim=128)
"""DeepSeek-V3 (arXiv 2412.19437, section 4.2)."""


def test_weights_under_fsdp_are_shared() -> None:
    """70.6 billion: of 256 processes each keeps its part in bf16, gradient and three float32 numbers."""
    workload = Workload(LLAMA, H100, LINKS, 256, 8192, global_batch_size=256, sharding="fsdp",
                        recompute="full")
    found = account_of(workload)
    assert found.weights == pytest.approx(2 * 70.55e9 / 256, rel=0.01)
    assert found.optimizer == pytest.approx(12 * 70.55e9 / 256, rel=0.01)
    # two whole layers, weights and gradients
    layer = 70.55e9 / 80 * 6
    assert found.gradients == pytest.approx(4 * 70.55e9 / 256 + 2 * layer, rel=0.05)


@pytest.mark.parametrize("ep", [1, 8, 64])
def test_experts_under_fsdp_are_not_cut_twice(ep: int) -> None:
    """Each process keeps a part of all, however many of the cuts are expert parallelism's."""
    workload = Workload(DEEPSEEK, H100, LINKS, 1024, 4096, global_batch_size=1024, ep=ep, sharding="fsdp",
                        recompute="full")
    found = account_of(workload)
    assert found.weights == pytest.approx(2 * 685e9 / 1024, rel=0.02)
    # copies of 64 processes each
    assert account_of(replace(workload, sharding_group=64)).weights == pytest.approx(
        2 * 685e9 / 64, rel=0.02)


def test_latent_attention_and_prediction_layers_are_weighed() -> None:
    """671 billion, and 14 of the prediction layer: experts over 64 processes, 16 stages; by hand."""
    workload = Workload(DEEPSEEK, H100, LINKS, 2048, 4096, global_batch_size=15_360, pp=16, ep=64,
                        sharding="zero1", recompute="full")
    stages = [account_of(workload, stage) for stage in range(16)]
    assert sum(found.weights for found in stages) == pytest.approx(
        2 * ((671e9 - 653e9) + (653e9 + 11.5e9) / 64), rel=0.15)
    # every process updates its part of all
    assert sum(found.optimizer for found in stages) == pytest.approx(12 * 685e9 / 2048 * 16, rel=0.1)


def test_a_forward_pass_has_weights_and_what_passes() -> None:
    workload = Workload(LLAMA, H100, LINKS, 8, 4096, tp=8, sp=True, objective="forward")
    found = account_of(workload)
    assert found.gradients == found.optimizer == found.layer_inputs == 0
    assert 2 * 70.55e9 / 8 < found.total < 2.4 * 70.55e9 / 8


def test_layers_that_no_pipeline_divides_are_dealt_out() -> None:
    workload = Workload(replace(LLAMA, num_layers=61), H100, LINKS, 128, 4096, global_batch_size=256, tp=8,
                        pp=16)
    assert account_of(workload, 0).weights > account_of(workload, 14).weights > 0


# What an offloaded optimizer pins on a node, by hand; and what is refused with which share.


def offloaded(share: float, *settings: str) -> RunConfig:
    return apply_settings(recipes.get("solar-open-102b"), [f"gpu.optimizer_offload={share}", *settings])


def test_a_node_pins_16_bytes_for_each_weight_that_its_processes_update() -> None:
    config = offloaded(0.5, "parallel.pp=2")
    first, last = stage_params(config)
    # 64 processes: 32 for each stage share its dense weights, and 32 / ep each of the experts
    updated = [params.dense // 32 + params.experts // (32 // config.parallel.ep) for params in (first, last)]
    # whole parameters, until it is the share or more
    assert 1 <= node_bytes(config, 64, range(8, 16)) / (8 * int(updated[0] * 16 * 0.5)) < 1.01
    both = 4 * sum(int(count * 16 * 0.5) for count in updated)
    assert 1 <= node_bytes(config, 64, range(28, 36)) / both < 1.05


def test_a_share_that_no_node_has_room_for_is_refused_with_the_nearest_that_fits() -> None:
    config = offloaded(1.0)
    needs = node_bytes(config, 512, range(8))
    refuse_on_nodes(config, 512, 8, int(needs / 0.9) + 1, CHIPS["h200"])
    refuse_on_nodes(offloaded(0.0), 512, 8, 1, CHIPS["h200"])
    with pytest.raises(UserError, match=r"^gpu\.optimizer_offload = 1 pins .* GiB of host memory for the 8 "
                                        r"processes of a node, and a run may take .* that it has; the "
                                        r"nearest share that fits: --set gpu\.optimizer_offload=0\.46$"):
        refuse_on_nodes(config, 512, 8, int(0.55 * needs), CHIPS["h200"])
    refuse_on_nodes(offloaded(0.46), 512, 8, int(0.55 * needs), CHIPS["h200"])
    with pytest.raises(UserError):
        refuse_on_nodes(offloaded(0.47), 512, 8, int(0.55 * needs), CHIPS["h200"])
    with pytest.raises(UserError, match="no share fits both host and GPU"):
        refuse_on_nodes(config, 512, 8, needs // 2, Gpu("Tiny", GIB))


def test_a_start_goes_by_what_the_machine_has_available(monkeypatch: pytest.MonkeyPatch) -> None:
    config = offloaded(1.0)
    for name, value in {"RANK": 11, "WORLD_SIZE": 512, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    needs = node_bytes(config, 512, range(8, 16))
    available = SimpleNamespace(available=2 * needs)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: available)
    refuse_on_this_node(config, None)
    available.available = int(0.55 * needs)
    with pytest.raises(UserError, match=r"that it has available; the nearest share that fits: "
                                        r"--set gpu\.optimizer_offload=0\.46$"):
        refuse_on_this_node(config, None)


@pytest.mark.parametrize("memory, num_bytes", [
    ("0", 0), ("500G", 500 << 30), ("2t", 2 << 40), ("1000", 1000 << 20), ("64MB", 64 << 20), ("all", 0)])
def test_a_profile_has_memory_as_slurm_writes_it(memory: str, num_bytes: int) -> None:
    assert dataclasses.replace(ClusterProfile("x"), memory=memory).memory_bytes == num_bytes
