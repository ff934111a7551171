"""Rules of a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.config import ParallelConfig, RunConfig, YarnConfig

Small = Callable[..., RunConfig]


@pytest.mark.parametrize(("parallel", "num_ranks", "sentence"), [
    ({"tp": 0}, 1, "parallel.tp = 0 must be at least 1"),
    ({"tp": 4, "sp": True}, 4, "parallel.tp = 4 must divide model.num_kv_heads = 2; use one of 1, 2"),
    ({"tp": 2}, 2, "parallel.sp = False must be true"),
    ({"sp": True}, 1, "parallel.sp = True needs parallel.tp > 1"),
    ({"pp": 3}, 3, "parallel.pp = 3 must divide model.num_layers = 4; use one of 1, 2, 4"),
    ({"pipeline_layout": (4,)}, 1, "parallel.pipeline_layout = [4] needs parallel.pp > 1"),
    ({"pp": 2, "pipeline_layout": (1, 1, 2)}, 2,
     "parallel.pipeline_layout = [1, 1, 2] has 3 numbers and must have one for each of parallel.pp 2 x"),
    ({"pp": 2, "pipeline_layout": (4, 0)}, 2,
     "parallel.pipeline_layout = [4, 0] must give every stage a layer"),
    ({"pp": 2, "pipeline_layout": (1, 2)}, 2,
     "parallel.pipeline_layout = [1, 2] adds up to 3 layers and must"),
    ({"ep": 3}, 3, "parallel.ep = 3 must divide model.num_experts = 8"),
    ({"etp": 5}, 5, "parallel.etp = 5 must divide model.expert_ffn_dim = 32"),
    ({"overlap_param_gather": True, "zero1": True}, 1,
     "parallel.overlap_param_gather = True needs parallel.zero1 and parallel.overlap_grad_reduce, "
     "which are True and False"),
    ({"overlap_param_gather": True, "overlap_grad_reduce": True}, 1,
     "parallel.overlap_param_gather = True needs"),
    ({"timeout_s": 0.0}, 1, "parallel.timeout_s = 0.0 must be above 0"),
    ({"bucket_params": -1}, 1, "parallel.bucket_params = -1 must not be negative"),
    ({"cp": 0}, 1, "parallel.cp = 0 must be at least 1"),
    ({"cp": 2, "pp": 2}, 6, "parallel tp 1 x pp 2 x cp 2 = 4 must divide the number of processes, 6"),
    ({"ep": 2}, 3, "parallel etp 1 x ep 2 x pp 1 = 2 must divide the number of processes, 3"),
])
def test_rules_of_the_layout(parallel: dict[str, Any], num_ranks: int, sentence: str, small: Small) -> None:
    (problem,) = replace(small(), parallel=ParallelConfig(**parallel)).problems(num_ranks)
    assert problem.startswith(sentence)


def test_experts_with_biases_are_not_cut(small: Small) -> None:
    model = small(linear_bias=True, qkv_bias=True, num_shared_experts=0)
    (problem,) = replace(model, parallel=ParallelConfig(etp=2)).problems(2)
    assert problem.startswith("parallel.etp = 2 must be 1: megatron-core cuts no experts that have biases")


def test_shared_experts_are_divided_like_attention_not_like_the_routed_ones(small: Small) -> None:
    """They are one wide feed-forward network, of which every tensor parallel rank has a piece."""
    def problems(expert_ffn_dim: int, num_shared_experts: int) -> list[str]:
        model = small(num_heads=6, num_kv_heads=3, expert_ffn_dim=expert_ffn_dim,
                      num_shared_experts=num_shared_experts).model
        return ParallelConfig(tp=3, sp=True).problems(model, num_ranks=3)

    (problem,) = problems(32, 2)
    assert problem.startswith("parallel.tp = 3 must divide the width of the shared experts, "
                              "model.num_shared_experts 2 x model.expert_ffn_dim 32 = 64; use one of 1, 2, 4")
    assert problems(32, 0) == problems(32, 3) == problems(48, 1) == []


def test_yarns_table_is_cut_as_rows_are(small: Small) -> None:
    def problems(cp: int, original_max_position_tokens: int) -> list[str]:
        model = small(yarn=YarnConfig(original_max_position_tokens=original_max_position_tokens)).model
        return ParallelConfig(cp=cp).problems(model, num_ranks=cp)

    assert problems(3, 65536) == [
        "parallel.cp = 3: 2 x cp = 6 must divide model.yarn.original_max_position_tokens = 65536, whose "
        "table of positions the processes share; use one of 1, 2, 4, 8, 16, 32, 64, 128"]
    assert problems(4, 65536) == problems(3, 65538) == problems(1, 65535) == []
    assert ParallelConfig(cp=3).problems(small().model, num_ranks=3) == []


def test_layers_of_a_stage() -> None:
    """Runs lie in the order of the layers: the first runs of all stages, then the second ones."""
    assert [ParallelConfig(pp=2, vpp=2).layers_of_stage(stage, 8) for stage in (0, 1)] == [
        [0, 1, 4, 5], [2, 3, 6, 7]]
    uneven = ParallelConfig(pp=2, vpp=2, pipeline_layout=(3, 2, 2, 1))
    assert [uneven.layers_of_stage(stage, 8) for stage in (0, 1)] == [[0, 1, 2, 5, 6], [3, 4, 7]]
