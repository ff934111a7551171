"""The plan that a run keeps: written, read, grown, and refused where it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.calibration.expected import (
    CLUSTER, PARAMETERS, SHIPPED, LearnedCorrection, LocalMachine, Machine, as_json, expected)
from megatron_sov.plan.footprint import kept
from megatron_sov.plan.footprint.kept import KeptPlan, StretchPlan
from megatron_sov.plan.speed.parameters import default
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import of_run
from megatron_sov.runs.folder import PLAN
from megatron_sov.schedules import Schedule
from megatron_sov.work.clusters.chips import chip, default_links

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


# What a run's settings predict on the machine that it is on.


H100 = Machine("NVIDIA H100 80GB HBM3", True, 8, 1 << 30)
CPU = Machine("AMD EPYC", False, 2, 1 << 28)
DENSE = apply_settings(recipes.get("qwen3-8b"), ["train.steps=100", "parallel.zero1=true"])


def test_a_run_on_gpus_is_predicted_as_plan_does() -> None:
    found = expected(DENSE, 8, H100)
    phase = DENSE.data.phases[0]
    work = of_run(DENSE, phase, 8, chip("h100"), default_links(chip("h100")))
    assert [s.step_s for s in found.stretches] == pytest.approx([step_time(work).total_s])
    assert (found.chip, found.no_speed, found.parameters) == ("h100", "", SHIPPED)
    assert found.memory_before_bytes == 0, "the host's memory is another one"
    (of_stage,) = found.memory_bytes
    assert found.stage_bytes(0) == sum(of_stage.values()) > 16e9 and "on_host" not in of_stage
    assert 0.9 < found.effective_share < 1 and found.checkpoint_bytes > 8e10 and found.power_w == 700
    assert found.failures_per_hour == pytest.approx(0.17 * 8 / 8766)


def test_a_run_whose_cluster_is_known_reckons_with_its_network_and_storage(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.yaml"
    slow.write_text("description: one adapter\naccount: ''\ngpu: h100\nnetwork_gbits_per_gpu: 10\n"
                    "storage_write_gbytes_per_s: 1\nfailures_per_gpu_year: 1.7\n")
    alone = expected(DENSE, 16, H100)
    monkeypatch.setenv(CLUSTER, str(slow))
    found = expected(DENSE, 16, H100)
    assert found.stretches[0].step_s > alone.stretches[0].step_s
    assert found.failures_per_hour == pytest.approx(10 * alone.failures_per_hour)
    assert found.checkpoint_s > found.checkpoint_bytes / 1e9 and found.cluster == f"profile {slow}"
    assert "for SOV_CLUSTER names no profile" in alone.cluster


@pytest.mark.parametrize(("name", "why"), [
    ("b200", "has B200-192GB and the run has found H100-80GB"), ("h1000", "there is no such profile"),
    ("local", "gpus_per_node is 0")])
def test_a_profile_that_does_not_serve_is_told_and_left_aside(name: str, why: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    alone = expected(DENSE, 8, H100)
    monkeypatch.setenv(CLUSTER, name)
    found = expected(DENSE, 8, H100)
    assert found.stretches == alone.stretches and why in found.cluster and name in found.cluster


def test_stretches_are_those_of_the_curriculum() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), [
        "train.ramp_from_batch_size=8", "train.ramp_increment=8", "train.ramp_steps=40"])
    found, schedule = expected(config, 1, H100).stretches, Schedule(config)
    assert [s.first_step for s in found] == [s.first_step + 1 for s in schedule.stretches]
    assert found[-1].last_step == schedule.num_steps
    assert [s.global_batch_size for s in found] == [s.batch_size for s in schedule.stretches]
    assert found[0].step_s < found[1].step_s, "the ramp's steps are shorter"


def test_each_pipeline_stage_has_its_memory() -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), ["parallel.pp=2"])
    found = expected(config, 2, CPU)
    assert len(found.memory_bytes) == 2 and found.memory_before_bytes == 1 << 28
    assert found.stage_bytes(0) != found.stage_bytes(1)


@pytest.mark.parametrize(("machine", "settings", "said"), [
    (CPU, [], "no prediction: chip unknown (AMD EPYC)"),
    (Machine("NVIDIA T4", True, 8, 0), [], "no prediction: chip unknown (NVIDIA T4)"),
    (Machine("NVIDIA A100-SXM4-80GB", True, 8, 0), ["train.fp8=tensorwise"], "fp8"),
])
def test_what_cannot_be_predicted_is_said(machine: Machine, settings: list[str], said: str) -> None:
    found = expected(apply_settings(DENSE, settings), 8, machine)
    assert said in found.no_speed and {s.step_s for s in found.stretches} == {0.0}
    assert found.stage_bytes(0) > 0, "memory is told all the same"


def test_steps_that_wait_for_other_jobs_have_no_speed() -> None:
    assert "`megatron-sov plan tiny-typhoon-s-legal` prices" in expected(
        recipes.get("tiny-typhoon-s-legal"), 1, H100).no_speed


def test_what_a_team_has_learned_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ours.json"
    machines = {CPU.device: LocalMachine(1e9, 0.0)}
    file.write_text(json.dumps(as_json(LearnedCorrection(default(), machines), {})))
    monkeypatch.setenv(PARAMETERS, str(file))
    config = recipes.get("tiny-qwen3")
    found = expected(config, 1, CPU)
    assert found.no_speed == "" and found.stretches[0].seconds["arithmetic"] > 0
    assert found.parameters.startswith(f"{file} (sha256 ")
    file.write_text("{")
    broken: KeptPlan = expected(config, 1, CPU)
    assert f"{PARAMETERS}={file}: is no file of parameters" in broken.no_speed, "no run fails for its plan"
    assert broken.parameters == SHIPPED
