"""Learning from runs, end to end: folders in, a file of parameters out, errors before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.speed.calibration import (
    FACTORS, NOISE, calibrate_from_runs, fit_calibration, fit_factors, read_observations, scale_parameters)
from megatron_sov.plan.speed.parameters import load_default_parameters, read_parameters
from megatron_sov.plan.speed.step import estimate_step
from megatron_sov.plan.speed.workload import build_workload
from megatron_sov.work.clusters.chips import CHIPS, default_links

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
    on = CHIPS["h100"]
    phase = replace(config.data.phases[0], global_batch_size=config.train.global_batch_size)
    workload = build_workload(config, phase, num_ranks, on, default_links(on))
    return config, num_ranks, estimate_step(workload, scale_parameters(load_default_parameters(), TRUTH,
                                                                       [on])).total_s


def test_runs_on_gpus_teach_factors_and_the_error_falls(write_run: Any, tmp_path: Path) -> None:
    runs = [write_run(name, *on_gpus(name)) for name in LAYOUTS]
    observed = read_observations(runs)
    assert [one.step_s for one in observed] == pytest.approx([on_gpus(name)[2] for name in LAYOUTS])
    found = fit_calibration(observed, load_default_parameters())
    errors = [[abs(p / one.step_s - 1) for p, one in zip(seconds, observed, strict=True)]
              for seconds in (found.before_s, found.after_s)]
    assert max(errors[1]) < 0.02 < min(errors[0])
    assert found.factors["products"] == pytest.approx(0.85, rel=0.05)

    text = calibrate_from_runs(runs, tmp_path / "ours.json")
    assert "error, median over 3:" in text and "products  x 0.8" in text
    written = read_parameters(tmp_path / "ours.json")
    assert written.product_fraction == found.learned.product_fraction
    provenance = json.loads((tmp_path / "ours.json").read_text())["provenance"]
    assert [row["run"] for row in provenance["from"]] == list(LAYOUTS)


def test_starts_of_one_layout_are_one_observation(write_run: Any) -> None:
    config, num_ranks, step_s = on_gpus("data-parallel")
    run = write_run("twice", config, num_ranks, step_s)
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(events + events)
    (one,) = read_observations([run])
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
    ({"device": CPU, "on_gpu": False}, "ran on processors (AMD EPYC), and plan prices GPUs"),
])
def test_what_teaches_nothing_is_refused_in_a_sentence(write_run: Any, changes: dict[str, Any],
                                                       said: str) -> None:
    config, num_ranks, step_s = on_gpus("data-parallel")
    run = write_run("odd", config, num_ranks, step_s, **changes)
    with pytest.raises(UserError, match=r"--calibrate .*odd") as refusal:
        calibrate_from_runs([run])
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_folders_that_are_no_runs_and_steps_that_wait_are_refused(write_run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run"):
        calibrate_from_runs([tmp_path / "nowhere"])
    waits = write_run("waits", recipes.get("tiny-typhoon-s-legal"), 1, 1.0, device=CPU, on_gpu=False)
    with pytest.raises(UserError, match=r"wait for what other jobs write"):
        calibrate_from_runs([waits])
    config, num_ranks, step_s = on_gpus("data-parallel")
    with pytest.raises(UserError, match=r"--output"):
        calibrate_from_runs([write_run("fine", config, num_ranks, step_s)], tmp_path)


def test_steps_that_take_no_time_or_forever_are_refused(write_run: Any) -> None:
    config, num_ranks, _ = on_gpus("data-parallel")
    for name, step_s, said in (("instant", 1e-300, "which no run has"),
                               ("endless", 1e300, "has at most 0 steps")):
        with pytest.raises(UserError, match=said):
            calibrate_from_runs([write_run(name, config, num_ranks, step_s)])


def test_a_run_is_not_written_over_by_what_it_teaches(write_run: Any) -> None:
    config, num_ranks, step_s = on_gpus("data-parallel")
    run = write_run("kept", config, num_ranks, step_s)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="which is read; choose another path"):
        calibrate_from_runs([run], run / "config.json")
    assert (run / "config.json").read_bytes() == before


# What a team's own runs teach: factors on the shipped parameters, and their file.


@pytest.mark.parametrize(("content", "said"), [
    ("", "is no file"), ("[]", "no object `parameters`"), ('{"parameters": 1}', "no object `parameters`"),
    ("{", "is no file of parameters"), ("{}", "no object `parameters`"),
    ('{"parameters": {"hbm_fractoin": 1}}', "hbm_fractoin is no parameter; did you mean 'hbm_fraction'?"),
    ('{"parameters": {"hbm_fraction": "fast"}}', "hbm_fraction = 'fast' must be a number"),
    ('{"parameters": {"ep_fraction": {"deepep": -1}}}', "ep_fraction.deepep = -1 must be a number"),
    ('{"parameters": {"hbm_fraction": NaN}}', "must be a number"),
    ('{"parameters": {"hbm_fraction": %s}}' % ("1" * 400), "must be a number"),
    ('{"parameters": {"hbm_fraction": 0}}', "something is divided by it"),
    ('{"parameters": {"product_fraction": {"hopper": {"fp8": 0}}}}', "something is divided by it"),
    ('{"parameters": {"inside_fraction": 90}}', "must be a share"),
    ('{"parameters": {"ep_fraction": 0.5}}', "must be an object with alltoall"),
    ('{"parameters": {"step_overhead_s": {"a": 1}}}', "must be a number"),
    ('{"parameters": {"ep_fraction": {"depep": 1}}}', "depep is no parameter; did you mean 'deepep'?"),
    ("[" * 100_000, "is no file"), (" " * (2 << 20), "more than"),
])
def test_other_files_are_refused_with_the_way_out(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "odd.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--parameters .*odd.json") as refusal:
        read_parameters(file)
    assert said in str(refusal.value) and "plan --calibrate RUN --output FILE" in str(refusal.value)


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"cannot be read"):
            read_parameters(path)


# The factors on shipped parameters.


NAMES = [factor.name for factor in FACTORS]
PARTS = np.array([[1.0, 0.1, 0.0], [0.5, 1.0, 0.1], [0.3, 0.1, 1.0], [1.0, 1.0, 1.0], [2.0, 0.2, 0.3]])
"""Seconds of products, links and host of some steps."""


def sums(parts: np.ndarray) -> Callable[[dict[str, float]], Sequence[float]]:
    """Return a model whose steps are sums of parts, each divided by its factor."""
    return lambda factors: [float(s) for s in parts @ np.array([1 / factors[name] for name in NAMES])]


def test_the_optimum_is_that_of_a_search() -> None:
    measured = [float(s) for s in PARTS.sum(axis=1) * (1.1, 1.2, 0.95, 1.1, 1.05)]
    found = fit_factors(measured, sums(PARTS))

    def cost(logs: Sequence[float]) -> float:
        predicted = sums(PARTS)({name: math.exp(log) for name, log in zip(NAMES, logs, strict=True)})
        r = np.abs(np.log(np.array(predicted) / measured)) / NOISE
        huber = np.where(r <= 2, r * r / 2, 2 * (r - 1))
        prior = sum((log / f.spread) ** 2 / 2 for log, f in zip(logs, FACTORS, strict=True))
        return float(huber.sum()) + prior

    at = [math.log(found[name]) for name in NAMES]
    drawn = np.random.default_rng(0)
    around = [cost([a + d for a, d in zip(at, drawn.normal(0, 0.01, 3), strict=True)]) for _ in range(200)]
    assert cost(at) <= min(around) + 1e-6


def test_factors_go_on_what_was_seen_and_shares_stay_shares() -> None:
    base = load_default_parameters()
    found = scale_parameters(base, {"products": 2.0, "links": 0.5, "host": 3.0}, [CHIPS["h100"]])
    assert found.product_fraction["hopper"]["bf16"] == min(1.0, 2 * base.product_fraction["hopper"]["bf16"])
    assert found.product_fraction["blackwell"] == base.product_fraction["blackwell"]
    assert found.inside_fraction == 0.5 * base.inside_fraction
    assert found.step_overhead_s == 3 * base.step_overhead_s and found.hbm_fraction == base.hbm_fraction
    assert all(share <= 1 for share in found.product_fraction["hopper"].values())
