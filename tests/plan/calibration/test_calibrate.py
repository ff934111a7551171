"""Learning from runs, end to end: folders in, a file of parameters out, errors before and after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.clusters.chips import chip, default_links
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.errors import UserError
from megatron_sov.plan.calibration.calibrate import calibrate, calibration, observations, scaled
from megatron_sov.plan.calibration.local_machine import LocalMachine, passes_of
from megatron_sov.plan.calibration.parameters_file import read_learned, shipped
from megatron_sov.plan.speed.parameters import default
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import of_run

CPU = "AMD EPYC"
TRUTH = {"products": 0.85, "links": 0.6, "host": 1.3}
LAYOUTS = {"data-parallel": (["parallel.zero1=true"], 8),
           "tensor": (["parallel.tp=4", "parallel.sp=true", "parallel.zero1=true"], 8),
           "pipeline": (["parallel.pp=4", "train.global_batch_size=64"], 16)}


def on_gpus(layout: str) -> tuple[RunConfig, int, float]:
    """Return settings, processes and a step's seconds on H100s that are what `TRUTH` says."""
    settings, num_ranks = LAYOUTS[layout]
    config = apply_settings(recipes.get("qwen3-8b"), [
        "train.steps=20", 'data.phases=[{"name": "1", "seq_len": 4096}]', "train.global_batch_size=32",
        "train.micro_batch_size=1", *settings])
    on = chip("h100")
    phase = replace(config.data.phases[0], global_batch_size=config.train.global_batch_size)
    workload = of_run(config, phase, num_ranks, on, default_links(on))
    return config, num_ranks, step_time(workload, scaled(default(), TRUTH, [on])).total_s


def on_processor(*settings: str, seq_len: int, machine: LocalMachine) -> tuple[RunConfig, float]:
    config = apply_settings(recipes.get("tiny-qwen3"), [
        "train.steps=20", f'data.phases=[{{"name": "1", "seq_len": {seq_len}}}]', *settings])
    passes = passes_of(config, 1, 2, seq_len, config.train.global_batch_size)
    return config, sum(machine.seconds(passes).values())


def test_runs_on_gpus_teach_factors_and_the_error_falls(write_run: Any, tmp_path: Path) -> None:
    runs = [write_run(name, *on_gpus(name)) for name in LAYOUTS]
    observed = observations(runs)
    assert [one.step_s for one in observed] == pytest.approx([on_gpus(name)[2] for name in LAYOUTS])
    found = calibration(observed, shipped())
    errors = [[abs(p / one.step_s - 1) for p, one in zip(seconds, observed, strict=True)]
              for seconds in (found.before_s, found.after_s)]
    assert max(errors[1]) < 0.02 < min(errors[0])
    assert found.factors["products"] == pytest.approx(0.85, rel=0.05)

    text = calibrate(runs, tmp_path / "ours.json")
    assert "error, median over 3:" in text and "products  x 0.8" in text
    written = read_learned(tmp_path / "ours.json")
    assert written.parameters.product_fraction == found.learned.parameters.product_fraction
    provenance = json.loads((tmp_path / "ours.json").read_text())["provenance"]
    assert [row["run"] for row in provenance["from"]] == list(LAYOUTS)


def test_runs_on_a_processor_teach_its_speed(write_run: Any, tmp_path: Path) -> None:
    machine = LocalMachine(3e10, 1e-3)
    runs = []
    for name, seq_len in (("short", 32), ("long", 256)):
        config, step_s = on_processor("train.micro_batch_size=8", seq_len=seq_len, machine=machine)
        runs.append(write_run(name, config, 1, step_s, device=CPU, on_gpu=False))
    text = calibrate(runs, tmp_path / "ours.json")
    assert "none before, 0.0% after" in text and "30 GFLOP/s a thread" in text
    written = read_learned(tmp_path / "ours.json")
    assert written.machines[CPU].layer_s == pytest.approx(1e-3)
    assert written.parameters.product_fraction == default().product_fraction, "no run was on a GPU"
    # what is learned later is put beside it
    other = write_run("other", on_processor(seq_len=64, machine=machine)[0], 1, 0.5, device="Other",
                      on_gpu=False)
    calibrate([other], tmp_path / "both.json", read_learned(tmp_path / "ours.json"))
    assert set(read_learned(tmp_path / "both.json").machines) == {CPU, "Other"}


def test_starts_of_one_layout_are_one_observation(write_run: Any) -> None:
    config, num_ranks, step_s = on_gpus("data-parallel")
    run = write_run("twice", config, num_ranks, step_s)
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(events + events)
    (one,) = observations([run])
    assert one.step_s == pytest.approx(step_s) and one.num_steps == 2 * 16


@pytest.mark.parametrize(("changes", "said"), [
    ({"num_steps": 0}, "has at most 0 steps"), ({"num_steps": 4}, "has at most 4 steps"),
    ({"start": {"machine": {"host": "a"}}}, "does not say on what it ran"),
    ({"start": {"machine": "a"}}, "does not say on what it ran"),
    ({"device": "NVIDIA T4"}, "'NVIDIA T4' is in no table of GPUs"),
    ({"start": {"layout": None}}, "names no layout"), ({"start": {"layout": {"tp": "x"}}}, "is none"),
    ({"start": {"layout": {"tp": 3}}}, "that no run can have"),
    ({"start": {"num_ranks": "many"}}, "that no run can have"),
    ({"start": {"num_ranks": 0}}, "that no run can have"),
    ({"start": {"num_ranks": 10**400}}, "that no run can have"),
    ({"start": {"machine": {"device": "NVIDIA H100 80GB HBM3", "threads": 10**400}}}, "that no run can have"),
])
def test_what_teaches_nothing_is_refused_in_a_sentence(write_run: Any, changes: dict[str, Any],
                                                       said: str) -> None:
    config, num_ranks, step_s = on_gpus("data-parallel")
    run = write_run("odd", config, num_ranks, step_s, **changes)
    with pytest.raises(UserError, match=r"--calibrate .*odd") as refusal:
        calibrate([run])
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_folders_that_are_no_runs_and_steps_that_wait_are_refused(write_run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run"):
        calibrate([tmp_path / "nowhere"])
    waits = write_run("waits", recipes.get("tiny-typhoon-s-legal"), 1, 1.0, device=CPU, on_gpu=False)
    with pytest.raises(UserError, match=r"wait for what other jobs write"):
        calibrate([waits])
    config, num_ranks, step_s = on_gpus("data-parallel")
    with pytest.raises(UserError, match=r"--out"):
        calibrate([write_run("fine", config, num_ranks, step_s)], tmp_path)


def test_steps_that_take_no_time_or_forever_are_refused(write_run: Any) -> None:
    config, num_ranks, _ = on_gpus("data-parallel")
    for name, step_s in (("instant", 1e-300), ("endless", 1e300)):
        with pytest.raises(UserError, match="which no run has"):
            calibrate([write_run(name, config, num_ranks, step_s)])


def test_a_run_is_not_written_over_by_what_it_teaches(write_run: Any) -> None:
    config, num_ranks, step_s = on_gpus("data-parallel")
    run = write_run("kept", config, num_ranks, step_s)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="which is read; choose another path"):
        calibrate([run], run / "config.json")
    assert (run / "config.json").read_bytes() == before
