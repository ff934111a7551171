"""Bytes of weights, gradients and optimizer states equal those that training allocates on meta tensors in a
fake world, for a few layouts of tiny and large models; benchmarks/plan_bytes.py compares hundreds."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.model.process_memory import StatePlace
from megatron_sov.plan.footprint.states import StageBuffers, estimate_states
from megatron_sov.plan.search.space import build_space, iter_layouts

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from plan_bytes import DrawnLayout, draw_layout, is_fused, predict_states

DRAWN_LAYOUTS = (7, 11, 12, 14, 17, 19, 21)
"""Seeds of random layouts of tiny recipes."""
LARGE_LAYOUTS = (
    DrawnLayout("solar-open-102b",
                ("parallel.pp=2", "parallel.vpp=3", "parallel.ep=64", "parallel.zero1=true",
                 "parallel.overlap_grad_reduce=true", "optim.name=muon",
                 "train.global_batch_size=512"), 128, 77),
    DrawnLayout("k-exaone-236b", ("parallel.tp=2", "parallel.sp=true", "parallel.pp=4", "parallel.ep=32",
                                  "parallel.etp=2", "parallel.zero1=true", "gpu.optimizer_offload=0.3",
                                  "optim.name=adamw", "train.global_batch_size=1024"), 512, 400))
"""Layouts of large models, compared on a rank of the first and on a rank of the last stage."""
_VISION = {"placeholder_ids": [5], "image_size": 56, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
           "ffn_dim": 48, "full_attention_layers": [1], "out_hidden_size": 64}
_PLAIN = {"kind": "siglip", "placeholder_ids": [5], "image_size": 28, "hidden_size": 32, "num_layers": 2,
          "num_heads": 4, "ffn_dim": 48, "adapter": "mlp"}
_AUDIO = {"placeholder_ids": [6], "num_mels": 8, "num_frames": 200, "hidden_size": 32, "num_layers": 2,
          "num_heads": 4, "ffn_dim": 48, "compression": 25, "compressor_size": 64}
ENCODERS = (
    DrawnLayout("tiny-qwen3", (f"model.vision={json.dumps(_VISION)}", f"model.audio={json.dumps(_AUDIO)}",
                               "media.train_encoders=true", "parallel.pp=2", "parallel.zero1=true",
                               "parallel.overlap_grad_reduce=true", "train.precision=bf16",
                               "optim.name=muon"), 4, 0),
    DrawnLayout("tiny-qwen3", (f"model.vision={json.dumps(_PLAIN)}", "train.precision=fp32"), 1, 0))
"""Trained encoders with Muon, and a frozen encoder with a trained adapter."""


def count_and_predict(layouts: list[dict[str, Any]]) -> list[list[Any]]:
    """Return [bytes allocated by training, bytes predicted by plan] for each layout."""
    from tests.meta_memory import count_process_memory

    pairs = []
    for values in layouts:
        layout = DrawnLayout(**values)
        counted = count_process_memory(layout.config, layout.num_ranks, layout.rank)
        pairs.append([dataclasses.asdict(counted.states),
                      dataclasses.asdict(predict_states(layout, counted.stage, counted.place))])
    return pairs


@pytest.mark.deep
def test_state_bytes_equal_those_of_training(ranks: Any, te_ranks: Any, job: Any) -> None:
    layouts = [*(draw_layout(number) for number in DRAWN_LAYOUTS), *LARGE_LAYOUTS, *ENCODERS]
    for run, fused in ((te_ranks, True), (ranks, False)):
        selected = [layout for layout in layouts if is_fused(layout) is fused]
        assert selected
        ((pairs,),) = run(job(__file__, "count_and_predict", 1,
                              {"layouts": [dataclasses.asdict(layout) for layout in selected]}))
        for layout, (counted, predicted) in zip(selected, pairs, strict=True):
            assert counted == predicted, layout


@pytest.mark.each(("settings", "weights", "gradients", "optimizer"), [
    # bytes per parameter
    (["train.precision=bf16"], 2, 4, 12), (["train.precision=fp32"], 4, 4, 8),
    (["train.precision=fp64"], 8, 8, 16), (["train.precision=bf16", "gpu.grad_dtype=bf16"], 2, 2, 12)])
def test_a_parameter_has_bytes_by_its_precision(settings: list[str], weights: int, gradients: int,
                                                optimizer: int) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), settings)
    result = StageBuffers(config, 1, 0).count_states(StatePlace())
    count = result.elements
    assert (result.weights, result.gradients, result.optimizer) == (
        weights * count, gradients * count, optimizer * count)


def test_processes_of_a_group_update_every_parameter_once() -> None:
    config = apply_settings(recipes.get("tiny-k-exaone"), [
        "train.precision=bf16", "parallel.zero1=true", "parallel.ep=2", "parallel.overlap_grad_reduce=true",
        "parallel.bucket_params=30000"])
    buffers = StageBuffers(config, 6, 0)
    # 6 processes share the dense parameters, 3 processes share each half of the experts
    dense = sum(buffers.count_states(StatePlace(rank, -1)).updated for rank in range(6))
    experts = sum(buffers.count_states(StatePlace(-1, rank)).updated for rank in range(3))
    assert dense + experts == buffers.count_states(StatePlace()).elements


def test_fullest_process_with_muon_updates_embeddings_with_adamw() -> None:
    config = apply_settings(recipes.get("k-exaone-236b"), ["parallel.zero1=true", "parallel.ep=64"])
    assert config.optim.name == "muon"
    buffers = StageBuffers(config, 512, 0)
    sizes = [buffers.count_states(StatePlace(rank)).optimizer for rank in range(512)]
    # processes with norms have a few bytes more
    assert buffers.count_states(buffers.find_fullest_place()).optimizer == pytest.approx(max(sizes), rel=1e-4)
    assert max(sizes) > sizes[0]


@pytest.mark.each("settings", [[], ["lora.rank=8"], [
    'optim.groups=[{"pattern": "decoder.layers.1.*", "frozen": true}]']])
def test_cached_states_equal_fresh_ones_for_layouts_that_share_them(settings: list[str]) -> None:
    """For all layouts of a search, including uneven pipelines."""
    config = apply_settings(recipes.get("tiny-k-exaone"), settings)
    configs = [dataclasses.replace(config, parallel=parallel)
               for parallel in iter_layouts(config, build_space(config, 16, 8, extra_layers=(1.3,)))
               if not parallel.problems(config.model, 16)]
    assert len(configs) > 30 and any(candidate.parallel.pipeline_layout for candidate in configs)
    for candidate in configs:
        for stage in range(candidate.parallel.pp):
            buffers = StageBuffers(candidate, 16, stage)
            assert estimate_states(candidate, 16, stage) == buffers.count_states(
                buffers.find_fullest_place()), (candidate.parallel, stage)
