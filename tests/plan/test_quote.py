"""What is paid for a run is the sum of its stages, and every figure follows from its neighbours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.errors import UserError
from megatron_sov.obs.units import GIB
from megatron_sov.plan import quote_tables
from megatron_sov.plan.amounts import dollars, energy, gib, percent, seconds
from megatron_sov.plan.fitting import fullest
from megatron_sov.plan.machines import Machines, machines
from megatron_sov.plan.pricing import Pricing, pricing, quote, refuse_precision
from megatron_sov.plan.quote import Memory, Quote, Traffic, as_json, totals
from megatron_sov.plan.quote_tables import alike, labels, tables, text
from megatron_sov.plan.run_stages import RunStage, run_stages
from megatron_sov.plan.speed.parameters import default


@pytest.fixture(scope="module")
def quotes() -> list[Quote]:
    of = pricing(machines("b200", 60))
    assert of is not None
    return [quote(stage, of) for stage in run_stages(recipes.get("solar-open-102b"), of.num_ranks)]


def test_figures_follow_from_each_other(quotes: list[Quote]) -> None:
    for q in quotes:
        assert q.step_s == pytest.approx(sum(q.seconds.values()))
        assert q.tokens_per_s_per_gpu == pytest.approx(13440 * 4096 / q.step_s / 480)
        assert q.hours == pytest.approx(q.tokens / q.tokens_per_s_per_gpu / 480 / 3600)
        assert q.days >= q.hours / 24 and q.gpu_hours == pytest.approx(q.days * 24 * 480)
        assert q.mfu == pytest.approx(q.tflops_per_gpu * 1e12 / 2.25e15)
        # 12 B active parameters: 6 FLOPs each and a token, attention beside
        assert q.tflops_per_gpu * 1e12 / q.tokens_per_s_per_gpu == pytest.approx(6 * 12.05e9, rel=0.15)
        assert q.cost_range_usd[0] <= q.cost_usd <= q.cost_range_usd[1]
        assert 0.9 < q.effective_share < 1
        assert q.memory.total_bytes <= q.memory.limit_bytes
        assert q.checkpoint is not None
        # weights in bf16; master weights and two moments in float32
        assert q.checkpoint.size_bytes == pytest.approx(14 * 102.65e9, rel=0.01)
        assert q.checkpoint.interval_s == pytest.approx(q.checkpoint.interval_steps * q.step_s)


def test_totals_are_sums(quotes: list[Quote]) -> None:
    t = totals(quotes)
    assert t.tokens == sum(q.tokens for q in quotes)
    assert t.days == pytest.approx(sum(q.days for q in quotes))
    assert t.cost_usd == pytest.approx(sum(q.cost_usd for q in quotes))
    assert t.effective_share == pytest.approx(quotes[0].effective_share)
    assert totals([replace(quotes[0], cost_range_usd=(0.0, 0.0))]).cost_range_usd == (quotes[0].cost_usd,) * 2


def test_a_quote_is_plain_values(quotes: list[Quote]) -> None:
    said = json.loads(json.dumps(as_json(quotes[0])))
    assert said["step_s"] == quotes[0].step_s and said["memory"]["total_bytes"] == sum(
        said["memory"]["by_component"].values())
    assert math.isclose(said["gpu_hours"], quotes[0].gpu_hours)


def test_tables_show_alike_stages_once(quotes: list[Quote]) -> None:
    found = {table.title: table for table in tables(quotes)}
    assert [row[0] for row in found["What it takes"].rows] == ["1", "2.A", "2.B", "2.C", "total"]
    assert labels(alike(quotes, lambda q: (q.seconds,))) == ["each stage"]
    other = replace(quotes[1], seconds={"dense": 1.0})
    assert labels(alike([quotes[0], other], lambda q: (q.seconds,))) == ["1", "2.A"]
    for table in tables(quotes):
        assert {len(row) for row in table.rows} == {len(table.head)}
        body = text(table).splitlines()[1:]
        assert len({len(line) for line in body if line.split()[0] != "total"}) == 1  # right-aligned


# Amounts as people read them.


def test_amounts_have_units_and_few_digits() -> None:
    assert [gib(n * 2**30) for n in (0, 0.0123, 38.84, 2048)] == ["0.0", "0.012", "38.8", "2,048.0"]
    assert [seconds(s) for s in (0, 4e-6, 0.0312, 1.523, 250)] == [
        "0 s", "4 us", "31.2 ms", "1.52 s", "250 s"]
    assert [dollars(d) for d in (0.5, 12_345.6, 4.214e6)] == ["$0.50", "$12,346", "$4.21 M"]
    assert [energy(e) for e in (830, 12_300, 2.31e6)] == ["830 kWh", "12.3 MWh", "2.31 GWh"]
    assert [percent(p) for p in (0, 0.004, 0.43, 0.972, 1)] == ["0 %", "0.4 %", "43 %", "97.2 %", "100 %"]


# Tables of quotes: words that mean one thing, nothing where nothing is, and figures with their units.


def a_quote(**changes: Any) -> Quote:
    """Return a stage of one hour on 8 GPUs."""
    seconds: Mapping[str, float] = {"dense": 0.6, "memory": 0.3, "dp": 0.1}
    values: dict[str, Any] = {
        "name": "one", "kind": "phase", "gpu": "H100-80GB", "num_gpus": 8, "tokens": 3_600_000, "steps": 3600,
        "seq_len": 1000, "global_batch_size": 1, "layout": {"pp": 1},
        "memory": Memory({"weights": 30 * GIB, "update": GIB // 100}, 75 * GIB), "seconds": seconds,
        "traffic": (Traffic("dp", "between", 5e9, 0.1),), "tokens_per_s_per_gpu": 125.0,
        "tflops_per_gpu": 1.0, "mfu": 0.4, "hours": 1.0, "effective_share": 1.0, "energy_kwh": 11.0,
        "cost_usd": 23.6, "cost_range_usd": (16.0, 40.0), "notes": ("Cost: 2.95 USD.",)}
    return Quote(**(values | changes))


def test_components_are_told_apart_from_items_of_memory() -> None:
    told = [row[0] for row in quote_tables.step([a_quote()]).rows]
    assert told == ["dense", "memory-bound", "dp messages", "step"]
    assert [row[0] for row in quote_tables.memory([a_quote()]).rows] == ["weights", "total", "may take"]


def test_items_that_are_next_to_nothing_share_a_line() -> None:
    found = quote_tables.seen(Memory({"weights": 1000, "a": 5, "b": 6}, 0), share=0.01)
    assert found == {"weights": 1000, quote_tables.OTHERS: 11}


def test_a_job_without_gpus_has_no_speed_and_sends_nothing() -> None:
    job = a_quote(name="reward", num_gpus=0, gpu="", traffic=(), tokens_per_s_per_gpu=0.0, mfu=0.0)
    (row,) = quote_tables.stages([job]).rows
    assert row[5:7] == ["-", "-"]
    assert "What a GPU sends in a step, before overlap" not in {t.title for t in quote_tables.tables([job])}


def test_totals_stand_below_several_stages_alone() -> None:
    assert len(quote_tables.stages([a_quote()]).rows) == 1
    *_, total = quote_tables.stages([a_quote(), a_quote(name="two")]).rows
    assert total[0] == "total" and total[3] == "7.2 M" and total[-2:] == ["22 kWh", "$47"]


def test_the_pipeline_stage_is_named_where_there_is_a_pipeline() -> None:
    piped = a_quote(layout={"pp": 4}, memory=Memory({"weights": GIB}, 75 * GIB, stage=3))
    assert quote_tables.memory([piped]).title == "Memory of the fullest GPU in GiB, pipeline stage 4"
    assert quote_tables.memory([a_quote()]).title == "Memory of the fullest GPU in GiB"


def test_notes_are_said_once_with_the_range_of_prices() -> None:
    assert quote_tables.notes([a_quote(), a_quote(name="two")]) == [
        "Cost: 2.95 USD.", "At the prices that were found the whole is $32 to $80."]
    assert quote_tables.notes([a_quote(cost_range_usd=(23.6, 23.6))]) == ["Cost: 2.95 USD."]


# A stage's price is made of the parts that the wings tell apart, each with its own assumption.


def on(where: Machines) -> Pricing:
    found = pricing(where)
    assert found is not None
    return found


def first(recipe: str, of: Pricing, *settings: str) -> RunStage:
    return run_stages(apply_settings(recipes.get(recipe), list(settings)), of.num_ranks)[0]


def test_a_profile_without_gpus_prices_nothing() -> None:
    assert pricing(machines("local", 1)) is None


def test_memory_and_seconds_are_those_of_the_fullest_process_and_of_a_step() -> None:
    of = on(machines("h100", 2))
    stage = first("qwen3-8b", of, "parallel.tp=2", "parallel.sp=true")
    told = quote(stage, of)
    assert told.memory.total_bytes == of.needs(stage) == fullest(stage.config, 16)[1].total
    assert told.step_s == pytest.approx(of.step(stage).total_s)
    assert told.seconds == of.seconds(stage)
    assert {(t.group, t.link) for t in told.traffic if t.num_bytes} >= {("tp", "inside")}
    assert told.num_gpus == 16 and told.gpu == "H100-80GB"


def test_only_models_with_experts_meet_imbalance() -> None:
    of = on(machines("b200", 8))
    dense, sparse = first("qwen3-8b", of), first("qwen3-moe-30b", of)
    assert of.workload(dense).imbalance == 1 < of.workload(sparse).imbalance == default().real_imbalance
    assert not any("busiest" in note for note in quote(dense, of).notes)
    assert any("busiest" in note for note in quote(sparse, of).notes)


def test_what_nobody_has_said_of_the_storage_is_told() -> None:
    where = machines("h100", 1)
    bare = replace(where, profile=replace(where.profile, storage_write_gbytes_per_s=0.0))
    assert any("storage_write_gbytes_per_s" in n for n in quote(first("qwen3-8b", on(bare)), on(bare)).notes)
    assert not any("storage" in n for n in quote(first("qwen3-8b", on(where)), on(where)).notes)


def test_own_parameters_and_own_price_change_what_they_are_about() -> None:
    where = machines("h100", 1)
    cheap = replace(where, profile=replace(where.profile, price_per_gpu_hour=1.0))
    told, stage = quote(first("qwen3-8b", on(cheap)), on(cheap)), first("qwen3-8b", on(where))
    assert told.cost_usd == pytest.approx(told.gpu_hours) and told.cost_range_usd == (told.cost_usd,) * 2
    slow = Pricing(where, replace(default(), step_overhead_s=default().step_overhead_s + 10))
    assert slow.step(stage).total_s == pytest.approx(on(where).step(stage).total_s + 10)


@pytest.mark.parametrize(("cluster", "asked", "works"), [
    ("a100", "tensorwise", "none"), ("h100", "nvfp4", "tensorwise"),
    # MXFP8 is Blackwell's, although Hopper has FP8
    ("h100", "mxfp8", "tensorwise"), ("h200", "mxfp8", "tensorwise"), ("a100", "mxfp8", "none")])
def test_products_that_a_chip_has_none_of(cluster: str, asked: str, works: str) -> None:
    config = recipes.get("qwen3-8b")
    fp8 = replace(config, train=replace(config.train, fp8=asked))
    chip = machines(cluster, 1).chip
    assert chip is not None
    refuse_precision(config, chip)
    refuse_precision(replace(config, train=replace(config.train, fp8=works)), chip)
    with pytest.raises(UserError, match=f"^train.fp8 = {asked}: .* --set train.fp8={works}"):
        refuse_precision(fp8, chip)
