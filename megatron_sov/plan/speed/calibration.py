"""`megatron-sov plan --calibrate RUN ...`: fit the speed parameters to the user's own runs."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.outputs import check_output, refuse_input_as_output
from megatron_sov.model.config import ParallelConfig, PhaseConfig, RunConfig
from megatron_sov.plan.speed.parameters import Parameters, load_default_parameters
from megatron_sov.plan.speed.step import estimate_step
from megatron_sov.plan.speed.workload import build_workload
from megatron_sov.runs.folder import CONFIG, RunFolder
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.history import StepTiming, StepTimings
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS, Chip, Links, default_links, find_device_chip

MOST = 10**9
"""Limit on processes, tokens per sample, samples and seconds per step in events."""
LEAST_STEP_S = 1e-6
LEAST_STEPS = 5
"""Fewest steps per layout and batch size, without the first steps after a start."""
WAITS = ("policy", "distill")
"""Objectives whose steps wait for other jobs, so their times say nothing about speed."""
NOISE = 0.03
"""Standard deviation of log(measured / predicted step time): measurement and model error."""
HUBER = 2.0
"""Residual in standard deviations above which the loss grows linearly (Huber)."""
STEP, MAX_ROUNDS, ENOUGH = 1e-3, 30, 1e-5
CLUSTER = "SOV_CLUSTER"
"""Environment variable with the cluster profile of the runs, as --cluster takes it."""


@dataclass(frozen=True)
class CalibrationPoint:
    """Measured step time of a run with one layout, sequence length and batch size."""

    run: str
    """The run folder's name."""
    config: RunConfig
    """Settings, with the layout of these steps."""
    phase: PhaseConfig
    """Phase with sequence length and batch size."""
    num_ranks: int
    chip: Chip
    step_s: float
    num_steps: int
    """Steps in the median."""


def read_observations(runs: list[Path]) -> list[CalibrationPoint]:
    """Read step times from run folders.

    Raises:
        UserError: a folder without a run, or a run without usable steps.
    """
    return [one for run in runs for one in _read_run(run)]


def _read_run(run: Path) -> list[CalibrationPoint]:
    config = RunFolder(run).config()
    if config is None or not (run / EVENTS).is_file():
        raise UserError(f"--calibrate {run}: is no run; pass folders that were given to --run")
    if config.objective.name in WAITS:
        raise UserError(f"--calibrate {run}: its steps (objective {config.objective.name}) wait for what "
                        "other jobs write, and say nothing of speed; pass runs of pretrain, extend, sft or "
                        "prefer")
    collected = StepTimings()
    for event in read_events(run / EVENTS):
        collected.add(event)
    enough = [s for s in collected.all if len(s.warm_times_s()) >= LEAST_STEPS]
    if not enough:
        most = max((len(s.warm_times_s()) for s in collected.all), default=0)
        raise UserError(f"--calibrate {run}: has at most {most} steps of one length and batch size (its "
                        f"first ones left out), and {LEAST_STEPS} are needed; let it run longer, or leave "
                        "it out")
    points = [_read_observation(run, config, stretch) for stretch in enough]
    return _merge_starts(points)


def _read_observation(run: Path, config: RunConfig, stretch: StepTiming) -> CalibrationPoint:
    """Read the step time of one stretch.

    Raises:
        UserError: an unknown device, or impossible values in events.
    """
    machine = stretch.start.get("machine")
    device = str(machine.get("device") or "") if isinstance(machine, dict) else ""
    if not device or not isinstance(machine, dict):
        raise UserError(f"--calibrate {run}: does not say on what it ran, as runs of earlier versions do "
                        "not; leave it out, or go on with it for some steps")
    if not stretch.start.get("on_gpu"):
        raise UserError(f"--calibrate {run}: ran on processors ({device}), and plan prices GPUs; leave it "
                        "out")
    chip = find_device_chip(device)
    if chip is None:
        raise UserError(f"--calibrate {run}: {device!r} is in no table of GPUs ({', '.join(sorted(CHIPS))}); "
                        "leave it out")
    layout = _parse_layout(run, config, stretch.start.get("layout"))
    num_ranks = parse_number(stretch.start.get("num_ranks"))
    counts = (num_ranks, stretch.seq_len, stretch.global_batch_size)
    possible = all(1 <= n <= MOST for n in counts)
    step_s = stretch.median_s()
    if not LEAST_STEP_S <= step_s <= MOST:
        raise UserError(f"--calibrate {run}: its {EVENTS} tells of steps of {step_s:.3g} s, which no run "
                        "has; leave it out")
    if not possible or layout.problems(config.model, int(num_ranks)):
        raise UserError(f"--calibrate {run}: its {EVENTS} tells of processes, a layout or samples that no "
                        "run can have; leave it out")
    return CalibrationPoint(
        run.resolve().name, dataclasses.replace(config, parallel=layout),
        PhaseConfig(stretch.phase, seq_len=stretch.seq_len, global_batch_size=stretch.global_batch_size),
        int(num_ranks), chip, step_s, len(stretch.warm_times_s()))


