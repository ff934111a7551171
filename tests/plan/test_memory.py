"""The memory table: parameters against published shapes, activations against what autograd really
keeps, the page as made."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.models.count import num_params
from megatron_sov.plan import activations
from megatron_sov.plan.memory import account, adapter_params
from megatron_sov.plan.stages import StageParams

ROOT = Path(__file__).parents[2]
CHUNK, WORDS = 128, 8192


def config_of(recipe: str, **settings: Any) -> RunConfig:
    return apply_settings(recipes.get(recipe),
                          [f"{name.replace('__', '.')}={value}" for name, value in settings.items()])


def stages_hold_the_whole_model(recipe: str, layout: dict[str, int], num_ranks: int) -> list[int]:
    """Return [parameters of all stages with all experts, parameters of the model];
    runs in a process of its own."""
    from megatron_sov.mcore.model.meta import built_stage

    config = config_of(recipe, **{f"parallel__{name}": value for name, value in layout.items()})
    stages = [built_stage(config, num_ranks, i).params for i in range(config.parallel.pp)]
    count = num_params(config.model)
    # the last stage embeds for the prediction layer as well
    copies = layout["pp"] > 1 and config.model.num_mtp_layers
    copied = config.model.vocab_size * config.model.hidden_size if copies else 0
    return [sum(s.dense + s.experts * layout["ep"] for s in stages), count.total + count.mtp + copied]


def saved_bytes_of_a_layer(changes: list[str]) -> list[int]:
    """Return [bytes that autograd keeps for one more layer, the account of it] under some settings."""
    import torch

    from megatron_sov.mcore.model import init
    from megatron_sov.mcore.model.language_model import ModelInputs, build
    from megatron_sov.mcore.parallel import world

    tokens, kept = 512, []
    config = apply_settings(config_of("tiny-solar-open", train__precision="fp32", train__micro_batch_size=1),
                            changes)
    for layers in (2, 3):
        settings = apply_settings(config, [f"model.num_layers={layers}"])
        world.join(ParallelConfig())
        model = build(settings.model, settings.parallel, settings.train, settings.gpu)
        init.initialise(model, settings.model, 1)
        weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, weights: set[int] = weights,
                 storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        routing = model.config.routing_step
        routing.seq_len, routing.num_sequences, routing.aux_loss = tokens, 1, {}
        inputs = ModelInputs(torch.arange(tokens), torch.arange(tokens),
                             torch.tensor([0, tokens], dtype=torch.int32), tokens,
                             torch.zeros(tokens, dtype=torch.bool))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.chunks[0](inputs)
            kept.append(sum(storages.values()))
        world.leave()
    return [kept[1] - kept[0], 4 * activations.kept(config, tokens)]


def bytes_of_an_adapted_head() -> list[int]:
    """Return [bytes that are allocated for the head with its adapter inside, the account of it]."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.parallel import world

    class Allocated(TorchDispatchMode):
        """Keeps the size of every operation's result in memory of its own."""

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

    config = config_of("tiny-qwen3", lora__rank=4, lora__targets='["lm_head"]', train__precision="bf16")
    world.join(ParallelConfig())
    model = build(config.model, config.parallel, config.train, config.gpu, config.lora)
    with Allocated() as allocated:
        head = model.head_weight
    assert head.requires_grad
    world.leave()
    params = StageParams(10**6, 0, 2)
    said = [account(c, params, 1, 0, 64).head for c in (config, apply_settings(config, ["lora.rank=0"]))]
    return [sum(allocated.sizes.values()), said[0] - said[1]]


def test_a_head_with_an_adapter_inside_is_there_once_more(ranks: Any, job: Any) -> None:
    (((measured, said),),) = ranks(job(__file__, "bytes_of_an_adapted_head", 1, {}))
    assert measured == said > 0


