"""Rules of a layout."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sov.config import ParallelConfig, RunConfig, YarnConfig
from megatron_sov.settings import Problem

Small = Callable[..., RunConfig]


def test_shared_experts_are_divided_like_attention_not_like_the_routed_ones(small: Small) -> None:
    """They are one wide feed-forward network, of which every tensor parallel rank has a piece."""
    def problems(expert_ffn_dim: int, num_shared_experts: int) -> list[Problem]:
        model = small(num_heads=6, num_kv_heads=3, expert_ffn_dim=expert_ffn_dim,
                      num_shared_experts=num_shared_experts).model
        return ParallelConfig(tp=3, sp=True).problems(model, num_ranks=3)

    assert [problem.key for problem in problems(32, 2)] == ["parallel.tp"]
    assert problems(32, 0) == problems(32, 3) == problems(48, 1) == []


def test_yarns_table_is_cut_as_rows_are(small: Small) -> None:
    def problems(cp: int, original_max_position_tokens: int) -> list[Problem]:
        model = small(yarn=YarnConfig(original_max_position_tokens=original_max_position_tokens)).model
        return ParallelConfig(cp=cp).problems(model, num_ranks=cp)

    assert [(problem.key, problem.way_out) for problem in problems(3, 65536)] == [
        ("parallel.cp", "use one of 1, 2, 4, 8, 16, 32, 64, 128")]
    assert problems(4, 65536) == problems(3, 65538) == problems(1, 65535) == []
    assert ParallelConfig(cp=3).problems(small().model, num_ranks=3) == []


def test_layers_of_a_stage() -> None:
    """Runs lie in the order of the layers: the first runs of all stages, then the second ones."""
    assert [ParallelConfig(pp=2, vpp=2).layers_of_stage(stage, 8) for stage in (0, 1)] == [
        [0, 1, 4, 5], [2, 3, 6, 7]]
    uneven = ParallelConfig(pp=2, vpp=2, pipeline_layout=(3, 2, 2, 1))
    assert [uneven.layers_of_stage(stage, 8) for stage in (0, 1)] == [[0, 1, 2, 5, 6], [3, 4, 7]]
