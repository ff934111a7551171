"""`megatron-sov plan --calibrate RUN ...`: the parameters of speed, learned from a team's own runs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output, refuse_input
from megatron_sov.model.config import ParallelConfig, PhaseConfig, RunConfig
from megatron_sov.plan.calibration.learned import (
    LearnedCorrection, LocalMachine, Passes, as_json, learn, passes_of, shipped, step_seconds)
from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.runs.folder import CONFIG, RunFolder
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.history import MeasuredStretch, Stretches
from megatron_sov.work.clusters.chips import CHIPS, Chip, of_device

MOST = 10**9
"""Of processes, threads, tokens of a sample, samples and seconds of a step: no run has more."""
LEAST_STEP_S = 1e-6
LEAST_STEPS = 5
"""Of a stretch, the first ones of a start left out: fewer say little."""
WAITS = ("policy", "distill")
"""Objectives whose steps wait for what other jobs write: their seconds are not those of the arithmetic."""
NOISE = 0.03
"""Standard deviation of the logarithm of a measured median step around the truth, and the model's own error
between similar layouts."""
HUBER = 2.0
"""Residuals above so many standard deviations count by their size, not its square."""
STEP, MAX_ROUNDS, ENOUGH = 1e-3, 30, 1e-5


# What runs have shown of speed: steps that were alike, and on what they ran, read from their folders.


@dataclass(frozen=True)
class CalibrationPoint:
    """Steps of one run, layout, length and batch size."""

    run: str
    """The run folder's name."""
    config: RunConfig
    """Its settings, in the layout of these steps."""
    phase: PhaseConfig
    """Its length and batch size hold."""
    num_ranks: int
    device: str
    """What the GPUs, or the processor, call themselves."""
    chip: Chip | None
    """What is known of the GPUs; None: steps on a processor."""
    threads: int
    step_s: float
    num_steps: int
    """Steps that it is the median of."""


def observations(runs: list[Path]) -> list[CalibrationPoint]:
    """Return what runs have shown; there is something of each.

    Raises:
        UserError: a folder is no run, or nothing can be learned from it; the message says why.
    """
    return [one for run in runs for one in _of_run(run)]


def _of_run(run: Path) -> list[CalibrationPoint]:
    config = RunFolder(run).config()
    if config is None or not (run / EVENTS).is_file():
        raise UserError(f"--calibrate {run}: is no run; pass folders that were given to --run")
    if config.objective.name in WAITS:
        raise UserError(f"--calibrate {run}: its steps (objective {config.objective.name}) wait for what "
                        "other jobs write, and say nothing of speed; pass runs of pretrain, extend, sft or "
                        "prefer")
    collected = Stretches()
    for event in read_events(run / EVENTS):
        collected.add(event)
    enough = [s for s in collected.all if len(s.warm_times_s()) >= LEAST_STEPS]
    if not enough:
        most = max((len(s.warm_times_s()) for s in collected.all), default=0)
        raise UserError(f"--calibrate {run}: has at most {most} steps of one length and batch size (its "
                        f"first ones left out), and {LEAST_STEPS} are needed; let it run longer, or leave "
                        "it out")
    found = [_observation(run, config, stretch) for stretch in enough]
    return _merged(found)


def _observation(run: Path, config: RunConfig, stretch: MeasuredStretch) -> CalibrationPoint:
    """Return what one stretch has shown.

    Raises:
        UserError: its start does not say on what it ran, or that is in no table.
    """
    machine = stretch.start.get("machine")
    device = str(machine.get("device") or "") if isinstance(machine, dict) else ""
    if not device or not isinstance(machine, dict):
        raise UserError(f"--calibrate {run}: does not say on what it ran, as runs of earlier versions do "
                        "not; leave it out, or go on with it for some steps")
    # A processor's name is never looked up among GPUs.
    known = of_device(device) if stretch.start.get("on_gpu") else None
    if known is None and stretch.start.get("on_gpu"):
        raise UserError(f"--calibrate {run}: {device!r} is in no table of GPUs ({', '.join(sorted(CHIPS))}); "
                        "leave it out")
    layout = _layout(run, config, stretch.start.get("layout"))
    num_ranks, threads = number(stretch.start.get("num_ranks")), number(machine.get("threads") or 1)
    counts = (num_ranks, threads, stretch.seq_len, stretch.global_batch_size)
    possible = all(1 <= n <= MOST for n in counts)
    step_s = stretch.typical_s()
    if not LEAST_STEP_S <= step_s <= MOST:
        raise UserError(f"--calibrate {run}: its {EVENTS} tells of steps of {step_s:.3g} s, which no run "
                        "has; leave it out")
    if not possible or layout.problems(config.model, int(num_ranks)):
        raise UserError(f"--calibrate {run}: its {EVENTS} tells of processes, a layout or samples that no "
                        "run can have; leave it out")
    return CalibrationPoint(
        run.resolve().name, dataclasses.replace(config, parallel=layout),
        PhaseConfig(stretch.phase, seq_len=stretch.seq_len, global_batch_size=stretch.global_batch_size),
        int(num_ranks), device, known, int(threads), step_s, len(stretch.warm_times_s()))