def peak_bytes_of_a_divergence(beta: float, top_k: int) -> list[int]:
    """Return [bytes that a divergence of two chunks and its gradients take at most, those of a
    cross-entropy]."""
    from types import SimpleNamespace

    import torch
    from torch.profiler import ProfilerActivity, profile

    from megatron_sov.mcore.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.mcore.model.logprobs import Head
    from megatron_sov.mcore.parallel import world

    def peak(compute: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kept = compute()
        found = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        del kept
        return int(max(accumulate(e.nbytes() for e in sorted(found, key=lambda e: e.start_ns()))))

    world.join(ParallelConfig())
    tokens = 2 * CHUNK
    states, weight = torch.randn(tokens, 1, 8).requires_grad_(), torch.randn(WORDS, 8).requires_grad_()
    teacher = (TeacherTopK(torch.arange(top_k).expand(tokens, top_k), torch.full((tokens, top_k), -1.0))
               if top_k else TeacherStates(torch.randn(tokens, 8), torch.randn(WORDS, 8)))
    head, ones = Head(weight, SimpleNamespace(sequence_parallel=False), CHUNK, WORDS), torch.ones(tokens)
    labels = torch.zeros(tokens, dtype=torch.int64)
    found = [peak(lambda: head.divergence(states, teacher, {"sum": ones}, Divergence(beta))),
             peak(lambda: head.cross_entropy(states, labels, {"sum": ones}))]
    world.leave()
    return found


def test_a_divergence_takes_what_the_account_says(ranks: Any, job: Any) -> None:
    config = config_of("tiny-qwen3", train__precision="fp32", train__head_chunk_tokens=CHUNK,
                       model__vocab_size=WORDS)

    def head_bytes(*settings: str) -> int:
        return account(apply_settings(config, list(settings)), StageParams(10**6, 0, 2), 1, 0, 1024).head

    asked = [(0.0, 0), (0.5, 0), (1.0, 0), (0.5, 2)]
    found = ranks(*(job(__file__, "peak_bytes_of_a_divergence", 1, {"beta": beta, "top_k": top_k})
                    for beta, top_k in asked))
    for (beta, top_k), ((peak, plain),) in zip(asked, found, strict=True):
        said = head_bytes("objective.name=distill", f"distillation.beta={beta}",
                          f"distillation.top_k={top_k}") - head_bytes()
        assert peak - plain == pytest.approx(said, rel=0.05), f"beta {beta}, top-k {top_k}"


def test_stages_hold_the_model_and_a_layer_what_the_account_says(ranks: Any, job: Any) -> None:
    here = __file__
    solar = {"recipe": "solar-open-102b", "layout": {"tp": 1, "pp": 2, "ep": 64}, "num_ranks": 128}
    exaone = {"recipe": "k-exaone-236b", "layout": {"tp": 1, "pp": 4, "ep": 64}, "num_ranks": 256}
    results = ranks(job(here, "stages_hold_the_whole_model", 1, solar),
                    job(here, "stages_hold_the_whole_model", 1, exaone),
                    job(here, "saved_bytes_of_a_layer", 1, {"changes": []}),
                    *(job(here, "saved_bytes_of_a_layer", 1, {"changes": [
                        "train.recompute=selective", f'gpu.recompute_modules=["{module}"]']})
                      for module in ("moe", "shared_experts")))
    for (held, counted), in results[:2]:
        assert held == counted
    everything = results[2][0][0]
    for ((kept, said),) in results[2:]:
        assert 0.6 * said < kept < 1.4 * said
    (((without_experts, _),), ((without_shared, _),)) = results[3:]
    assert without_experts < without_shared < everything


@pytest.mark.parametrize(("change", "item", "factor"), [
    ({"parallel__cp": 2}, "layer_inputs", 0.5), ({"parallel__pp": 2}, "layer_inputs", 2.0),
    ({"train__precision": "fp32"}, "layer_inputs", 2.0),
    # of each row of the head: 2048 or 512 logits as float32 and as bf16, and a gradient of 4096 float32
    ({"train__head_chunk_tokens": 512}, "head", (512 * 6 + 4096 * 4) / (2048 * 6 + 4096 * 4)),
    ({"parallel__zero1": "true"}, "optimizer", 1 / 16),
    ({"gpu__grad_dtype": "bf16"}, "gradients", 1 / 2), ({"gpu__grad_dtype": "bf16"}, "optimizer", 16 / 12),
    ({"gpu__moment_dtype": "bf16"}, "optimizer", 8 / 12),
    ({"gpu__optimizer_offload": 0.75}, "optimizer", 1 / 4),
    # of a layer's inside and its gradients, what is stored is not there once more
    ({"train__recompute": "false"}, "one_layer", 1 / 2),
    # of 1e9 parameters, embedding and head (1000 x 4096 each) keep both moments
    ({"optim__name": "muon", "model__vocab_size": 1000}, "optimizer", (8 + 4 * 2 * 1000 * 4096 / 1e9) / 12)])
def test_each_item_follows_its_setting(change: dict[str, Any], item: str, factor: float) -> None:
    base = {"parallel__ep": 1, "parallel__zero1": "false"}
    params = StageParams(10**9, 0, 24)
    before, after = (account(config_of("solar-open-102b", **(base | c)), params, 16, 0, 131072)
                     for c in ({}, change))
    assert getattr(after, item) / getattr(before, item) == pytest.approx(factor)


def test_what_is_offloaded_is_counted_on_the_host() -> None:
    layout = {"parallel__ep": 4, "parallel__zero1": "true", "gpu__optimizer_offload": 0.75}
    params = StageParams(16 * 10**6, 4 * 10**9, 24)
    found = account(config_of("solar-open-102b", **layout), params, 16, 0, 4096)
    # of 16 processes each updates a 16th of the dense and a quarter of its experts: 16 bytes on the host
    # (master, two moments, gradient) and 12 on the device where they are not offloaded
    assert found.on_host == 0.75 * 16 * (10**6 + 10**9) and found.optimizer == 0.25 * 12 * (10**6 + 10**9)
    assert found.total == sum(dataclasses.asdict(found).values()) - found.on_host


def test_the_page_is_what_the_script_writes() -> None:
    script = ROOT / "docs" / "generate_memory.py"
    code = ("import sys, runpy; page = runpy.run_path(sys.argv[1])['page']; sys.stdout.write(page())")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(script)], capture_output=True,
                          text=True, check=True)
    assert done.stdout.endswith((ROOT / "docs" / "memory.md").read_text(encoding="utf-8"))


