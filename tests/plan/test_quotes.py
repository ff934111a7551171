"""Quotes of runs: the price is the sum of stages, and each figure of a page follows from others."""

import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.cluster_plan import plan_on_cluster, plan_with_sweep
from megatron_sov.plan.footprint.gpu_capacity import find_fullest_stage
from megatron_sov.plan.pages import layout_report, quotes as quote_tables
from megatron_sov.plan.pages.quotes import (
    Quote, QuotedMemory, build_tables, format_gib, format_table, group_quotes, label_groups, quote_to_json,
    sum_quotes)
from megatron_sov.plan.pricing import (
    MAX_NODES, Machines, Pricing, RunStage, build_pricing, find_price, group_stages, list_run_stages,
    load_machines, quote_stage, refuse_precision)
from megatron_sov.plan.search.recommended_layouts import GRAPHS
from megatron_sov.plan.speed.parameters import load_default_parameters
from megatron_sov.plan.speed.step import estimate_step
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.runs.obs.routing import read_routes
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.units import GIB
from tests.plan.test_cluster_plan import request


@pytest.fixture(scope="module")
def quotes() -> list[Quote]:
    """The quotes of Solar Open's four stages on 60 nodes of B200s."""
    pricing = get_pricing(load_machines("b200", 60))
    return [quote_stage(stage, pricing)
            for stage in list_run_stages(recipes.get("solar-open-102b"), pricing.num_ranks)]


def test_figures_follow_from_each_other(quotes: list[Quote]) -> None:
    for q in quotes:
        assert q.step_s == pytest.approx(sum(q.seconds.values()))
        assert q.tokens_per_s_per_gpu == pytest.approx(13440 * 4096 / q.step_s / 480)
        assert q.hours == pytest.approx(q.tokens / q.tokens_per_s_per_gpu / 480 / 3600)
        assert q.days == q.hours / 24 and q.gpu_hours == pytest.approx(q.days * 24 * 480)
        assert q.mfu == pytest.approx(q.tflops_per_gpu * 1e12 / 2.25e15)
        # 12 B active parameters: 6 FLOPs per parameter and token, plus attention
        assert q.tflops_per_gpu * 1e12 / q.tokens_per_s_per_gpu == pytest.approx(6 * 12.05e9, rel=0.15)
        assert q.cost_range_usd[0] <= q.cost_usd <= q.cost_range_usd[1]
        assert q.memory.total_bytes <= q.memory.limit_bytes


def test_totals_are_sums(quotes: list[Quote]) -> None:
    total = sum_quotes(quotes)
    assert total.tokens == sum(q.tokens for q in quotes)
    assert total.days == pytest.approx(sum(q.days for q in quotes))
    assert total.cost_usd == pytest.approx(sum(q.cost_usd for q in quotes))
    # a quote without a price range counts as a range from its cost to its cost
    quote = replace(quotes[0], cost_range_usd=(0.0, 0.0))
    assert sum_quotes([quote]).cost_range_usd == (quote.cost_usd, quote.cost_usd)


def test_a_quote_is_json(quotes: list[Quote]) -> None:
    parsed = json.loads(json.dumps(quote_to_json(quotes[0])))
    assert parsed["step_s"] == quotes[0].step_s and parsed["memory"]["total_bytes"] == sum(
        parsed["memory"]["by_component"].values())
    assert math.isclose(parsed["gpu_hours"], quotes[0].gpu_hours)


def test_tables_merge_equal_stages(quotes: list[Quote]) -> None:
    tables = {table.title: table for table in build_tables(quotes)}
    assert [row[0] for row in tables["What it takes"].rows] == ["1", "2.A", "2.B", "2.C", "total"]
    assert label_groups(group_quotes(quotes, lambda q: (q.seconds,))) == ["each stage"]
    other = replace(quotes[1], seconds={"dense": 1.0})
    assert label_groups(group_quotes([quotes[0], other], lambda q: (q.seconds,))) == ["1", "2.A"]
    for table in build_tables(quotes):
        assert {len(row) for row in table.rows} == {len(table.head)}
        body = format_table(table).splitlines()[1:]
        assert len({len(line) for line in body if line.split()[0] != "total"}) == 1  # right-aligned


# Formatted amounts.

def test_memory_has_few_digits() -> None:
    assert [format_gib(n * 2**30) for n in (0, 0.0123, 38.84, 2048)] == ["0.0", "0.012", "38.8", "2,048.0"]


