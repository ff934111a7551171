"""Parameters, buffers, communicators and quantized copies of a stage, against Megatron-Core and counts."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, strategies as st
from torch import distributed as dist

from megatron_sov import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.gpu_capacity import find_fullest_stage
from megatron_sov.plan.footprint.memory import count_communicators, count_nccl_bytes
from megatron_sov.plan.footprint.stage_parameters import (
    count_quantized_bytes, count_weight_bytes, list_stage_parameters)
from megatron_sov.plan.footprint.states import ParameterRun, lay_out_buffer
from tests.meta_memory import count_process_memory, use_fake_world

LORA = ["lora.rank=4", "lora.targets=[\"all-linear\", \"lm_head\", \"embed_tokens\"]"]
RUNS = (("tiny-k-exaone", ["parallel.pp=2", "parallel.ep=2", "parallel.tp=2", "parallel.sp=true"], 8, 7),
        ("tiny-qwen2", ["parallel.pp=2", "parallel.vpp=2"], 4, 2), ("tiny-solar-open", LORA, 1, 0),
        ("tiny-qwen3", ["lora.rank=2", "lora.dora=true", "parallel.tp=2"], 2, 1),
        ("tiny-exaone4", ["parallel.pp=2"], 2, 1), ("tiny-hyperclovax", ["parallel.tp=2"], 2, 0),
        ("tiny-gemma3", [], 1, 0),
        ("tiny-deepseek-v3", ["parallel.pp=2", "parallel.ep=2"], 4, 3),
        ("tiny-solar-open2", [*LORA, "parallel.tp=2", "parallel.sp=true"], 2, 1),
        ("tiny-deepseek-v3", [*LORA, "parallel.tp=2", "parallel.sp=true"], 2, 1),
        ("tiny-deepseek-v3", ["model.latent_attention.q_lora_rank=null"], 1, 0))
"""Recipe, settings, number of processes, rank whose stage is compared."""


def build_config(recipe: str, settings: list[str], precision: str) -> RunConfig:
    return apply_settings(recipes.get(recipe), [f"train.precision={precision}", *settings])


def read_module_shapes(precision: str) -> list[Any]:
    """Return [pipeline stage, shapes of the parameters of each chunk] of each run in `RUNS`."""
    results = []
    for recipe, settings, num_ranks, rank in RUNS:
        process_memory = count_process_memory(build_config(recipe, settings, precision), num_ranks, rank)
        results.append([process_memory.stage, process_memory.shapes])
    return results


@pytest.mark.deep
def test_parameters_are_the_modules_in_their_order(ranks: Any, te_ranks: Any, job: Any) -> None:
    """Transformer Engine has another order of norms and experts."""
    for run, precision in ((ranks, "fp32"), (te_ranks, "bf16")):
        ((results,),) = run(job(__file__, "read_module_shapes", 1, {"precision": precision}))
        for (recipe, settings, _, _), (stage, shapes) in zip(RUNS, results, strict=True):
            predicted = [[list(part.shape) for _, parts in runs for part in parts for _ in range(part.count)]
                         for runs in list_stage_parameters(build_config(recipe, settings, precision), stage)]
            assert predicted == shapes, (recipe, precision)


# Buffers laid out by runs of equal parameters equal those laid out parameter by parameter.

SIZES = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 6), st.booleans()), min_size=1, max_size=8)


def count_by_parameter(sizes: list[ParameterRun], num_ranks: int, bucket_numel: int | None,
                       end_multiple: int) -> tuple[int, list[Counter[int]]]:
    """Return the buffer's elements and each rank's updated elements by rule, both parameter by parameter."""
    multiple = math.lcm(num_ranks, end_multiple)
    buckets: list[list[tuple[int, int, int]]] = [[]]
    bounds, offset, first = [], 0, 0

    def close() -> None:
        nonlocal offset, first
        offset = math.ceil(offset / multiple) * multiple
        bounds.append((first, offset))
        buckets.append([])
        first = offset

    for size in (parameter for run in sizes for parameter in [run] * run.number):
        offset = math.ceil(offset / 64) * 64
        if size.is_alone and buckets[-1]:
            close()
        buckets[-1].append((offset, offset + size.numel, size.rule))
        offset += size.numel
        if size.is_alone or (bucket_numel is not None and offset - first >= bucket_numel):
            close()
    if buckets[-1]:
        close()
    found: list[Counter[int]] = []
    for rank in range(num_ranks):
        updated: Counter[int] = Counter()
        for (start, end), bucket in zip(bounds, buckets, strict=False):
            share = (end - start) // num_ranks
            begin = start + rank * share
            for low, high, rule in bucket:
                updated[rule] += max(0, min(high, begin + share) - max(low, begin))
        found.append(+updated)
    return offset, found


@given(SIZES, st.integers(1, 7), st.none() | st.integers(1, 3000), st.sampled_from([128, 1 << 16]))
def test_buffer_of_parameter_runs_equals_one_by_one_layout(drawn: list[tuple[int, int, bool]], num_ranks: int,
                                                           bucket_numel: int | None,
                                                           end_multiple: int) -> None:
    sizes = [ParameterRun(numel, count, mark, alone) for mark, (numel, count, alone) in enumerate(drawn)]
    buffer = lay_out_buffer(sizes, sharded=True, num_ranks=num_ranks, bucket_numel=bucket_numel,
                            end_multiple=end_multiple)
    numel, updated = count_by_parameter(sizes, num_ranks, bucket_numel, end_multiple)
    assert buffer.numel == numel
    for rank in range(num_ranks):
        found: Counter[int] = Counter()
        for piece in buffer.iter_updated(rank, num_ranks):
            found[piece.rule] += piece.numel * piece.number
        assert found == updated[rank]


@pytest.mark.parametrize(("sharded", "numel"), [(False, 100 + 2 * 70), (True, 384)])
def test_gaps_are_zero1s(sharded: bool, numel: int) -> None:
    """By hand, with ZeRO-1: the parameters begin at 0, 128 and 256, multiples of 64; the last ends at 326,
    and the buffer at 384, a multiple of 3 and 128."""
    sizes = [ParameterRun(100, 1, 0, False), ParameterRun(70, 2, 0, False)]
    assert lay_out_buffer(sizes, sharded=sharded, num_ranks=3,
                          bucket_numel=None, end_multiple=128).numel == numel


# Memory estimates of libraries, by their formulas.

LAYOUTS: tuple[tuple[str, list[str], int], ...] = (
    ("tiny-qwen3", [], 1), ("tiny-qwen3", [], 8), ("tiny-qwen3", ["parallel.zero1=false"], 8),
    ("tiny-qwen3", ["parallel.tp=2", "parallel.pp=2"], 16),
    ("tiny-qwen3", ["parallel.tp=2", "parallel.pp=2", "parallel.zero1=false"], 16),
    ("tiny-solar-open", ["parallel.ep=4"], 8), ("tiny-solar-open", ["parallel.ep=8"], 8),
    ("tiny-solar-open", ["parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "parallel.etp=2"], 32),
    ("tiny-k-exaone", ["parallel.pp=2", "parallel.ep=4"], 8),
    ("tiny-k-exaone", ["parallel.pp=2", "parallel.cp=2", "parallel.zero1=false"], 16),
    ("solar-open-102b", ["parallel.pp=2", "parallel.ep=8"], 480))


def count_groups() -> list[int]:
    """Return the number of groups with more than one process that rank 0 of each layout uses in a step."""
    from megatron.core import parallel_state as groups

    found = []
    for recipe, settings, num_ranks in LAYOUTS:
        config = apply_settings(recipes.get(recipe), settings)
        with use_fake_world(config.parallel, num_ranks, 0):
            used = {dist.group.WORLD, groups.get_data_parallel_group(with_context_parallel=True),
                    groups.get_data_parallel_group(), groups.get_context_parallel_group(),
                    groups.get_tensor_model_parallel_group(), groups.get_pipeline_model_parallel_group(),
                    groups.get_intra_distributed_optimizer_instance_group() if config.parallel.zero1
                    else groups.get_model_parallel_group()}
            if config.model.num_moe_layers():
                used |= {groups.get_tensor_and_context_parallel_group(),
                         groups.get_expert_model_parallel_group(), groups.get_expert_tensor_parallel_group(),
                         groups.get_expert_tensor_and_model_parallel_group(),
                         groups.get_expert_data_parallel_group()}
                if not config.parallel.zero1:
                    used.add(groups.get_expert_tensor_model_pipeline_parallel_group())
            if config.model.tied_embeddings or config.model.num_mtp_layers:
                used.add(groups.get_embedding_group())
            found.append(sum(group.size() > 1 for group in used))
    return found


def test_communicators_are_those_of_a_step(ranks: Any, job: Any) -> None:
    ((found,),) = ranks(job(__file__, "count_groups", 1, {}))
    configs = [(apply_settings(recipes.get(recipe), settings), n) for recipe, settings, n in LAYOUTS]
    assert [count_communicators(config, n) for config, n in configs] == found
    # none; all 8 processes, which are the data-parallel group; all, data, tensor, pipeline, embedding
    assert found[:4] == [0, 1, 1, 5]
    config, num_ranks = configs[1]
    # 4 MiB, 512 KiB and 4,800 KiB for each of 16 channels
    assert count_nccl_bytes(config, num_ranks) == 16 * ((4 << 20) + (512 << 10) + (4800 << 10))


# Sizes of quantized weights in Transformer Engine, counted by hand, and the weights that are quantized,
# compared with the model's parameters.

HIDDEN, HEAD_DIM, NUM_EXPERTS = 4096, 128, 128
"""Sizes of Solar Open. It also has 48 layers, 64 query and 8 key/value heads, 1280 channels per expert."""


def solar(*changes: str) -> RunConfig:
    return apply_settings(recipes.get("solar-open-102b"), ["parallel.pp=4", "parallel.ep=8", "train.fp8=none",
                                                           *changes])


@pytest.mark.each(("fp8", "rows", "columns", "by_hand"), [
    # a byte for each value and one for each of the transposed copy, one float32 scale
    ("tensorwise", 300, 200, 60_000 + 60_000 + 4),
    # 3 x 2 blocks of 128: scales [3, 4] rowwise, the blocks of a row filled up to 4; [2, 4] columnwise
    ("blockwise", 300, 200, 120_000 + 4 * (12 + 8)),
    ("blockwise", 2560, 4096, 2 * 2560 * 4096 + 4 * (20 * 32 + 32 * 20)),
    # 192 / 32 = 6 scales of a row, filled up to 8, for 384 rows; 320 / 32 = 10, up to 12, for 256 columns
    ("mxfp8", 320, 192, 2 * 320 * 192 + 384 * 8 + 12 * 256),
    # half a byte for a value; 192 / 16 = 12 scales of each of 384 rows, 320 / 16 = 20 of each of 256 columns;
    # two float32
    ("nvfp4", 320, 192, 320 * 192 + 384 * 12 + 256 * 20 + 8)])
def test_bytes_per_weight_equal_hand_counts(fp8: str, rows: int, columns: int, by_hand: int) -> None:
    assert count_weight_bytes(fp8, rows, columns) == by_hand


def test_bf16_layers_have_no_fp8_copies() -> None:
    """Six bf16 layers are half of the first and half of the last of four stages."""
    bf16_layers = ("train.fp8_bf16_layers_at_start=6", "train.fp8_bf16_layers_at_end=6")
    sums = [[count_quantized_bytes(solar("train.fp8=mxfp8", *changes), stage) for stage in range(4)]
            for changes in ((), bf16_layers)]
    stage_bytes = sums[0][0]
    assert sums == [[stage_bytes] * 4, [stage_bytes // 2, stage_bytes, stage_bytes, stage_bytes // 2]]
    assert count_quantized_bytes(solar(), 0) == 0


def test_the_prediction_layer_is_quantised_in_8_bits_alone() -> None:
    config = recipes.get("k-exaone-236b")
    without = apply_settings(config, ["model.num_mtp_layers=0"])
    for fp8, counts in (("mxfp8", True), ("nvfp4", False)):
        with_layer, without_layer = (count_quantized_bytes(apply_settings(c, [f"train.fp8={fp8}"]), 0)
                                     for c in (config, without))
        assert (with_layer > without_layer) is counts


def test_the_account_of_a_process_has_them() -> None:
    """Tensorwise copies of attention and experts have two bytes per weight and a float32 scale per matrix."""
    (_, before), (_, after) = (find_fullest_stage(solar(*changes), 512)
                               for changes in ((), ("train.fp8=tensorwise",)))
    assert after.total - before.total == after.quantized_weights
    attention = HIDDEN * HEAD_DIM * (64 + 2 * 8 + 64)
    experts = (NUM_EXPERTS // 8 + 1) * 3 * HIDDEN * 1280
    assert after.quantized_weights == 12 * (2 * (attention + experts) + 4 * (2 + 2 * 17))
