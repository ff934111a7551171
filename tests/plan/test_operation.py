"""Effective training time: the closed form against a simulation and Daly's."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import initial_weights
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings
from megatron_sov.plan.operation import (
    FailureConditions, compute_goodput, count_checkpoint_bytes, count_rank_bytes, estimate_cost,
    estimate_write_times, find_best_interval_s, plan_operation)
from megatron_sov.runs.checkpoints import AdapterBase
from megatron_sov.work.clusters import cluster
from tests.checkpoints import save_checkpoint

RESTART_S = 600.0


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the work between checkpoints that loses least, to higher order (Daly, Future Generation Computer
    Systems 22(3), 2006, equation 37).

    Args:
        cost_s: how long a checkpoint holds up the run.
        mtbf_s: mean time between failures of the whole run.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    x = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + x / 3 + x * x / 9) - cost_s


def simulated(c: FailureConditions, num_failures: int, seed: int) -> float:
    """Return the effective training time between so many failures, each drawn: the k-th checkpoint counts
    where it is written, and a restart may fail itself."""
    drawn, work_s, wall_s = random.Random(seed), 0.0, 0.0
    for _ in range(num_failures):
        lived_s = drawn.expovariate(c.failures_per_s)
        saved = math.floor((lived_s - c.interval_s - c.stall_s - c.write_s) / c.period_s) + 1
        work_s += c.interval_s * max(0, saved)
        wall_s += lived_s
        while (ahead_s := drawn.expovariate(c.failures_per_s)) < c.restart_s:
            wall_s += ahead_s
        wall_s += c.restart_s
    return work_s / wall_s


def test_without_failures_checkpoints_alone_take_time() -> None:
    c = FailureConditions(0.0, RESTART_S, 100, 5, 20)
    assert compute_goodput(c) == pytest.approx(100 / 105) and math.isinf(find_best_interval_s(c))
    # the second and every later one waits for the one before
    assert compute_goodput(replace(c, write_s=150)) == pytest.approx(100 / 155)


@pytest.mark.each("c", [
    FailureConditions(1 / 18_000, RESTART_S, 300, 2, 60),
    FailureConditions(1 / 3_000, RESTART_S, 600, 30, 500),
    FailureConditions(1 / 900, RESTART_S, 300, 60, 0),
])
def test_the_simulation_agrees_with_the_closed_form(c: FailureConditions) -> None:
    """Within three standard errors, and those are below half a per cent."""
    found = [simulated(c, 400, seed) for seed in range(60)]
    error = statistics.stdev(found) / math.sqrt(len(found))
    assert abs(statistics.mean(found) - compute_goodput(c)) < 3 * error < 0.01


def test_a_checkpoint_that_is_waited_for_is_dalys_model() -> None:
    """Equation 20 of his paper: T = M exp(R / M) (exp((tau + delta) / M) - 1) Ts / tau."""
    m, r, tau, delta = 9_000.0, 400.0, 1_200.0, 90.0
    daly = tau / (m * math.exp(r / m) * (math.exp((tau + delta) / m) - 1))
    assert compute_goodput(FailureConditions(1 / m, r, tau, delta, 0)) == pytest.approx(daly)


@pytest.mark.each(("mtbf_s", "stall_s"), [(18_000, 2), (3_600, 30), (86_400, 120)])
def test_the_best_interval_is_dalys(mtbf_s: float, stall_s: float) -> None:
    c = FailureConditions(1 / mtbf_s, RESTART_S, 1.0, stall_s, 0)
    best = find_best_interval_s(c)
    assert best == pytest.approx(daly_interval_s(stall_s, mtbf_s), rel=2e-3)
    around = [compute_goodput(replace(c, interval_s=best * factor)) for factor in (0.8, 1, 1.25)]
    assert max(around) == around[1]


def test_no_checkpoint_begins_before_the_last_is_written() -> None:
    c = FailureConditions(1 / 18_000, RESTART_S, 1.0, 0.1, 400)
    assert find_best_interval_s(c) == pytest.approx(400, rel=1e-3)


# How a run of a recipe is kept going on a profile.


H100 = cluster.load_profile("h100", needs_account=False)
SOLAR = recipes.get("solar-open-102b")


def test_a_run_is_saved_as_often_as_daly_says() -> None:
    told = plan_operation(SOLAR, H100, 512, 10.0, 100_000)
    assert told.checkpoint_bytes == count_checkpoint_bytes(SOLAR).total
    assert told.interval_s == 10 * told.interval_steps == pytest.approx(
        daly_interval_s(told.stall_s, told.mtbf_s), abs=5)
    assert told.mtbf_s / 86400 == pytest.approx(365.25 / (512 * 0.17)) and told.has_storage_rate
    assert 0.99 < told.effective_share < 1


def test_a_slow_store_sets_the_interval() -> None:
    slow = replace(H100, storage_write_gbytes_per_s=1.0)
    told = plan_operation(SOLAR, slow, 8192, 10.0, 100_000)
    assert told.interval_steps == math.ceil(told.write_s / 10) == math.ceil(told.checkpoint_bytes / 1e10)


def test_unknown_storage_and_infallible_clusters() -> None:
    silent = replace(H100, storage_write_gbytes_per_s=0, failures_per_gpu_year=0)
    told = plan_operation(SOLAR, silent, 512, 10.0, 777)
    assert not told.has_storage_rate and told.interval_steps == 777 and math.isinf(told.mtbf_s)
    assert told.write_s > 10 and told.effective_share > 0.999


@pytest.mark.parametrize("rate", [100.0, 1e7])
def test_a_cluster_that_always_fails_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"leave 8,192 GPUs no time to train: something fails every \S+ s, "
                                        r"and a checkpoint takes 7\S+ s; plan with fewer GPUs"):
        plan_operation(SOLAR, replace(H100, failures_per_gpu_year=rate), 8192, 10.0, 1000)


# Days, energy and money of runs whose figures were published.


def test_deepseek_v3() -> None:
    """2.788 M hours of an H800 at 2 dollars: 5.576 M dollars (its report, table 1)."""
    h800 = replace(H100, gpu="h800", price_per_gpu_hour=2.0)
    told = estimate_cost(2.788e6 / 2048 * 3600, 2048, h800)
    assert told.gpu_hours == pytest.approx(2.788e6) and told.usd == pytest.approx(5.576e6)
    assert told.usd_low == told.usd == told.usd_high and told.price_note.startswith("2.00 USD for")
    assert told.days == pytest.approx(56.7, abs=0.1)


def test_energy_of_a_node_for_an_hour() -> None:
    """8 H100 may draw 10.2 kW and draw 8.4; the site takes 1.3 times as much."""
    told = estimate_cost(3600, 8, H100)
    assert told.energy_kwh == pytest.approx(8.4 * 1.3, rel=5e-3)
    assert estimate_cost(3600, 8, replace(H100, node_power_w=12_000)).energy_kwh == pytest.approx(
        told.energy_kwh * 12_000 / 10_200)


def test_an_unknown_price_is_a_range() -> None:
    told = estimate_cost(3600, 1, H100)
    assert told.usd_low < told.usd < told.usd_high and told.price_note.startswith(
        "2.95 USD for a GPU and hour, typical price of 20")
    assert estimate_cost(3600, 1, replace(H100, gpu="gb300")).price_note.startswith("a guess: ")


# Checkpoint bytes equal those of real checkpoints on disk.


SMALL = ("model.vocab_size=97", "model.hidden_size=32", "model.head_dim=8", "model.num_layers=2",
         "train.precision=fp32")
MOE = (*SMALL, "model.expert_ffn_dim=16", "model.dense_ffn_dim=48")
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "experts": ("tiny-solar-open", MOE, {}),
    "rows of the vocabulary that fill it up": ("tiny-solar-open", MOE, {"tp": 2, "sp": True}),
    "ZeRO-1, bf16 with masters": ("tiny-solar-open", (*MOE, "train.precision=bf16"),
                                  {"ep": 2, "zero1": True}),
    "Muon, prediction layer, windows": ("tiny-k-exaone", (*MOE, "train.precision=bf16"), {}),
    "a frozen router": ("tiny-k-exaone", (
        *MOE, 'optim.groups=[{"pattern": "*router.weight", "frozen": true},'
        ' {"pattern": "decoder.layers.1.*", "optimizer": "adamw"}]'), {}),
    "tied embeddings, biases": ("tiny-qwen2-1.5b", (*SMALL, "model.dense_ffn_dim=48"), {}),
    "an adapter of experts": ("tiny-solar-open", (*MOE, "lora.rank=4"), {}),
    "an adapter with magnitudes": ("tiny-qwen2-1.5b", (
        *SMALL, "model.dense_ffn_dim=48", "lora.rank=4", "lora.dora=true"), {}),
}


def written(folder: str, case: str) -> dict[str, Any]:
    """Write a checkpoint of a case as a run does; returns (rank 0) its bytes as the indices, the headers of
    its files and the manifest have them."""
    recipe, settings, layout = CASES[case]
    config, parallel = apply_settings(recipes.get(recipe), list(settings)), ParallelConfig(**layout)
    world.join_world(parallel)
    model = build_model(config.model, parallel, config.train, config.gpu, lora=config.lora)
    initial_weights.initialize_weights(model, config.model, 1)
    if config.lora.on:
        model.adapter_base = AdapterBase(Path("nowhere"), "0" * 64)
    path = Path(folder) / "step-1"
    optimizer = Optimizer(model, config.optim, parallel, config.gpu)
    save_checkpoint(path, model, optimizer, {"step": 1, "tokens": 1}, {}, None)
    if dist.get_rank():
        return {}
    sizes = {"float32": 4, "bfloat16": 2}
    parts = {index.name.removesuffix(".index.json"):
             sum(sizes[e["dtype"]] * math.prod(e["shape"]) for e in json.loads(index.read_text()).values())
             for index in path.glob("*.index.json")}
    files = {name: record.size_bytes for name, record in read_manifest(path).files.items()
             if name.endswith(".safetensors")}
    headers = sum(8 + int.from_bytes((path / name).read_bytes()[:8], "little") for name in files)
    return {"parts": parts, "tensors": sum(files.values()) - headers}


@pytest.mark.deep
def test_a_real_checkpoint_has_these_bytes_whatever_its_layout(ranks: Any, job: Any, tmp_path: Path) -> None:
    jobs = {case: job(__file__, "written", 2 if layout else 1, {"folder": str(tmp_path / case), "case": case})
            for case, (_, _, layout) in CASES.items()}
    for case, (found, *_) in zip(jobs, ranks(*jobs.values()), strict=True):
        recipe, settings, _ = CASES[case]
        told = count_checkpoint_bytes(apply_settings(recipes.get(recipe), list(settings)))
        weights = found["parts"].get("model", found["parts"].get("adapter"))
        assert (weights, found["parts"]["optimizer"]) == (told.weights, told.optimizer), case
        # files hold nothing but these, and their headers
        assert found["tensors"] == told.total, case


def test_checkpoints_of_the_big_recipes() -> None:
    """102.6 G parameters with AdamW under bf16: 2 + 4 + 4 + 4 bytes each; Muon keeps one moment."""
    solar = count_checkpoint_bytes(recipes.get("solar-open-102b"))
    assert solar.total / 14 == pytest.approx(102.6e9, rel=2e-3)
    exaone = count_checkpoint_bytes(recipes.get("k-exaone-236b"))
    assert exaone.weights == pytest.approx(2 * 237.1e9, rel=2e-3)
    assert 4 * exaone.weights < exaone.optimizer < 4.1 * exaone.weights


def test_checkpoint_time_depends_on_bytes_per_process_and_storage_speed() -> None:
    config = recipes.get("solar-open-102b")
    total = count_checkpoint_bytes(config).total
    assert count_rank_bytes(config, 64) > count_rank_bytes(config, 512) > total / 512
    slow, fast = (estimate_write_times(config, 512, rate) for rate in (20e9, 1e15))
    assert slow.background_s == total / 20e9 and slow.stall_s == fast.stall_s < 5
    assert fast.background_s < slow.background_s
    waits = apply_settings(config, ["train.async_save=false"])
    assert estimate_write_times(waits, 512, 20e9).stall_s == total / 20e9
