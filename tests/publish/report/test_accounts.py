"""The plan that a run has kept beside what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import PageSection
from megatron_sov.plan.footprint import kept
from megatron_sov.plan.footprint.kept import KeptPlan, StretchPlan
from megatron_sov.publish.report.page import render
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.sections import SECTIONS, sections
from megatron_sov.runs.folder import PLAN
from megatron_sov.runs.obs.events import EVENTS, EventLog

TITLE = "Plan against what happened"
GIB = 1 << 30
PLANNED = KeptPlan(
    time_s=100.0, recipe="tiny-solar-open", num_ranks=4, layout={"tp": 1, "pp": 2, "zero1": True},
    device="NVIDIA H100 80GB HBM3", chip="h100", threads=4, no_speed="", parameters="shipped",
    memory_bytes=({"weights": 6 * GIB, "one_layer": 4 * GIB}, {"weights": 8 * GIB}), memory_before_bytes=0,
    checkpoint_bytes=0, checkpoint_s=2.0, failures_per_hour=0.5, effective_share=0.9, power_w=700.0,
    stretches=(StretchPlan("1", 1, 10, 32, 8, {"dense": 0.5, "attention": 0.5}),
               StretchPlan("2", 11, 20, 64, 8, {"dense": 3.0})))


def start(log: EventLog, plan: int | None, first: int = 0, **fields: Any) -> None:
    log.write("run_start", num_ranks=4, resumed_from=first, layout={"pp": 2},
              **({} if plan is None else {"plan": plan}), **fields)
    for step, name, seq_len in ((0, "1", 32), (10, "2", 64)):
        log.write("phase", step=step, name=name, seq_len=seq_len, global_batch_size=8, blend={})

def steps(log: EventLog, first: int, last: int, step_s: float, **fields: Any) -> None:
    for step in range(first, last + 1):
        log.write("step", step=step, step_time_s=step_s, peak_memory_bytes=5 * GIB, **fields)


def of(run: Path) -> PageSection:
    return SECTIONS[TITLE].of(read_run(run))


def rows(run: Path, head: str) -> list[list[str]]:
    return next(t.rows for t in of(run).tables if head in t.head)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty steps in two phases, a checkpoint, and memory of both stages."""
    kept.keep(tmp_path, PLANNED)
    log = EventLog(tmp_path / EVENTS)
    start(log, 0)
    steps(log, 1, 10, 0.8, power_w=350.0)
    steps(log, 11, 20, 3.75, power_w=350.0)
    log.write("memory", step=20, peak_memory_bytes=[12.5 * GIB, 8 * GIB], ranks=[1, 2])
    log.write("checkpoint", step=20, path="checkpoints/step-20", save_s=4.0, stall_s=0.5)
    log.write("run_end", step=20, wall_s=60.0)
    log.close()
    return tmp_path


def test_steps_are_set_beside_their_plan(run: Path) -> None:
    first, second = rows(run, "step planned")
    assert first == ["1", "1 to 10", "4 (pp 2)", "8 x 32", "1 s", "0.8 s", "+25.0 %", "256", "320"]
    assert second[:2] + second[4:7] == ["2", "11 to 20", "3 s", "3.75 s", "-20.0 %"]


def test_memory_is_set_beside_its_plan_for_each_stage(run: Path) -> None:
    assert [row[1:5] for row in rows(run, "memory planned")] == [
        ["1 of 2", "10.00 GiB", "12.50 GiB", "-20.0 %"], ["2 of 2", "8.00 GiB", "8.00 GiB", "+0.0 %"]]
    assert rows(run, "memory planned")[0][5] == "weights 6.00, one layer 4.00"


def test_what_holds_for_the_whole_run(run: Path) -> None:
    found = {row[0]: row[1:] for row in rows(run, "measured")}
    assert found["time of the steps on record"] == ["40.0 s", "45.5 s", "-12.1 %"]
    # 700 W and 350 W, each on four GPUs
    kwh = [700 * 4 * 40 / 3.6e6, 350 * 4 * 45.5 / 3.6e6]
    assert found["energy of the GPUs for them, by that of process 0"] == [
        f"{kwh[0]:.4g} kWh", f"{kwh[1]:.4g} kWh", f"{100 * (kwh[0] / kwh[1] - 1):+.1f} %"]
    assert found["time to write one, mean"] == ["2.0 s", "4.0 s", "-50.0 %"]
    assert found["starts that ended by a fault"][1] == "0" and "effective training time" in found
    assert "size of a checkpoint" not in found, "there is none"