def _parse_layout(run: Path, config: RunConfig, recorded: Any) -> ParallelConfig:
    """Parse the layout in a start event; `config.json` has only the last layout."""
    names = {f.name for f in dataclasses.fields(ParallelConfig)}
    if not isinstance(recorded, dict) or not names & set(recorded):
        raise UserError(f"--calibrate {run}: its {EVENTS} names no layout; leave it out")
    values = dataclasses.asdict(config.parallel) | {k: v for k, v in recorded.items() if k in names}
    try:
        return TypeAdapter(ParallelConfig).validate_python(values)
    except ValidationError as e:
        raise UserError(f"--calibrate {run}: the layout of its {EVENTS} is none ({e.errors()[0]['msg']}); "
                        "leave it out") from None


def _merge_starts(points: list[CalibrationPoint]) -> list[CalibrationPoint]:
    """Merge observations with equal settings from several starts: the mean weighted by steps."""
    groups: dict[Any, list[CalibrationPoint]] = {}
    for one in points:
        # all settings that affect the step time; the phase's name does not
        key = (one.num_ranks, one.chip.key, repr(one.config.parallel), one.phase.seq_len,
               one.phase.global_batch_size)
        groups.setdefault(key, []).append(one)
    merged = []
    for group in groups.values():
        steps = sum(one.num_steps for one in group)
        mean_s = math.fsum(one.step_s * one.num_steps for one in group) / steps
        merged.append(dataclasses.replace(group[0], step_s=mean_s, num_steps=steps))
    return merged


# A run or two cannot determine thirty parameters, but show whether products, links and hosts are faster than
# in published runs. So three factors on the package's parameters are fitted: the maximum a posteriori, with
# normal priors on their logarithms around 0 and a Huber loss on log(measured / predicted), by damped
# Gauss-Newton.


@dataclass(frozen=True)
class Factor:
    name: str
    meaning: str
    spread: float
    """Prior standard deviation of its logarithm."""


FACTORS = (Factor("products", "share of the peak that matrix products and attention reach, on these chips",
                  0.15), Factor("links", "share of the links' bandwidth that messages reach", 0.4),
           Factor("host", "seconds of the host: launches of kernels, and a step's own", 0.5))


def scale_parameters(parameters: Parameters, factors: dict[str, float], chips: Sequence[Chip]) -> Parameters:
    """Apply factors to parameters; shares are limited to 1, and chips without runs keep their shares."""
    products, links, host = (factors[f.name] for f in FACTORS)
    generations = {one.generation for one in chips}
    fractions = dict(parameters.product_fraction)
    for family in generations & set(fractions):
        fractions[family] = {unit: min(1.0, share * products) for unit, share in fractions[family].items()}
    attention = {family: min(1.0, share * products) if family in generations else share
                 for family, share in parameters.attention_fraction.items()}
    return replace(
        parameters, product_fraction=fractions, attention_fraction=attention,
        inside_fraction=min(1.0, parameters.inside_fraction * links),
        between_fraction=min(1.0, parameters.between_fraction * links),
        layer_launch_s=parameters.layer_launch_s * host, moe_launch_s=parameters.moe_launch_s * host,
        step_overhead_s=parameters.step_overhead_s * host)


def fit_factors(measured_s: Sequence[float],
        predict: Callable[[dict[str, float]], Sequence[float]]) -> dict[str, float]:
    """Return factor name -> most probable value.

    Args:
        measured_s: step times.
        predict: factors -> predicted step times.
    """
    spreads = np.array([factor.spread for factor in FACTORS])

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.log(np.array(predict(_name_factors(logs))) / np.array(measured_s)) / NOISE

    def cost(logs: np.ndarray) -> float:
        # negative log posterior, up to a constant
        off = np.abs(residuals(logs))
        misfit = np.where(off <= HUBER, off * off / 2, HUBER * (off - HUBER / 2))
        return float(misfit.sum() + ((logs / spreads) ** 2).sum() / 2)

    point = np.zeros(len(FACTORS))
    for _ in range(MAX_ROUNDS):
        now = residuals(point)
        slopes = np.array([(residuals(point + STEP * unit) - now) / STEP for unit in np.eye(len(point))])
        # Huber loss as weights of least squares: one outlier must not bend the factors.
        weighted = slopes * np.minimum(1.0, HUBER / np.maximum(np.abs(now), HUBER))
        # The prior's 1 / spread^2 on the diagonal makes it solvable if runs do not depend on a factor.
        moved = np.linalg.solve(weighted @ slopes.T + np.diag(spreads ** -2.0),
                                -weighted @ now - point / spreads ** 2)
        share = 1.0
        # Damped: a full step may overshoot, since shares stop at 1 and the cost is no parabola.
        while share > 1e-3 and cost(point + share * moved) > cost(point):
            share /= 2
        point = point + share * moved
        if share * np.abs(moved).max() < ENOUGH:
            break
    return _name_factors(point)


