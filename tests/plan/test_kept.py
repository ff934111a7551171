"""The plan that a run keeps: written, read, grown, and refused where it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.plan import kept
from megatron_sov.plan.kept import KeptPlan, StretchPlan
from megatron_sov.runs.folder import PLAN

PLANNED = KeptPlan(
    time_s=100.5, recipe="tiny-solar-open", num_ranks=2, layout={"tp": 1, "pp": 2, "zero1": True},
    device="NVIDIA H100 80GB HBM3", chip="h100", threads=4, no_speed="", parameters="shipped",
    memory_bytes=({"weights": 60, "optimizer": 40}, {"weights": 80, "optimizer": 50}), memory_before_bytes=5,
    checkpoint_bytes=1000, checkpoint_s=2.0, failures_per_hour=0.001, effective_share=0.99, power_w=700.0,
    stretches=(StretchPlan("1", 1, 10, 32, 8, {"dense": 0.25, "attention": 0.5}),
               StretchPlan("2", 11, 12, 64, 8, {})))


def test_a_plan_is_kept_and_read_as_it_was(tmp_path: Path) -> None:
    assert kept.read(tmp_path) == []
    assert kept.keep(tmp_path, PLANNED) == 0
    assert kept.read(tmp_path) == [PLANNED]
    assert PLANNED.stage_bytes(1) == 5 + 80 + 50
    assert PLANNED.stretches[0].step_s == 0.75 and PLANNED.stretches[0].step_tokens == 8 * 32
    assert [PLANNED.stretch(step) and PLANNED.stretch(step).phase  # type: ignore[union-attr]
            for step in (0, 1, 10, 11, 13)] == [None, "1", "1", "2", None]


def test_a_mark_of_the_byte_order_in_front_is_no_harm(tmp_path: Path) -> None:
    kept.keep(tmp_path, PLANNED)
    (tmp_path / PLAN).write_bytes(b"\xef\xbb\xbf" + (tmp_path / PLAN).read_bytes())
    assert kept.read(tmp_path) == [PLANNED]


def test_only_another_plan_is_put_beside_it(tmp_path: Path) -> None:
    kept.keep(tmp_path, PLANNED)
    assert kept.keep(tmp_path, replace(PLANNED, time_s=200.0, memory_before_bytes=7)) == 0
    other = replace(PLANNED, num_ranks=4, time_s=300.0)
    assert kept.keep(tmp_path, other) == 1
    assert kept.keep(tmp_path, replace(other, time_s=400.0)) == 1
    assert kept.keep(tmp_path, PLANNED) == 0, "it went back to the first layout"
    assert [p.num_ranks for p in kept.read(tmp_path)] == [2, 4]


@pytest.mark.parametrize(("content", "said"), [
    ("{", "is no JSON"), ("[]", "format_version = None"), ('{"format_version": 2}', "is not 1"),
    ('{"format_version": 1}', "plans: is missing"),
    ('{"format_version": 1, "plans": [{}]}', "plans.0.time_s: is missing"),
    ("[" * 100_000, "is no JSON"), ('{"format_version": 1, "plans": 3}', "plans = 3 must be a list"),
])
def test_a_damaged_plan_is_refused_with_the_way_out(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(UserError, match="delete it") as refusal:
        kept.read(tmp_path)
    assert said in str(refusal.value) and str(tmp_path / PLAN) in str(refusal.value)


def test_a_plan_with_fields_of_another_type_is_refused_by_name(tmp_path: Path) -> None:
    kept.keep(tmp_path, PLANNED)
    content = json.loads((tmp_path / PLAN).read_text())
    content["plans"][0]["num_ranks"], content["plans"][0]["surprise"] = "many", 1
    (tmp_path / PLAN).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"(?s)plans\.0\.num_ranks.*plans\.0\.surprise"):
        kept.read(tmp_path)


@pytest.mark.parametrize(("where", "value"), [
    (("memory_bytes", 0, "weights"), 10**400), (("memory_bytes", 1, "weights"), -1),
    (("stretches", 0, "seconds", "dense"), float("nan")),
    (("stretches", 0, "seconds", "dense"), float("inf")),
    (("stretches", 1, "seq_len"), 10**4200), (("effective_share",), float("nan")),
    (("checkpoint_s",), -2.0), (("memory_before_bytes",), 10**400),
])
def test_numbers_that_no_plan_has_are_refused_by_name(tmp_path: Path, where: tuple[str | int, ...],
                                                      value: float) -> None:
    kept.keep(tmp_path, PLANNED)
    content = json.loads((tmp_path / PLAN).read_text())
    inside = content["plans"][0]
    for name in where[:-1]:
        inside = inside[name]
    inside[where[-1]] = value
    (tmp_path / PLAN).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"plans\.0\.{'.'.join(map(str, where))}.*must be "):
        kept.read(tmp_path)