@pytest.mark.parametrize(("num_gpus", "told"), [(4, True), (3, False)])
def test_energy_is_that_of_all_gpus_over_all_starts(num_gpus: int, told: bool, tmp_path: Path) -> None:
    kept.keep(tmp_path, PLANNED)
    log = EventLog(tmp_path / EVENTS)
    for first, told_j in ((0, (1.8e6, 3.6e6)), (10, (7.2e6,))):
        start(log, 0, first)
        steps(log, first + 1, first + 10, 1.0, gpu_power_w=350.0)
        for joules in told_j:
            log.write("energy", step=first + 10, energy_j=joules, num_gpus=num_gpus)
    log.close()
    found = {row[0]: row[1:] for row in rows(tmp_path, "measured")}
    of_all = found.get("energy of all GPUs, start-up, evaluation and saving counted in")
    assert of_all == (["–", "3 kWh", "–"] if told else None), "a driver that is silent leaves a part unknown"
    assert "energy of the GPUs for them, by that of process 0" in found


def test_each_start_is_held_to_its_own_plan(tmp_path: Path) -> None:
    wider = replace(PLANNED, num_ranks=8, stretches=(StretchPlan("1", 1, 20, 32, 8, {"dense": 0.25}),),
                    memory_bytes=({"weights": GIB},))
    for plan in (PLANNED, wider):
        kept.keep(tmp_path, plan)
    log = EventLog(tmp_path / EVENTS)
    start(log, 0)
    steps(log, 1, 6, 1.0)
    log.write("restart", step=0, exit_code=1, text="a rank was killed; all processes are started again")
    start(log, 0, 4)
    steps(log, 5, 8, 1.0)
    log.write("memory", step=8, peak_memory_bytes=[9 * GIB, 8 * GIB])
    log.write("stop", step=8, reason="time limit")
    start(log, 1, 8)
    steps(log, 9, 10, 0.5)
    log.close()
    found = rows(tmp_path, "step planned")
    assert [(row[1], row[2], row[4], row[6]) for row in found] == [
        ("1 to 8", "4 (pp 2)", "1 s", "+0.0 %"), ("9 to 10", "8 (pp 2)", "0.25 s", "-50.0 %")]
    memory = rows(tmp_path, "memory planned")
    assert [(row[0], row[3]) for row in memory] == [
        ("4 (pp 2)", "9.00 GiB"), ("4 (pp 2)", "8.00 GiB"), ("8 (pp 2)", "5.00 GiB")]
    (faults,) = [row for row in rows(tmp_path, "measured") if row[0] == "starts that ended by a fault"]
    assert faults[2] == "1"


def test_without_a_speed_the_memory_alone_is_compared(tmp_path: Path) -> None:
    unknown = replace(PLANNED, chip="", device="AMD EPYC", no_speed="no prediction: chip unknown (AMD EPYC)",
                      stretches=tuple(replace(s, seconds={}) for s in PLANNED.stretches),
                      memory_before_bytes=2 * GIB, failures_per_hour=0.0, effective_share=0.0)
    kept.keep(tmp_path, unknown)
    log = EventLog(tmp_path / EVENTS)
    start(log, 0)
    steps(log, 1, 3, 0.8)
    log.close()
    section = of(tmp_path)
    assert "no prediction: chip unknown (AMD EPYC)" in section.text
    assert rows(tmp_path, "step planned")[0][4:7] == ["–", "0.8 s", "–"]
    (memory,) = rows(tmp_path, "memory planned")
    assert memory[2:4] == ["12.00 GiB", "5.00 GiB"] and "2.00 before the model" in memory[5]


def test_runs_without_a_plan_have_no_section_and_odd_files_stop_nothing_else(run: Path) -> None:
    titles = [s.title for s in sections(read_run(run))]
    assert TITLE in titles and "Plan against what happened" in render([read_run(run)])
    (run / PLAN).unlink()
    assert TITLE not in [s.title for s in sections(read_run(run))]
    (run / PLAN).write_text("{}")
    with pytest.raises(UserError, match="delete it"):
        read_run(run)


def test_events_of_a_stranger_do_not_break_the_page(tmp_path: Path) -> None:
    kept.keep(tmp_path, PLANNED)
    log = EventLog(tmp_path / EVENTS)
    start(log, 77)
    log.write("memory", step=1, peak_memory_bytes=["x", 3, 4, 5])
    log.write("memory", step=1)
    steps(log, 100, 101, 1.0)  # of no stretch of the plan
    log.close()
    assert [row[1] for row in rows(tmp_path, "memory planned")] == ["2 of 2"]
    assert render([read_run(tmp_path)])
