"""How a run of a recipe is kept going on a profile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.clusters import cluster
from megatron_sov.errors import UserError
from megatron_sov.plan.operation.checkpoints import checkpoint_bytes, daly_interval_s
from megatron_sov.plan.operation.cost import cost
from megatron_sov.plan.operation.run import operation

H100 = cluster.load("h100", needs_account=False)
SOLAR = recipes.get("solar-open-102b")


def test_a_run_is_saved_as_often_as_daly_says() -> None:
    told = operation(SOLAR, H100, 512, 10.0, 100_000)
    assert told.checkpoint_bytes == checkpoint_bytes(SOLAR).total
    assert told.interval_s == 10 * told.interval_steps == pytest.approx(
        daly_interval_s(told.stall_s, told.mtbf_s), abs=5)
    assert told.mtbf_s / 86400 == pytest.approx(365.25 / (512 * 0.17)) and told.storage_known
    assert 0.99 < told.effective_share < 1


def test_a_slow_store_sets_the_interval() -> None:
    slow = replace(H100, storage_write_gbytes_per_s=1.0)
    told = operation(SOLAR, slow, 8192, 10.0, 100_000)
    assert told.interval_steps == math.ceil(told.write_s / 10) == math.ceil(told.checkpoint_bytes / 1e10)


def test_a_store_that_nobody_knows_and_a_cluster_that_never_fails() -> None:
    silent = replace(H100, storage_write_gbytes_per_s=0, failures_per_gpu_year=0)
    told = operation(SOLAR, silent, 512, 10.0, 777)
    assert not told.storage_known and told.interval_steps == 777 and math.isinf(told.mtbf_s)
    assert told.write_s > 10 and told.effective_share > 0.999


@pytest.mark.parametrize("rate", [100.0, 1e7])
def test_a_cluster_that_always_fails_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"leave 8,192 GPUs no time to train: something fails every \S+ s, "
                                        r"and a checkpoint takes 7\S+ s; plan with fewer GPUs"):
        operation(SOLAR, replace(H100, failures_per_gpu_year=rate), 8192, 10.0, 1000)


# Days, energy and money of runs whose figures were published.


def test_deepseek_v3() -> None:
    """2.788 M hours of an H800 at 2 dollars: 5.576 M dollars (its report, table 1)."""
    h800 = replace(H100, gpu="h800", price_per_gpu_hour=2.0)
    told = cost(2.788e6 / 2048 * 3600, 2048, h800)
    assert told.gpu_hours == pytest.approx(2.788e6) and told.usd == pytest.approx(5.576e6)
    assert told.usd_low == told.usd == told.usd_high and told.price_note.startswith("2.00 USD for")
    assert told.days == pytest.approx(56.7, abs=0.1)


def test_energy_of_a_node_for_an_hour() -> None:
    """8 H100 may draw 10.2 kW and draw 8.4; the site takes 1.3 times as much."""
    told = cost(3600, 8, H100)
    assert told.energy_kwh == pytest.approx(8.4 * 1.3, rel=5e-3)
    assert cost(3600, 8, replace(H100, node_power_w=12_000)).energy_kwh == pytest.approx(
        told.energy_kwh * 12_000 / 10_200)


def test_a_price_that_nobody_has_said_is_a_range() -> None:
    told = cost(3600, 1, H100)
    assert told.usd_low < told.usd < told.usd_high and told.price_note.startswith(
        "2.95 USD for a GPU and hour, typical price of 20")
    assert cost(3600, 1, replace(H100, gpu="gb300")).price_note.startswith("a guess: ")


def test_failures_make_it_dearer() -> None:
    assert cost(3600, 8, H100, effective_share=0.5).usd == 2 * cost(3600, 8, H100).usd


def test_a_profile_without_gpus_has_no_price() -> None:
    with pytest.raises(UserError, match="gpu is empty in the profile"):
        cost(3600, 8, cluster.load("one-node", needs_account=False))
