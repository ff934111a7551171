"""Layouts in words, and why the others were not taken."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from megatron_sov import recipes
from megatron_sov.config import ParallelConfig
from megatron_sov.obs.units import GIB
from megatron_sov.plan.run_stages import run_stages
from megatron_sov.plan.search.reasons import SHOWN_RULES, broken, name, recomputes, sizes, too_large, why
from megatron_sov.plan.search.space import Choice
from megatron_sov.plan.search.sweep import Common, Sweep
from megatron_sov.settings import Code, Problem

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