def _layout(run: Path, config: RunConfig, told: Any) -> ParallelConfig:
    """Return the layout of a start: its config.json has that of the last one."""
    names = {f.name for f in dataclasses.fields(ParallelConfig)}
    if not isinstance(told, dict) or not names & set(told):
        raise UserError(f"--calibrate {run}: its {EVENTS} names no layout; leave it out")
    values = dataclasses.asdict(config.parallel) | {k: v for k, v in told.items() if k in names}
    try:
        return TypeAdapter(ParallelConfig).validate_python(values)
    except ValidationError as e:
        raise UserError(f"--calibrate {run}: the layout of its {EVENTS} is none ({e.errors()[0]['msg']}); "
                        "leave it out") from None


def _merged(found: list[CalibrationPoint]) -> list[CalibrationPoint]:
    """Return one observation for steps of several starts that were alike: the mean by steps."""
    groups: dict[Any, list[CalibrationPoint]] = {}
    for one in found:
        # Whatever the seconds of a step depend on; the name of the phase is not among it.
        key = (one.num_ranks, one.device, one.threads, repr(one.config.parallel), one.phase.seq_len,
               one.phase.global_batch_size)
        groups.setdefault(key, []).append(one)
    merged = []
    for group in groups.values():
        steps = sum(one.num_steps for one in group)
        mean_s = math.fsum(one.step_s * one.num_steps for one in group) / steps
        merged.append(dataclasses.replace(group[0], step_s=mean_s, num_steps=steps))
    return merged


# Few factors on the shipped parameters that explain a team's own runs, each drawn towards 1. A run or two
# cannot tell thirty parameters apart, but they do tell whether this machine's products, its links and its
# hosts are faster or slower than those of published runs. So three factors are learned: the most probable
# ones, where the logarithm of each is normal around 0, and that of measured / predicted around their effect
# (maximum a posteriori, by damped Gauss-Newton; large residuals count less, after Huber).


@dataclass(frozen=True)
class Factor:
    name: str
    meaning: str
    spread: float
    """Standard deviation of its logarithm before anything was seen: how far machines differ."""


FACTORS = (
    Factor("products", "share of the peak that matrix products and attention reach, on these chips", 0.15),
    Factor("links", "share of the links' bandwidth that messages reach", 0.4),
    Factor("host", "seconds of the host: launches of kernels, and a step's own", 0.5))


def scaled(parameters: Parameters, factors: dict[str, float], chips: Sequence[Chip]) -> Parameters:
    """Return parameters with factors on them; shares stay at most 1, and those of chips that nobody has seen
    stay as they are."""
    products, links, host = (factors[f.name] for f in FACTORS)
    seen = {one.generation for one in chips}
    fractions = dict(parameters.product_fraction)
    for family in seen & set(fractions):
        fractions[family] = {unit: min(1.0, share * products) for unit, share in fractions[family].items()}
    attention = {family: min(1.0, share * products) if family in seen else share
                 for family, share in parameters.attention_fraction.items()}
    return replace(
        parameters, product_fraction=fractions, attention_fraction=attention,
        inside_fraction=min(1.0, parameters.inside_fraction * links),
        between_fraction=min(1.0, parameters.between_fraction * links),
        layer_launch_s=parameters.layer_launch_s * host, moe_launch_s=parameters.moe_launch_s * host,
        step_overhead_s=parameters.step_overhead_s * host)


