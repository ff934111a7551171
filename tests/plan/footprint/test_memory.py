"""The memory account of a process: items and their settings, the output head and autograd, the page."""

import dataclasses
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.model.families.count import count_params
from megatron_sov.plan.footprint import gpu_capacity
from megatron_sov.plan.footprint.activations import estimate_saved, list_layer_kinds
from megatron_sov.plan.footprint.gpu_capacity import count_node_bytes, refuse_on_nodes, refuse_on_this_node
from megatron_sov.plan.footprint.memory import build_account
from megatron_sov.work.clusters.chips import CHIPS, Gpu
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.clusters.units import GIB
from tests.head_config import head_config
from tests.plan.stage_counts import count_stage_params

ROOT = Path(__file__).parents[3]
CHUNK_TOKENS, VOCAB_SIZE = 128, 8192


def build_config(recipe: str, **settings: Any) -> RunConfig:
    """Return a recipe with changed settings; `train__fp8="none"` sets train.fp8."""
    return apply_settings(recipes.get(recipe),
                          [f"{name.replace('__', '.')}={value}" for name, value in settings.items()])


def measure_adapted_head() -> list[int]:
    """Return [bytes allocated by merging an adapter into the head, predicted bytes]."""

    class AllocationRecorder(TorchDispatchMode):
        """Records the bytes of each result of an operation that is not a view of an argument."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operation(*args, **(kwargs or {}))
            storage = result.untyped_storage()
            if not any(isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == storage.data_ptr()
                       for a in args):
                self.sizes[storage.data_ptr()] = storage.nbytes()
            return result

    config = build_config("tiny-qwen3", lora__rank=4, lora__targets='["lm_head"]', train__precision="bf16")
    world.join_world(ParallelConfig())
    model = build_model(config.model, config.parallel, config.train, config.gpu, config.lora)
    with AllocationRecorder() as allocated:
        head = model.head_weight
    assert head.requires_grad
    # in addition to the head's gradient, which exists without adapters too
    accounts = [build_account(c, 1, 0, 64).head for c in (config, apply_settings(config, ["lora.rank=0"]))]
    return [sum(allocated.sizes.values()), accounts[0] - accounts[1]]


def test_an_adapted_head_is_counted_with_its_merged_copy(ranks: Any, job: Any) -> None:
    (((measured, predicted),),) = ranks(job(__file__, "measure_adapted_head", 1, {}))
    assert measured == predicted > 0


def measure_divergence_peaks(beta: float, top_k: int) -> list[int]:
    """Return peak bytes of [divergence, cross-entropy, with capped logits] of two chunks, with gradients."""

    def measure_peak(compute: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = compute()
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        del result  # was not to be freed while profiled
        return int(max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))

    world.join_world(ParallelConfig())
    tokens = 2 * CHUNK_TOKENS
    states, weight = torch.randn(tokens, 1, 8).requires_grad_(), torch.randn(VOCAB_SIZE, 8).requires_grad_()
    teacher = (TeacherTopK(torch.arange(top_k).expand(tokens, top_k), torch.full((tokens, top_k), -1.0))
               if top_k else TeacherStates(torch.randn(tokens, 8), torch.randn(VOCAB_SIZE, 8)))
    head, ones = Head(weight, head_config(), CHUNK_TOKENS, VOCAB_SIZE), torch.ones(tokens)
    labels = torch.zeros(tokens, dtype=torch.int64)
    capped = replace(head, logits_softcap=3.0)
    return [measure_peak(lambda: head.divergence(states, teacher, {"sum": ones}, Divergence(beta))),
            measure_peak(lambda: head.cross_entropy(states, labels, {"sum": ones})),
            measure_peak(lambda: capped.cross_entropy(states, labels, {"sum": ones}))]


def test_divergence_peak_memory_equals_the_account(ranks: Any, job: Any) -> None:
    config = build_config("tiny-qwen3", train__precision="fp32", train__head_chunk_tokens=CHUNK_TOKENS,
                          model__vocab_size=VOCAB_SIZE)

    def head_bytes(*settings: str) -> int:
        return build_account(apply_settings(config, list(settings)), 1, 0, 1024).head

    cases = [(0.0, 0), (0.5, 0), (1.0, 0), (0.5, 2)]
    result = ranks(*(job(__file__, "measure_divergence_peaks", 1, {"beta": beta, "top_k": top_k})
                     for beta, top_k in cases))
    cap_bytes = head_bytes("model.logits_softcap=3") - head_bytes()
    for (beta, top_k), ((peak, plain, capped),) in zip(cases, result, strict=True):
        predicted = head_bytes("objective.name=distill", f"distillation.beta={beta}",
                               f"distillation.top_k={top_k}") - head_bytes()
        assert peak - plain == pytest.approx(predicted, rel=0.05), f"beta {beta}, top-k {top_k}"
        assert capped - plain == pytest.approx(cap_bytes, rel=0.05)


@pytest.mark.each(("change", "item", "factor"), [
    ({"parallel__cp": 2}, "layer_inputs", 0.5), ({"parallel__pp": 2}, "layer_inputs", 1.0),
    ({"train__precision": "fp32"}, "layer_inputs", 2.0),
    ({"gpu__grad_dtype": "bf16"}, "gradients", 1 / 2), ({"parallel__ep": 16}, "imbalance", 1.0),
    # without a prediction layer, which is dense, every layer is alike
    ({"train__recompute": "false"}, "one_layer", 0.6),
    ({"parallel__tp": 2, "parallel__sp": "true"}, "nccl", 7 / 5),
    ({"train__micro_batch_size": 2}, "layer_inputs", 2.0)])
def test_each_item_follows_its_setting(change: dict[str, Any], item: str, factor: float) -> None:
    base = {"parallel__ep": 2, "parallel__zero1": "false", "train__global_batch_size": 512}
    before, after = (build_account(build_config("solar-open-102b", **(base | c)), 16, 0, 131072)
                     for c in ({}, change))
    assert getattr(after, item) / getattr(before, item) == pytest.approx(factor, rel=0.1)


def test_items_sum_to_the_device_total() -> None:
    config = build_config("k-exaone-236b", parallel__ep=16, gpu__optimizer_offload=0.5, optim__name="adamw",
                          gpu__grad_dtype="bf16", train__fp8="mxfp8")
    account = build_account(config, 64, 0, 4096)
    assert account.on_host > 0 and account.head > account.one_layer > 0
    items = account.components()
    # the head is the peak; a layer with uneven experts needs less
    assert items.pop("one_layer") == items.pop("teacher") == items.pop("imbalance") == 0
    assert all(value > 0 for value in items.values())
    assert account.total == sum(items.values())
    assert account.allocated == account.total - account.nccl - account.fragmentation
    # float32 gradients of the parameters updated here
    assert account.update == 4 * account.optimizer // 12


def test_of_a_layer_and_the_head_the_larger_counts() -> None:
    short, long = (build_account(build_config("solar-open-102b", parallel__ep=8), 64, 0, tokens)
                   for tokens in (1024, 32_768))
    assert short.components()["head"] == short.head > short.one_layer
    assert long.components()["one_layer"] == long.one_layer > long.head
    for account in (short, long):
        # the smaller one counts neither in the sum nor in fragmentation, a twentieth of activations
        larger = max(account.one_layer, account.head)
        assert account.fragmentation == (account.layer_inputs + larger + account.imbalance) // 20
        assert account.total == sum(account.components().values())


def test_models_without_rotary_embedding_have_no_angle_tables() -> None:
    """The tables of 1M tokens have a GiB: cosine and sine of 128 channels in float32."""
    for recipe, angles in (("solar-open2-250b-extend", 0), ("k-exaone-236b", 2**20 * 128 * 2 * 4)):
        config = apply_settings(recipes.get(recipe), ["parallel.pp=1"])
        assert build_account(config, 64, 0, 2**20).angles == angles, recipe


def test_uneven_routing_is_on_top() -> None:
    config = build_config("solar-open-102b", parallel__ep=8, train__recompute="false")
    even, uneven = (build_account(config, 64, 0, 4096, imbalance) for imbalance in (1.0, 1.5))
    assert even.imbalance == 0
    (kind,) = set(list_layer_kinds(config.model))
    layer = estimate_saved(config, 4096, kind)
    # half of the routed tokens of each layer in addition; what one layer needs is less than the head
    assert uneven.imbalance == 48 * layer.routed // 2 and even.head > 1.5 * even.one_layer
    # at 8 times the mean tokens one layer needs more than the head, and the excess counts
    far = build_account(apply_settings(config, ["train.recompute=true"]), 64, 0, 4096, 8.0)
    assert far.components()["imbalance"] == (
        far.one_layer + 7 * (layer.routed + 3 * layer.expert_input) - far.head)
    alone = build_account(build_config("solar-open-102b", parallel__ep=1), 64, 0, 4096, 1.5)
    assert alone.imbalance == 0  # a process with all experts receives all tokens


def test_spilled_experts_wait_at_their_limit_and_pass_through_a_layer() -> None:
    config = build_config("solar-open-102b", parallel__ep=8, train__recompute="false", gpu__expert_spill=1.2)
    (kind,) = set(list_layer_kinds(config.model))
    layer = estimate_saved(config, 4096, kind)
    found = build_account(config, 64, 0, 4096, 8.0)
    peak = found.one_layer + 7 * 3 * layer.expert_input + int(6.8 * layer.routed)
    assert found.imbalance == pytest.approx(48 * 0.2 * layer.routed + peak - found.head, abs=2)
    assert build_account(config, 64, 0, 4096) == build_account(config, 64, 0, 4096, 2.0)


def test_the_page_equals_the_script_output() -> None:
    script = ROOT / "docs" / "generate_memory.py"
    code = "import sys, runpy; sys.stdout.write(runpy.run_path(sys.argv[1])['build_page']())"
    completed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(script)], capture_output=True,
                               text=True, check=True)
    assert completed.stdout.endswith((ROOT / "docs" / "memory.md").read_text(encoding="utf-8"))


def test_of_a_frozen_model_adapters_alone_have_gradients_and_state() -> None:
    config = build_config("tiny-qwen3", lora__rank=4, train__precision="fp32")
    m = config.model
    q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    # an adapter of rank 4 has 4 x (input + output) parameters: for queries and output, keys and values, the
    # MLP
    sides = 2 * (m.hidden_size + q) + 2 * (m.hidden_size + kv) + 3 * (m.hidden_size + m.dense_ffn_dim)
    count, whole = 4 * m.num_layers * sides, count_params(m).total
    account = build_account(config, 1, 0, 64)
    assert account.weights == 4 * (whole + count)
    assert (account.gradients, account.optimizer) == (4 * count, 8 * count)
    full = build_account(build_config("tiny-qwen3", train__precision="fp32"), 1, 0, 64)
    assert (full.gradients, full.optimizer) == (4 * whole, 8 * whole) and full.head > account.head


# Pinned bytes of an offloaded optimizer by hand, and refusals with a fitting share.

def build_offloaded_config(share: float, *settings: str) -> RunConfig:
    return apply_settings(recipes.get("solar-open-102b"),
                          ["train.fp8=none", f"gpu.optimizer_offload={share}", *settings])


def test_offloaded_optimizer_pins_16_bytes_per_updated_weight() -> None:
    config = build_offloaded_config(0.5, "parallel.pp=2")
    first, last = count_stage_params(config)
    # 64 processes: 32 for each stage share its dense weights, and 32 / ep each of the experts
    updated = [params.dense // 32 + params.experts // (32 // config.parallel.ep) for params in (first, last)]
    # whole parameters are offloaded until their share is reached
    assert 1 <= count_node_bytes(config, 64, range(8, 16)) / (8 * int(updated[0] * 16 * 0.5)) < 1.01
    both = 4 * sum(int(count * 16 * 0.5) for count in updated)
    assert 1 <= count_node_bytes(config, 64, range(28, 36)) / both < 1.05


def test_an_oversized_offload_share_is_refused_with_a_fitting_one() -> None:
    config = build_offloaded_config(1.0)
    needs = count_node_bytes(config, 512, range(8))
    refuse_on_nodes(config, 512, 8, int(needs / 0.9) + 1, CHIPS["h200"])
    refuse_on_nodes(build_offloaded_config(0.0), 512, 8, 1, CHIPS["h200"])
    with pytest.raises(UserError, match=r"^gpu\.optimizer_offload = 1 pins .* GiB of host memory for the 8 "
                                        r"processes of a node, and a run may take .* that it has; the "
                                        r"nearest share that fits: --set gpu\.optimizer_offload=0\.46$"):
        refuse_on_nodes(config, 512, 8, int(0.55 * needs), CHIPS["h200"])
    refuse_on_nodes(build_offloaded_config(0.46), 512, 8, int(0.55 * needs), CHIPS["h200"])
    with pytest.raises(UserError):
        refuse_on_nodes(build_offloaded_config(0.47), 512, 8, int(0.55 * needs), CHIPS["h200"])
    with pytest.raises(UserError, match="no share fits both host and GPU"):
        refuse_on_nodes(config, 512, 8, needs // 2, Gpu("Tiny", GIB))


def test_start_checks_available_machine_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_offloaded_config(1.0)
    for name, value in {"RANK": 11, "WORLD_SIZE": 512, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    needs = count_node_bytes(config, 512, range(8, 16))
    available = SimpleNamespace(available=2 * needs)
    monkeypatch.setattr(gpu_capacity.psutil, "virtual_memory", lambda: available)
    refuse_on_this_node(config, None, None)
    available.available = int(0.55 * needs)
    with pytest.raises(UserError, match=r"that it has available; the nearest share that fits: "
                                        r"--set gpu\.optimizer_offload=0\.46$"):
        refuse_on_this_node(config, None, None)


@pytest.mark.each("memory, num_bytes", [
    ("0", 0), ("500G", 500 << 30), ("2t", 2 << 40), ("1000", 1000 << 20), ("64MB", 64 << 20), ("all", 0)])
def test_a_profile_has_memory_as_slurm_writes_it(memory: str, num_bytes: int) -> None:
    assert dataclasses.replace(ClusterProfile("x"), memory=memory).memory_bytes == num_bytes
