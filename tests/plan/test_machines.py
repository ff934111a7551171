"""Nodes of a profile: their number, their GPUs, what a run may take, and numbers that nobody means."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.errors import UserError
from megatron_sov.plan.machines import MAX_NODES, machines
from megatron_sov.plan.on_cluster import placed, searched
from megatron_sov.recipes.requested import Request


def test_nodes_of_gpus() -> None:
    found = machines("b200", 60)
    assert found.num_ranks == 480 and found.chip is not None
    assert 0.94 < found.limit_bytes / found.chip.memory_bytes < 0.96
    assert found.with_nodes(3).num_ranks == 24 and machines("b200", None).nodes == 1


def test_nodes_without_gpus_weigh_nothing() -> None:
    found = machines("local", 1)
    assert found.chip is None and found.limit_bytes == 0 and found.num_ranks == 2


def test_links_that_nobody_has_said_are_missed_where_they_are_needed(tmp_path: Path) -> None:
    (file := tmp_path / "mine.yaml").write_text("description: no network\ngpu: h100\n")
    one = machines(str(file), 1)
    assert one.links().domain == 8
    with pytest.raises(UserError, match=r"--cluster .*mine.yaml: network_gbits_per_gpu is missing"):
        one.with_nodes(2).links()


@pytest.mark.parametrize("nodes", [0, -3, MAX_NODES + 1])
def test_a_number_of_nodes_that_nobody_has(nodes: int) -> None:
    with pytest.raises(UserError, match=f"--nodes {nodes}: must be at least 1"):
        machines("h100", nodes)


# A run on a cluster: whose layout it takes, and what a script reads of it.


def of(recipe: str, *settings: str) -> Request:
    return Request(recipes.get(recipe), settings, from_file=False)


def test_a_layout_that_is_set_stays_and_one_that_is_not_is_recommended() -> None:
    where = machines("h100", 64)
    open_, own = placed(of("k-exaone-236b"), where), placed(of("k-exaone-236b", "parallel.pp=16"), where)
    assert (open_.config.parallel.pp, open_.config.parallel.ep) == (8, 8)
    assert own.config.parallel.pp == 16
    assert own.config.parallel.ep == recipes.get("k-exaone-236b").parallel.ep


def test_a_script_reads_what_people_read() -> None:
    found = placed(of("k-exaone-236b"), machines("h100", 64))
    plan = found.as_json()
    total = sum(n for item, n in plan["memory_bytes"].items() if item != "total")
    assert plan["memory_bytes"]["total"] == total == plan["totals"]["peak_memory_bytes"]
    first, second = found.as_text().splitlines()[:2]
    assert first == "512 processes of H100-80GB: pp 8, cp 4, ep 8, ZeRO-1"
    assert second.startswith(f"{total / (1 << 30):.1f} GiB on each of stage {plan['fullest_stage']}: ")
    assert plan["totals"]["days"] == pytest.approx(sum(stage["days"] for stage in plan["stages"]))


def test_a_search_needs_gpus_that_are_known() -> None:
    with pytest.raises(UserError, match="--sweep with --cluster one-node: gpu is empty in the profile"):
        searched(of("tiny-solar-open"), machines("one-node", 1), ["tiny-solar-open"])