def fit(measured_s: Sequence[float],
        predict: Callable[[dict[str, float]], Sequence[float]]) -> dict[str, float]:
    """Return the most probable factors, by name.

    Args:
        measured_s: seconds of steps.
        predict: factors -> the predicted seconds of the same steps.
    """
    at = [0.0] * len(FACTORS)

    def residuals(logs: Sequence[float]) -> list[float]:
        predicted = predict(_named(logs))
        return [math.log(p / m) / NOISE for p, m in zip(predicted, measured_s, strict=True)]

    now = residuals(at)
    for _ in range(MAX_ROUNDS):
        moved = _gauss_newton(at, now, residuals)
        share = 1.0
        # Damped: a full step may overshoot, since shares stop at 1 and the cost is no parabola.
        while share > 1e-3 and _cost([a + share * m for a, m in zip(at, moved, strict=True)],
                                     residuals) > _cost(at, residuals):
            share /= 2
        at = [a + share * m for a, m in zip(at, moved, strict=True)]
        now = residuals(at)
        if share * max(map(abs, moved)) < ENOUGH:
            break
    return _named(at)


def _named(logs: Sequence[float]) -> dict[str, float]:
    return {factor.name: math.exp(log) for factor, log in zip(FACTORS, logs, strict=True)}


def _cost(logs: Sequence[float], residuals: Callable[[Sequence[float]], list[float]]) -> float:
    """Return minus the logarithm of the probability, up to a constant."""
    misfit = sum(r * r / 2 if abs(r) <= HUBER else HUBER * (abs(r) - HUBER / 2) for r in residuals(logs))
    return misfit + sum((log / factor.spread) ** 2 / 2 for factor, log in zip(FACTORS, logs, strict=True))


def _gauss_newton(at: Sequence[float], now: Sequence[float],
                  residuals: Callable[[Sequence[float]], list[float]]) -> list[float]:
    """Return the step to the minimum of the quadratic that the cost is like here."""
    n = len(at)
    slopes = []
    for i in range(n):
        beside = residuals([*at[:i], at[i] + STEP, *at[i + 1:]])
        slopes.append([(b - a) / STEP for a, b in zip(now, beside, strict=True)])
    # Huber as weights of least squares: one odd run must not bend the factors for all others.
    weights = [min(1.0, HUBER / abs(r)) if r else 1.0 for r in now]
    # The prior's 1 / spread^2 on the diagonal makes it solvable where runs say nothing of a factor.
    matrix = [[sum(w * a * b for w, a, b in zip(weights, first, second, strict=True)) for second in slopes]
              for first in slopes]
    for i, factor in enumerate(FACTORS):
        matrix[i][i] += 1 / factor.spread ** 2
    right = [-sum(w * a * r for w, a, r in zip(weights, slopes[i], now, strict=True))
             - at[i] / FACTORS[i].spread ** 2 for i in range(n)]
    return [float(x) for x in np.linalg.solve(matrix, right)]


@dataclass(frozen=True)
class Calibration:
    learned: LearnedCorrection
    """What explains them; what they did not show is as it was."""
    factors: dict[str, float]
    """Factor on the parameters before; empty: no run was on GPUs."""
    observed: tuple[CalibrationPoint, ...]
    before_s: tuple[float, ...]
    """Seconds of a step that were predicted before; NaN: none were."""
    after_s: tuple[float, ...]


def calibrate(runs: Sequence[Path], out: Path | None = None, base: LearnedCorrection | None = None) -> str:
    """Learn parameters, write them where `out` says, and return what came of it, for a terminal.

    Raises:
        UserError: nothing can be learned from a folder, or the file cannot be written.
    """
    if out is not None:
        refuse_input("--output", out, *(run / name for run in runs for name in (CONFIG, EVENTS)))
        check_output("--output", out)
    found = calibration(observations(list(runs)), base or shipped())
    if out is not None:
        write_output(out, to_json(as_json(found.learned, _provenance(found))))
    return _text(found, out)