# Tables of quotes: unique words, no empty rows, and figures with units.

def build_quote(**changes: Any) -> Quote:
    """Return the quote of a stage that takes one hour on 8 GPUs, with changed fields."""
    seconds: Mapping[str, float] = {"dense": 0.6, "memory": 0.3, "dp": 0.1}
    values: dict[str, Any] = {
        "name": "one", "kind": "phase", "gpu": "H100-80GB", "num_gpus": 8, "tokens": 3_600_000, "steps": 3600,
        "seq_len": 1000, "global_batch_size": 1, "layout": {"pp": 1},
        "memory": QuotedMemory({"weights": 30 * GIB, "update": GIB // 100}, 75 * GIB), "seconds": seconds,
        "tokens_per_s_per_gpu": 125.0, "tflops_per_gpu": 1.0, "mfu": 0.4, "hours": 1.0, "cost_usd": 23.6,
        "cost_range_usd": (16.0, 40.0), "notes": ("Cost: 2.95 USD.",)}
    return Quote(**(values | changes))


def test_components_differ_from_memory_items() -> None:
    names = [row[0] for row in quote_tables.build_step_table([build_quote()]).rows]
    assert names == ["dense", "memory-bound", "dp messages", "step"]
    memory_rows = quote_tables.build_memory_table([build_quote()]).rows
    assert [row[0] for row in memory_rows] == ["weights", "total", "may take"]


def test_totals_are_printed_only_for_several_stages() -> None:
    assert len(quote_tables.build_stage_table([build_quote()]).rows) == 1
    *_, total = quote_tables.build_stage_table([build_quote(), build_quote(name="two")]).rows
    assert total[0] == "total" and total[3] == "7.2 M" and total[-1] == "$47"


def test_notes_are_printed_once_with_the_price_range() -> None:
    assert quote_tables.list_notes([build_quote(), build_quote(name="two")]) == [
        "Cost: 2.95 USD.", "At the prices that were found the whole is $32 to $80."]
    assert quote_tables.list_notes([build_quote(cost_range_usd=(23.6, 23.6))]) == ["Cost: 2.95 USD."]


# A stage's price is the sum of parts with their own assumptions.

def get_pricing(where: Machines) -> Pricing:
    """Return the pricing of a cluster whose GPUs are known."""
    pricing = build_pricing(where)
    assert pricing is not None
    return pricing


def get_first_stage(recipe: str, pricing: Pricing, *settings: str) -> RunStage:
    return list_run_stages(apply_settings(recipes.get(recipe), list(settings)), pricing.num_ranks)[0]


def test_memory_is_of_the_fullest_process_and_time_of_a_step() -> None:
    pricing = get_pricing(load_machines("h100", 2))
    stage = get_first_stage("qwen3-8b", pricing, "parallel.tp=2", "parallel.sp=true")
    quote = quote_stage(stage, pricing)
    _, account = find_fullest_stage(stage.config, 16)
    assert quote.memory.total_bytes == pricing.count_bytes(stage) == account.total
    assert quote.step_s == pytest.approx(pricing.time_step(stage).total_s)
    assert quote.seconds == pricing.time_step(stage).components
    assert quote.num_gpus == 16 and quote.gpu == "H100-80GB"


def test_only_models_with_experts_meet_imbalance() -> None:
    pricing = get_pricing(load_machines("b200", 8))
    dense, sparse = get_first_stage("qwen3-8b", pricing), get_first_stage("qwen3-moe-30b", pricing)
    assert pricing.build_workload(dense).imbalance == 1 < pricing.build_workload(
        sparse).imbalance == load_default_parameters().real_imbalance
    assert not any("busiest" in note for note in quote_stage(dense, pricing).notes)
    assert any("busiest" in note for note in quote_stage(sparse, pricing).notes)


@pytest.mark.parametrize(("ep", "pp"), [(8, 1), (4, 2)])
def test_recorded_routes_price_each_layer_by_its_busiest_process(tmp_path: Path, ep: int, pp: int) -> None:
    """Compare with brute force: at 3 evaluations, 200 tokens choose 8 of 128 experts in each of 48 layers."""
    draw, num_layers = random.Random(0), 48
    log, busiest = EventLog(tmp_path / "events.jsonl"), [0.0] * num_layers
    for step in range(3):
        shares = []
        for layer in range(num_layers):
            popularity = [draw.random() ** (layer / 12) for _ in range(128)]
            experts = [expert for _ in range(200) for expert in draw.choices(range(128), popularity, k=8)]
            tokens = Counter(expert * ep // 128 for expert in experts)
            busiest[layer] += max(tokens.values()) / (len(experts) / ep) / 3
            shares.append([experts.count(expert) / len(experts) for expert in range(128)])
        log.write("expert_load", step=step, load=shares, layers=[*range(1, num_layers + 1)])
        log.write("expert_load", step=step, load=[[1.0]], layers=[1], source="web")
    log.close()
    where = load_machines("h100", 2)
    routes = read_routes(tmp_path, recipes.get("qwen3-moe-30b").model)
    pricing = get_pricing(replace(where, routes=routes))
    stage = get_first_stage("qwen3-moe-30b", pricing, f"parallel.ep={ep}", f"parallel.pp={pp}")
    slowest = busiest[num_layers - num_layers // pp:]  # the last stage: later layers are less balanced
    work = pricing.build_workload(stage)
    assert work.imbalance == pytest.approx(sum(slowest) / len(slowest)) and work.imbalance > 1.1
    seconds = [estimate_step(replace(work, imbalance=load)).total_s for load in slowest]
    assert pricing.time_step(stage).total_s == pytest.approx(sum(seconds) / len(seconds))
    assert f"{work.imbalance:.2f} times as many tokens as the mean, as {tmp_path} recorded" in " ".join(
        quote_stage(stage, pricing).notes)


@pytest.mark.each(("events", "message"), [
    ([], "has no expert load; name the folder of a run of a model with experts"),
    ([{"load": [[0.5, 0.5]], "layers": [2]}], "are not those of 48 layers with 128 experts"),
    ([{"load": [[0.0] * 128] * 48, "layers": [*range(1, 49)]}], "are not those of 48"),
    ([{"load": [[1.0] * 127 + [-1.0]] * 48, "layers": [*range(1, 49)]}], "are not those of 48"),
    ([{"load": [[1.0] * 127 + [float("inf")]] * 48, "layers": [*range(1, 49)]}], "are not those of 48"),
    ([{"load": [[1.0] * 127 + ["x"]] * 48, "layers": [*range(1, 49)]}], "are not those of 48"),
    ([{"load": [[1.0] * 128] * 48, "layers": None}], "are not those of 48"),
    ([{"load": [[1.0] * 128] * 48, "layers": [*range(-8, 40)]}], "are not those of 48"),
    ([{"load": [[1.0] * 128] * 48, "layers": [1] * 48}], "are not those of 48"),
    ([{"load": [[1.0] * 128] * 47 + [[1.0]], "layers": [*range(1, 49)]}], "are not those of 48")])
def test_routes_of_another_model_are_refused(tmp_path: Path, events: list[dict[str, Any]],
                                             message: str) -> None:
    lines = [json.dumps({"event": "expert_load", "time_s": 0, "step": 1} | event) for event in events]
    (tmp_path / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError, match=f"^--routes {tmp_path}: .*{message}"):
        read_routes(tmp_path, recipes.get("qwen3-moe-30b").model)


def test_notes_name_the_price_with_the_opposite_choice_of_graphs() -> None:
    pricing = get_pricing(load_machines("b200", 60))
    layout = ("parallel.pp=3", "train.recompute=selective", 'gpu.recompute_modules=["moe_act"]',
              "gpu.expert_spill=1.2")
    eager, graphed = (quote_stage(get_first_stage("solar-open-102b", pricing, *layout, setting), pricing)
                      for setting in ("gpu.cuda_graphs=[]", GRAPHS))
    for quote, setting, other in ((eager, GRAPHS, graphed), (graphed, "gpu.cuda_graphs=[]", eager)):
        slow = next(note for note in other.notes if "2 times as slow" in note).split()[-1].rstrip(".")
        assert any(note.startswith(f"With {setting} the MFU is {other.mfu:.1%}, and {slow} with the slow")
                   for note in quote.notes)
    recomputed = quote_stage(get_first_stage("solar-open-102b", pricing, "train.recompute=true"), pricing)
    assert not any("cuda_graphs" in note for note in recomputed.notes), "graphs exclude full recomputation"


def test_the_price_of_deepseek_v3_equals_its_report() -> None:
    """DeepSeek-V3's report, table 1: 2.788 M hours of H800s at 2 dollars cost 5.576 M dollars."""
    profile = load_machines("h100", 1).profile
    price = find_price(replace(profile, gpu="h800", price_per_gpu_hour=2.0))
    assert price.low == price.typical == price.high and price.source.startswith("2.00 USD for")
    assert 2.788e6 * price.typical == pytest.approx(5.576e6)


def test_an_unknown_price_is_a_range() -> None:
    profile = load_machines("h100", 1).profile
    price = find_price(profile)
    assert price.low < price.typical < price.high
    assert price.source.startswith("2.95 USD for a GPU and hour, typical price of 20")
    assert find_price(replace(profile, gpu="gb300")).source.startswith("a guess: ")


def test_a_profile_with_a_price_sets_the_cost() -> None:
    where = load_machines("h100", 1)
    cheap = replace(where, profile=replace(where.profile, price_per_gpu_hour=1.0))
    quote = quote_stage(get_first_stage("qwen3-8b", get_pricing(cheap)), get_pricing(cheap))
    assert quote.cost_usd == pytest.approx(quote.gpu_hours) and quote.cost_range_usd == (quote.cost_usd,) * 2


@pytest.mark.each(("cluster", "unsupported", "supported"), [
    ("a100", "tensorwise", "none"), ("h100", "nvfp4", "tensorwise"),
    # MXFP8 needs Blackwell, although Hopper has FP8
    ("h100", "mxfp8", "tensorwise"), ("h200", "mxfp8", "tensorwise"), ("a100", "mxfp8", "none")])
def test_an_fp8_recipe_that_a_chip_lacks_is_refused(cluster: str, unsupported: str, supported: str) -> None:
    config = recipes.get("qwen3-8b")
    fp8 = replace(config, train=replace(config.train, fp8=unsupported))
    chip = load_machines(cluster, 1).chip
    assert chip is not None
    refuse_precision(config, chip)
    refuse_precision(replace(config, train=replace(config.train, fp8=supported)), chip)
    with pytest.raises(UserError, match=f"^train.fp8 = {unsupported}: .* --set train.fp8={supported}"):
        refuse_precision(fp8, chip)


# The output of `megatron-sov plan` for a run.

RAMP = ["train.ramp_from_batch_size=8", "train.ramp_increment=8", "train.ramp_steps=40"]


def test_timetable_lists_every_step_at_which_settings_change() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"),
                            ["optim.schedule=wsd", "optim.rewarm=[[70, 9]]", *RAMP])
    rows = {row.step: row for row in layout_report.build_timetable(config)}
    # two steps each: end of warm-up, of ramp, of re-warming, start of decay; then each phase's first step
    assert {20, 21, 40, 41, 79, 80, 160, 161} <= set(rows)
    assert {start + 1 for start in config.phase_starts()} <= set(rows)
    assert rows[40].samples == 8 and rows[41].samples == 16 and rows[1].tokens == 8 * 256
    assert rows[200].tokens == (40 * 8 + 160 * 16) * 256  # steps x batch size x sequence length
    assert rows[20].lr == rows[160].lr == pytest.approx(4e-3) and rows[200].lr == pytest.approx(2e-4)
    for step, row in rows.items():
        assert row.lr == Schedule(config).learning_rate(step - 1)


def test_timetable_of_a_long_ramp_stays_short() -> None:
    config = apply_settings(recipes.get("solar-open-102b"), [
        "train.ramp_from_batch_size=480", "train.ramp_increment=480", "train.ramp_steps=20000"])
    assert 30 < len(layout_report.build_timetable(config)) < 100
    assert len(Schedule(config).stretches) == 27 + 4


def test_the_command_prints_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "k-exaone-236b"]) == 0
    printed = capsys.readouterr().out
    others = "spanish 2.5 %, german 2.5 %, japanese 2.5 %, vietnamese 2.5 %"
    assert f"foundation: web 70 %, korean 10 %, {others}, code 10 %" in printed
    assert "#" * layout_report.BAR_CHARACTERS in printed
    assert main(["plan", "k-exaone-236b", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == pytest.approx(11e12, rel=1e-4) and plan["schedule"][-1]["step"] == plan["steps"]
    assert main(["plan", "k-exaone-236b", "--set", "optim.decay_share=2"]) == 2
    assert "optim.decay_share = 2 must be at most 1" in capsys.readouterr().err
    assert main(["plan", "k-exaone-236b", "--nproc", "24"]) == 2
    assert "must divide the number of processes, 24" in capsys.readouterr().err


# A run is priced in stages: phases of a curriculum, or the stages of `extend`.

@pytest.mark.each("recipe", ["solar-open-102b", "k-exaone-236b", "tiny-solar-open", "qwen3-8b"])
def test_phases_have_the_steps_and_tokens_of_the_schedule(recipe: str) -> None:
    config = apply_settings(recipes.get(recipe), ["train.ramp_from_batch_size=8", "train.ramp_increment=8",
                                                  "train.ramp_steps=30", "train.tokens=10000000000"])
    schedule, stages = Schedule(config), list_run_stages(config, 8)
    assert [s.name for s in stages] == [p.name for p in config.data.phases]
    assert sum(s.steps for s in stages) == schedule.num_steps
    assert sum(s.tokens for s in stages) == schedule.count_tokens(schedule.num_steps - 1)
    assert {s.kind for s in stages} == {"phase"}
    # only the first phase has the batch-size ramp
    assert [s.config.train.ramp_from_batch_size for s in stages] == [8] + [0] * (len(stages) - 1)


def test_extension_stages_equal_those_of_extend() -> None:
    config = recipes.get("k-exaone-236b-extend")
    stages = list_run_stages(config, 512)
    assert [(s.name, s.kind, s.phase.seq_len, s.global_batch_size, s.steps) for s in stages] == [
        ("32k", "extension stage", 32768, 1024, 2000), ("256k", "extension stage", 262144, 128, 2000)]
    assert [s.tokens for s in stages] == [2000 * 1024 * 32768] * 2
    # `extend` packs samples of shorter stages into rows of the longest one, unless the user has set the size
    assert [s.config.train.micro_batch_size for s in stages] == [8, 1]
    fixed_stages = list_run_stages(config, 512, micro_batch_set=True)
    assert [s.config.train.micro_batch_size for s in fixed_stages] == [1, 1]
    for stage in stages:
        stage.config.check(512)


def test_stages_with_equal_steps_are_one_group() -> None:
    stages = list_run_stages(recipes.get("solar-open-102b"), 480)
    assert [(first.name, len(same)) for first, same in group_stages(stages)] == [("1", 4)]
    assert len(group_stages(list_run_stages(recipes.get("solar-open-102b-extend"), 480))) == 2


# Nodes of a profile: number, GPUs, limits, and implausible numbers.

def test_nodes_of_gpus() -> None:
    machines = load_machines("b200", 60)
    assert machines.num_ranks == 480 and machines.chip is not None
    assert 0.94 < machines.limit_bytes / machines.chip.memory_bytes < 0.96
    assert machines.with_nodes(3).num_ranks == 24 and load_machines("b200", None).nodes == 1


def test_unknown_links_are_reported_if_needed(tmp_path: Path) -> None:
    (file := tmp_path / "mine.yaml").write_text("description: no network\ngpu: h100\n")
    one = load_machines(str(file), 1)
    assert one.compute_links().domain == 8
    with pytest.raises(UserError, match=r"--cluster .*mine.yaml: network_gbits_per_gpu is missing"):
        one.with_nodes(2).compute_links()


@pytest.mark.each("nodes", [0, -3, MAX_NODES + 1])
def test_fewer_than_one_node_is_refused(nodes: int) -> None:
    with pytest.raises(UserError, match=f"--nodes {nodes}: must be at least 1"):
        load_machines("h100", nodes)


# A run on a cluster: the layout that it uses, and the fields that scripts read.

@pytest.mark.deep
def test_a_set_layout_is_kept_and_an_open_one_recommended() -> None:
    where = load_machines("h100", 64)
    open_ = plan_on_cluster(request("k-exaone-236b"), where)
    fixed = plan_on_cluster(request("k-exaone-236b", "parallel.pp=16"), where)
    assert (open_.config.parallel.pp, open_.config.parallel.ep) == (8, 8)
    assert fixed.config.parallel.pp == 16
    assert fixed.config.parallel.ep == recipes.get("k-exaone-236b").parallel.ep


def test_a_search_needs_known_gpus() -> None:
    with pytest.raises(UserError, match="--sweep with --cluster one-node: gpu is empty in the profile"):
        plan_with_sweep(request("tiny-solar-open"), load_machines("one-node", 1), ["tiny-solar-open"])
