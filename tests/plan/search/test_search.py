"""What a search says where nothing fits: how many nodes would do."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.commands.submit import COMMANDS
from megatron_sov.config import ParallelConfig, apply_settings
from megatron_sov.obs.units import GIB
from megatron_sov.plan.machines import machines
from megatron_sov.plan.pricing import Pricing
from megatron_sov.plan.run_stages import run_stages
from megatron_sov.plan.search.advice import set_line, submit_line
from megatron_sov.plan.search.reasons import SHOWN_RULES, broken, name, recomputes, sizes, too_large, why
from megatron_sov.plan.search.search import NODES_TRIED, Search, fewest_nodes, fits_somehow, kinds, told_nodes
from megatron_sov.plan.search.space import Choice, choices, layouts, own_choice, space_of
from megatron_sov.plan.search.sweep import Common, Found, Sweep, common
from megatron_sov.plan.search.telling import Told
from megatron_sov.plan.speed.parameters import default
from megatron_sov.settings import Code, Problem
from megatron_sov.slurm.stages import work_of


def prices(nodes: int) -> Pricing:
    return Pricing(machines("h100", nodes), default())


def test_numbers_of_nodes_grow_to_what_clusters_have() -> None:
    assert NODES_TRIED[:33] == (*range(1, 33), 40) and NODES_TRIED[-1] == 4096
    assert sorted(set(NODES_TRIED)) == list(NODES_TRIED)


@pytest.mark.parametrize(("nodes", "said"), [
    (6, "the fewest nodes that it fits are 6: --nodes 6"), (48, "48 nodes are enough: --nodes 48"),
    (None, "no number of nodes up to 4,096 is enough")])
def test_nodes_in_words(nodes: int | None, said: str) -> None:
    assert told_nodes(nodes).startswith(said)


def test_the_fewest_nodes_are_those_below_which_nothing_fits() -> None:
    config = recipes.get("k-exaone-236b")
    assert fewest_nodes(config, prices(2)) == 6
    assert fits_somehow(config, prices(6)) and not fits_somehow(config, prices(2))


def test_stages_of_equal_length_and_batch_are_searched_once() -> None:
    alike = kinds(recipes.get("solar-open-102b"), 512)
    ((first, same),) = alike
    assert len(same) == 4 and first.tokens == sum(stage.tokens for stage in same)
    assert [s.phase.seq_len for s, _ in kinds(recipes.get("k-exaone-236b-extend"), 512)] == [32768, 262144]


# What a plan tells to type is a command that `submit` takes.


@pytest.mark.parametrize(("recipe", "stage"), [
    ("tiny-solar-open", "pretrain"), ("tiny-k-exaone-extend", "extend"), ("tiny-typhoon-s", "sft"),
    ("tiny-solar-open-dpo", "prefer"), ("tiny-typhoon-s-opd", "distill"),
    ("tiny-solar-open-rl", "rl-train")])
def test_submit_takes_the_line_of_every_objective(recipe: str, stage: str) -> None:
    config = apply_settings(recipes.get(recipe), ["parallel.tp=2"])
    line = submit_line(config, machines("b200", 2), [recipe], ["parallel.tp=2", "parallel.sp=true"])
    program, command, said, *words = shlex.split(line)
    assert (program, command, said) == ("megatron-sov", "submit", stage)
    assert words[:6] == ["--cluster", "b200", "--nodes", "2", "--account", "ACCOUNT"]
    work = work_of(stage, words[6:], COMMANDS)
    assert work.config is not None and work.config.parallel.tp == 2


def test_settings_are_quoted_for_a_shell() -> None:
    said = set_line(['gpu.recompute_modules=["moe"]', "parallel.tp=2"])
    assert shlex.split(said) == ["--set", 'gpu.recompute_modules=["moe"]', "--set", "parallel.tp=2"]
    assert set_line([]) == ""


# What is said of a search: the place of the layout that a plan takes otherwise, and roomier ones.


CONFIG = recipes.get("qwen3-8b")
FAST, ROOMY, SLOW = (Choice(ParallelConfig(tp=tp, zero1=True), 1, (False, ())) for tp in (1, 2, 4))


def told(recommended: Choice, *found: tuple[Choice, int, float]) -> Told:
    """Return a search of one stage that found layouts of so many bytes and seconds."""
    sweep = Sweep(run_stages(CONFIG, 8)[0], num_looked_at=9,
                  ranked=[Found(choice, needs, {"dense": s}, s) for choice, needs, s in found])
    of = Search(CONFIG, [sweep], ["pretrain"], common([sweep]))
    return Told(of, machines("h100", 1), recommended, [], "megatron-sov submit")


def test_the_layout_that_is_taken_otherwise_has_its_place() -> None:
    found = (FAST, 60 * GIB, 1.0), (SLOW, 60 * GIB, 1.5)
    assert told(FAST, *found).lines()[:2] == [
        "looked at 9 layouts on 8 GPUs: 2 fit",
        "without --sweep: data parallel alone, micro-batch 1, recomputes nothing; number 1 of 2"]
    assert told(SLOW, *found).lines()[1].endswith("number 2 of 2, 50.0 % slower")
    assert told(ROOMY, *found).lines()[1].endswith("does not fit, or breaks a rule")


def test_a_layout_that_spares_memory_is_told_where_it_is_hardly_slower() -> None:
    said = "20.0 GiB less, 1.0 % slower: tp 2, micro-batch 1, recomputes nothing"
    assert said in told(FAST, (FAST, 60 * GIB, 1.0), (ROOMY, 40 * GIB, 1.01)).lines()
    for needs, seconds in ((58 * GIB, 1.01), (40 * GIB, 1.1)):
        lines = told(FAST, (FAST, 60 * GIB, 1.0), (ROOMY, needs, seconds)).lines()
        assert not any("GiB less" in line for line in lines)


def test_speed_follows_from_the_step_and_scripts_read_the_same() -> None:
    one = told(FAST, (FAST, 60 * GIB, 2.0))
    (sweep,) = one.search.sweeps
    tokens = sweep.stage.global_batch_size * sweep.stage.phase.seq_len
    assert one.speed(sweep, sweep.ranked[0]) == tokens / 2.0 / 8
    plain = one.as_json()
    assert plain["kinds"][0]["fastest"][0]["tokens_per_s_per_gpu"] == tokens / 16
    assert plain["best"][0]["seconds"] == 2.0 * sweep.stage.steps
    assert f"{tokens / 16:,.0f}" in one.table().rows[0]
    assert replace(one, recommended=SLOW).as_json()["recommended"]["tp"] == 4


# Layouts in words, and why the others were not taken.


PLAIN = Choice(ParallelConfig(zero1=True), 1, (False, ()))
STAGE = run_stages(recipes.get("qwen3-8b"), 8)[0]


def at(**changes: int) -> Choice:
    return replace(PLAIN, parallel=replace(PLAIN.parallel, **changes))


def took(choice: Choice, **seconds: float) -> Common:
    return Common(choice, GIB, seconds, sum(seconds.values()))


def test_a_layout_in_words() -> None:
    assert sizes(PLAIN.parallel) == "data parallel alone, ZeRO-1"
    assert sizes(at(tp=4, pp=2).parallel) == "tp 4, pp 2, ZeRO-1"
    assert name(PLAIN) == "data parallel alone, micro-batch 1, recomputes nothing"
    assert name(Choice(ParallelConfig(tp=2), 4, (True, ()))) == ("tp 2, no ZeRO-1, micro-batch 4, "
                                                                 "recomputes layers")
    uneven = ParallelConfig(pp=2, vpp=2, zero1=True, pipeline_layout=(3, 3, 3, 1))
    assert name(Choice(uneven, 1, (False, ()))).startswith("pp 2, vpp 2, 4 layers on the last stage, micro-")
    assert recomputes(replace(PLAIN, recompute=("selective", ("moe", "layernorm")))) == (
        "recomputes moe + layernorm")


def test_another_value_is_slower_by_what_grew_most_or_as_fast_or_too_large() -> None:
    fastest = took(PLAIN, dense=90.0, dp=10.0)
    sweep = Sweep(STAGE)
    sweep.too_large(at(tp=1, pp=4), 3 * GIB)
    lines = why([fastest, took(at(tp=2), dense=90.1, dp=10.0), took(at(tp=4), dense=91.0, dp=10.0, tp=19.0)],
                [sweep])
    assert lines == ["tp 1: 2 is as fast; 4 is 20 % slower (tp messages +19 %)", "pp 1: 4 lacks 3.0 GiB"]


def test_parts_are_called_as_the_table_of_a_step_calls_them() -> None:
    lines = why([took(PLAIN, dense=90.0), took(at(tp=2), dense=90.0, memory=10.0)], [])
    assert lines == ["tp 1: 2 is 11 % slower (memory-bound +11 %)"]


def test_of_several_stages_the_one_that_lacks_most_counts() -> None:
    sweeps = [Sweep(STAGE), Sweep(STAGE)]
    for sweep, lacks in zip(sweeps, (GIB, 5 * GIB), strict=True):
        sweep.too_large(at(cp=2), lacks)
    assert why([took(PLAIN, dense=1.0)], sweeps) == ["cp 1: 2 lacks 5.0 GiB"]


def test_what_does_not_fit_is_told_by_the_nearest() -> None:
    sweep = Sweep(STAGE)
    assert too_large(sweep) == []
    sweep.too_large(at(tp=2), 3 * GIB)
    sweep.too_large(at(tp=4), GIB)
    assert too_large(sweep) == ["2 do not fit: the nearest lacks 1.0 GiB (tp 4, micro-batch 1, "
                                "recomputes nothing)"]


def test_rare_rules_are_counted_together() -> None:
    sweep = Sweep(STAGE)
    for letter, count in zip("abcdefgh", range(80, 0, -10), strict=True):
        sweep.breaks(Problem(Code.RULE, "", f"rule {letter} is broken", way_out="mend it"), count)
    lines = broken([sweep])
    assert lines[0] == "80 break a rule, as: rule a is broken"
    assert len(lines) == SHOWN_RULES + 1 and lines[-1] == "30 break one of 2 other rules"
    assert sweep.broken == Counter({f"rule {c} is broken": n for c, n in zip("abcdefgh", range(80, 0, -10),
                                                                             strict=True)})


# The grid holds the run's own layout, and what --set is told makes the very layout that was looked at.


@pytest.mark.parametrize("recipe", ["solar-open-102b", "k-exaone-236b-extend", "qwen3-8b", "tiny-k-exaone"])
def test_settings_make_the_layout(recipe: str) -> None:
    config = recipes.get(recipe)
    every = list(choices(config, space_of(config, 512, 8)))
    assert len(every) == len(set(every)) > 500
    for choice in random.Random(recipe).sample(every, 12):
        assert apply_settings(config, choice.settings(config)) == choice.of(config)


def test_a_runs_own_layout_is_among_those_looked_at() -> None:
    for recipe in ("solar-open-102b", "k-exaone-236b-extend", "qwen3-8b", "solar-open-102b-dpo"):
        config = recipes.get(recipe)
        assert own_choice(config) in set(choices(config, space_of(config, 512, 8))), recipe
    uneven = apply_settings(recipes.get("k-exaone-236b"), [
        "parallel.pp=4", "parallel.pipeline_layout=[13,12,12,11]"])
    found = list(layouts(uneven, space_of(uneven, 512, 8)))
    assert uneven.parallel in found
    assert {p.pipeline_layout for p in found if p.pp == 4} == {(), (13, 12, 12, 11)}


def test_uneven_pipelines_are_looked_at_where_the_last_stage_has_more_to_do() -> None:
    config = recipes.get("k-exaone-236b")
    proposed = {p.pipeline_layout for p in layouts(config, space_of(config, 512, 8, beside=(3.2,)))}
    assert (6, 6, 6, 6, 7, 7, 7, 3) in proposed and (13, 13, 13, 9) in proposed and () in proposed
    fixed = ("parallel.pipeline_layout",)
    assert {p.pipeline_layout for p in layouts(config, space_of(config, 512, 8, fixed, (3.2,)))} == {()}
    # 36 layers do not divide by 8 stages, but for uneven ones
    dense = recipes.get("qwen3-8b")
    assert {p.pipeline_layout for p in layouts(dense, space_of(dense, 64, 8, beside=(2.0,)))
            if (p.pp, p.vpp) == (8, 1)} == {(4, 4, 5, 5, 5, 5, 5, 3)}


def test_tensor_parallelism_stays_inside_a_domain_and_rows_are_not_cut_too_fine() -> None:
    config = recipes.get("solar-open-102b")
    space = space_of(config, 512, 4)
    assert space.tp == (1, 2, 4) and space.cp == (1, 2)
    longer = apply_settings(config, ['data.phases=[{"name": "long", "seq_len": 131072, "tokens": 1000000}]'])
    assert space_of(longer, 512, 8).cp == (1, 2, 4, 8, 16, 32, 64)