def _name_factors(logs: np.ndarray) -> dict[str, float]:
    return {factor.name: math.exp(log) for factor, log in zip(FACTORS, logs, strict=True)}


@dataclass(frozen=True)
class Calibration:
    learned: Parameters
    """Fitted parameters; parameters without observations are unchanged."""
    factors: dict[str, float]
    """Factor name -> value."""
    observed: tuple[CalibrationPoint, ...]
    before_s: tuple[float, ...]
    """Step times predicted before the fit."""
    after_s: tuple[float, ...]


def calibrate_from_runs(runs: Sequence[Path], out: Path | None = None, base: Parameters | None = None) -> str:
    """Fit parameters, write them to `out`, and return the summary for a terminal.

    Raises:
        UserError: a run without usable steps, or an output file that cannot be written.
    """
    if out is not None:
        refuse_input_as_output("--output", out, *(run / name for run in runs for name in (CONFIG, EVENTS)))
        check_output("--output", out)
    result = fit_calibration(read_observations(list(runs)), base or load_default_parameters())
    if out is not None:
        write_output(out, format_json({"parameters": dataclasses.asdict(result.learned),
                                   "provenance": _build_provenance(result)}))
    return _format_calibration(result, out)


def fit_calibration(observed: Sequence[CalibrationPoint], base: Parameters) -> Calibration:
    chips = [one.chip for one in observed]

    def predicted(parameters: Parameters) -> tuple[float, ...]:
        return tuple(predict_step_s(one, parameters) for one in observed)

    factors = fit_factors([one.step_s for one in observed],
                          lambda tried: predicted(scale_parameters(base, tried, chips)))
    learned = scale_parameters(base, factors, chips)
    return Calibration(learned, factors, tuple(observed), predicted(base), predicted(learned))


def find_links(chip: Chip, num_ranks: int) -> Links:
    """Return the links between a run's GPUs: from the profile in `SOV_CLUSTER` if its GPUs match, else the
    vendor's server design."""
    name = os.environ.get(CLUSTER, "")
    if name:
        try:
            profile = cluster.load_profile(name, needs_account=False)
            if profile.chip.key == chip.key:
                return cluster.compute_links(profile, num_ranks)
        except UserError as e:
            warn(f"{CLUSTER}={name}: {e}; links of {chip.name} are taken as their maker builds servers")
    return default_links(chip)


def predict_step_s(one: CalibrationPoint, parameters: Parameters) -> float:
    """Predict the step time.

    Raises:
        UserError: the chip has no tensor cores for the run's precision.
    """
    workload = build_workload(one.config, one.phase, one.num_ranks,
                              one.chip, find_links(one.chip, one.num_ranks))
    return sum(estimate_step(workload, parameters).components.values())


def _build_provenance(result: Calibration) -> dict[str, object]:
    return {"by": "megatron-sov plan --calibrate", "factors": result.factors, "from": [
        {"run": one.run, "recipe": one.config.recipe, "device": one.chip.name, "processes": one.num_ranks,
         "seq_len": one.phase.seq_len, "global_batch_size": one.phase.global_batch_size,
         "steps": one.num_steps, "step_s": one.step_s, "before_s": before, "after_s": after}
        for one, before, after in zip(result.observed, result.before_s, result.after_s, strict=True)]}


def _format_calibration(result: Calibration, out: Path | None) -> str:
    """Format the errors before and after the fit, and the factors."""
    lines = [f"{'run':<24} {'processes':>9} {'samples x tokens':>18} {'steps':>6} {'measured':>10} "
             f"{'before':>18} {'after':>18}"]
    rows = zip(result.observed, result.before_s, result.after_s, strict=True)
    for one, before_s, after_s in rows:
        batch = f"{one.phase.global_batch_size:,} x {one.phase.seq_len:,}"
        lines.append(f"{one.run[:24]:<24} {one.num_ranks:>9,} {batch:>18} {one.num_steps:>6,} "
                     f"{one.step_s:>8.4g} s {_format_prediction(before_s, one.step_s):>18} "
                     f"{_format_prediction(after_s, one.step_s):>18}")
    before, after = (statistics.median(abs(p / one.step_s - 1) for p, one in zip(
        seconds, result.observed, strict=True)) for seconds in (result.before_s, result.after_s))
    lines += ["", f"error, median over {len(result.observed)}: {before:.1%} before, {after:.1%} after"]
    lines += [f"{factor.name:<9} x {result.factors[factor.name]:.3f}  {factor.meaning}" for factor in FACTORS]
    if out is not None:
        lines.append(f"wrote {out}; `megatron-sov plan RECIPE --parameters {out}` plans with it")
    return "\n".join(lines)


def _format_prediction(predicted_s: float, measured_s: float) -> str:
    return f"{predicted_s:.4g} s {predicted_s / measured_s - 1:+.1%}"