def test_of_a_frozen_model_adapters_alone_have_gradients_and_state() -> None:
    config = config_of("tiny-qwen3", lora__rank=4, train__precision="fp32")
    m, params = config.model, StageParams(1_000_000, 0, config.model.num_layers)
    q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    sides = 2 * (m.hidden_size + q) + 2 * (m.hidden_size + kv) + 3 * (m.hidden_size + m.dense_ffn_dim)
    count = 4 * m.num_layers * sides
    found = account(config, params, 1, 0, 64)
    assert found.weights == 4 * (1_000_000 + count)
    assert (found.gradients, found.optimizer) == (4 * count, 8 * count)
    full = account(config_of("tiny-qwen3", train__precision="fp32"), params, 1, 0, 64)
    assert (full.gradients, full.optimizer) == (4_000_000, 8_000_000) and full.head > found.head


def test_adapters_of_experts_are_spread_over_processes() -> None:
    config = config_of("tiny-solar-open", lora__rank=2, lora__targets='["experts"]', parallel__ep=2)
    m = config.model
    each = 2 * (m.hidden_size + 2 * m.expert_ffn_dim) + 2 * (m.expert_ffn_dim + m.hidden_size)
    assert adapter_params(config) == (0, m.num_layers * m.num_experts // 2 * each)