def calibration(observed: Sequence[CalibrationPoint], base: LearnedCorrection) -> Calibration:
    on_gpus = [(one, one.chip) for one in observed if one.chip is not None]
    # Factors go on the parameters of the base: a second calibration starts from what the first one learned.
    parameters, factors = base.parameters, {}
    if on_gpus:
        chips = [on for _, on in on_gpus]

        def tried(factors: dict[str, float]) -> list[float]:
            learned = LearnedCorrection(scaled(base.parameters, factors, chips))
            return [_seconds(one, learned) for one, _ in on_gpus]

        factors = fit([one.step_s for one, _ in on_gpus], tried)
        parameters = scaled(base.parameters, factors, chips)
    own = {device: _machine(observed, device)
           for device in dict.fromkeys(one.device for one in observed if one.chip is None)}
    learned = LearnedCorrection(parameters, {**base.machines, **own})
    return Calibration(learned, factors, tuple(observed), tuple(_seconds(one, base) for one in observed),
                       tuple(_seconds(one, learned) for one in observed))


def _machine(observed: Sequence[CalibrationPoint], device: str) -> LocalMachine:
    return learn([(_passes(one), one.step_s) for one in observed if one.device == device])


def _seconds(one: CalibrationPoint, learned: LearnedCorrection) -> float:
    """Return the predicted seconds of a step, NaN where nothing is known of its processor."""
    if one.chip is not None:
        return step_seconds(one.config, one.phase, one.num_ranks, one.chip, learned.parameters)
    if one.device not in learned.machines:
        return math.nan
    return sum(learned.machines[one.device].seconds(_passes(one)).values())


def _passes(one: CalibrationPoint) -> Passes:
    return passes_of(one.config, one.num_ranks, one.threads, one.phase.seq_len, one.phase.global_batch_size)


def _provenance(found: Calibration) -> dict[str, object]:
    return {"by": "megatron-sov plan --calibrate", "factors": found.factors, "from": [
        {"run": one.run, "recipe": one.config.recipe, "device": one.device, "processes": one.num_ranks,
         "seq_len": one.phase.seq_len, "global_batch_size": one.phase.global_batch_size,
         "steps": one.num_steps, "step_s": one.step_s, "before_s": before, "after_s": after}
        for one, before, after in zip(found.observed, map(_or_none, found.before_s), found.after_s,
                                      strict=True)]}


def _or_none(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds


def _text(found: Calibration, out: Path | None) -> str:
    """Return the steps with their errors before and after, and the factors."""
    lines = [f"{'run':<24} {'processes':>9} {'samples x tokens':>18} {'steps':>6} {'measured':>10} "
             f"{'before':>18} {'after':>18}"]
    rows = zip(found.observed, found.before_s, found.after_s, strict=True)
    for one, before_s, after_s in rows:
        batch = f"{one.phase.global_batch_size:,} x {one.phase.seq_len:,}"
        lines.append(f"{one.run[:24]:<24} {one.num_ranks:>9,} {batch:>18} {one.num_steps:>6,} "
                     f"{one.step_s:>8.4g} s {_beside(before_s, one.step_s):>18} "
                     f"{_beside(after_s, one.step_s):>18}")
    before, after = (_median(seconds, found.observed) for seconds in (found.before_s, found.after_s))
    lines += ["", f"error, median over {len(found.observed)}: {before} before, {after} after"]
    lines += [f"{factor.name:<9} x {found.factors[factor.name]:.3f}  {factor.meaning}"
              for factor in FACTORS if found.factors]
    seen = {one.device for one in found.observed if one.chip is None}
    lines += [f"{name}: {own.flops_per_s / 1e9:.3g} GFLOP/s a thread, {1e3 * own.layer_s:.3g} ms a layer and "
              "micro-batch" for name, own in found.learned.machines.items() if name in seen]
    if out is not None:
        lines.append(f"wrote {out}; `megatron-sov plan RECIPE --parameters {out}` plans with it")
    return "\n".join(lines)


def _beside(predicted_s: float, measured_s: float) -> str:
    return "–" if math.isnan(predicted_s) else f"{predicted_s:.4g} s {predicted_s / measured_s - 1:+.1%}"


def _median(predicted_s: Sequence[float], observed: Sequence[CalibrationPoint]) -> str:
    errors = [abs(p / one.step_s - 1) for p, one in zip(predicted_s, observed, strict=True)
              if not math.isnan(p)]
    return f"{statistics.median(errors):.1%}" if errors else "none"
