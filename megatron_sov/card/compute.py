"""What a run has cost: hours, floating point operations, energy, carbon; each measured or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sov.card.answers import ANSWERS, Answers
from megatron_sov.card.figures import Figure, Origin, total, unknown
from megatron_sov.card.run_record import RunRecord
from megatron_sov.clusters.chips import of_device
from megatron_sov.config import RunConfig
from megatron_sov.models.count import train_flops_per_token
from megatron_sov.obs.events import EVENTS
from megatron_sov.obs.figures import number
from megatron_sov.obs.units import JOULES_OF_A_KWH, SECONDS_OF_AN_HOUR
from megatron_sov.plan.operation import DRAWN_SHARE
from megatron_sov.runs.folder import CONFIG


@dataclass(frozen=True)
class Compute:
    """What one run, or all, have cost."""

    process_hours: Figure
    """Processes times wall time."""
    gpu_hours: Figure
    """GPUs times wall time; 0 where there were none."""
    flops: Figure
    """Of the steps that led to the model."""
    flops_again: Figure
    """Of steps that were done again."""
    energy_kwh: Figure
    """Of the processes' machines."""
    carbon_g: Figure
    """CO2 equivalents, where someone says what a kilowatt hour emits."""


def flops_per_token(config: RunConfig, seq_len: int) -> float:
    """Return the model FLOPs of a token in training (`models.count`)."""
    return train_flops_per_token(config.model, seq_len)


def compute_of(run: RunRecord, answers: Answers) -> Compute:
    """Return what one run has cost."""
    process_hours = _process_hours(run)
    gpu_hours = _gpu_hours(run, process_hours)
    energy = _energy(run, process_hours, gpu_hours, answers)
    flops, again = _flops(run)
    return Compute(process_hours, gpu_hours, flops, again, energy, _carbon(energy, answers))


def total_compute(parts: Sequence[Compute]) -> Compute:
    """Return the sum over runs."""
    return Compute(*(total([getattr(part, name) for part in parts], f"{what} of all runs") for name, what in (
        ("process_hours", "process hours"), ("gpu_hours", "GPU hours"), ("flops", "FLOPs"),
        ("flops_again", "repeated FLOPs"), ("energy_kwh", "energy"), ("carbon_g", "carbon"))))


def _process_hours(run: RunRecord) -> Figure:
    """Return processes times the time from the beginning of each start to its last event."""
    if not run.attempts:
        return unknown(f"hours of run {run.name}", "its events tell of no start; they cannot be added later")
    seconds = 0.0
    for attempt in run.attempts:
        began = number(attempt.start.get("began_s", attempt.start.get("time_s")))
        wall_s = attempt.last_time_s - began
        seconds += max(0.0, wall_s) * max(0.0, number(attempt.start.get("num_ranks")))
    if not seconds < float("inf"):
        return unknown(f"hours of run {run.name}", "a start does not tell when, or how many processes")
    begins = ["run_start[*].began_s"] if any("began_s" in a.start for a in run.attempts) else []
    origins = _of(run, "run_start[*].num_ranks", *begins, "*[*].time_s")
    return Figure(seconds / SECONDS_OF_AN_HOUR, "measured", origins, "h",
                  "processes x (last event - begin), over all starts")


def _gpu_hours(run: RunRecord, process_hours: Figure) -> Figure:
    """Return the process hours of a run whose processes had a GPU each."""
    on_gpu = [attempt.start.get("on_gpu") for attempt in run.attempts]
    if not process_hours.known or not (all(x is True for x in on_gpu) or all(x is False for x in on_gpu)):
        return unknown(f"GPU hours of run {run.name}", "its starts do not tell whether it ran on GPUs; runs "
                       "of this version do")
    value = process_hours.value if on_gpu[0] else 0.0
    return Figure(value, "measured", (*_of(run, "run_start[*].on_gpu"), *process_hours.origins), "h",
                  "process hours of processes with a GPU each")


def _flops(run: RunRecord) -> tuple[Figure, Figure]:
    """Return the FLOPs of the steps that led to the model, and of those that were done again."""
    if not run.work.num_steps or run.work.unpriced_steps:
        missing = unknown(f"FLOPs of run {run.name}", "its events do not tell tokens and phase of each step; "
                          "they cannot be added later")
        return missing, missing
    origins = (*_of(run, "step[*].tokens", "phase[*].seq_len"), Origin(run.id, CONFIG, "model"))
    how = ("tokens of each step x 6 x weights that a token is multiplied with, and attention (PaLM, arXiv "
           "2204.02311, appendix B); what a teacher, a reference or generation computes is not in it")
    if run.config.lora.on:
        how += "; frozen weights of an adapter's model need a third less than is counted"
    return (Figure(run.work.flops, "computed", origins, "FLOP", how),
            Figure(run.work.flops_again, "computed", origins, "FLOP",
                   "the same, of steps that were done again after a fault or a step back"))


def _energy(run: RunRecord, process_hours: Figure, gpu_hours: Figure, answers: Answers) -> Figure:
    """Return kilowatt hours by the best that there is: joules, watts, the chip's maker, a person's word."""
    work, ranks = run.work, number(run.start.get("num_ranks"))
    if work.starts_with_steps and work.starts_with_steps <= set(work.energy_by_start):
        return Figure(sum(work.energy_by_start.values()) / JOULES_OF_A_KWH, "measured",
                      _of(run, "energy[*].energy_j"), "kWh", "of all GPUs by their own meters, up to the "
                      "last checkpoint of each start; the rest of the machines is not in it")
    if work.num_steps and work.num_energy_steps == work.num_steps and work.energy_gpus and ranks >= 1:
        return Figure(work.energy_j / JOULES_OF_A_KWH * ranks / work.energy_gpus, "estimated",
                      _of(run, "step[*].energy_j", "run_start[*].num_ranks"), "kWh",
                      f"joules of {work.energy_gpus} GPU(s) during steps, taken for each of all processes; "
                      "the rest of the machines is not in it")
    if work.power_s and process_hours.known:
        watts = work.power_ws / work.power_s
        return Figure(watts * process_hours.value / 1000, "estimated",
                      (*_of(run, f"step[*].{work.power_key}", "step[*].step_time_s"), *process_hours.origins),
                      "kWh", "mean power of the first process's GPU x process hours; the rest of the "
                      "machines is not in it")
    machine = run.start.get("machine")
    device = str(machine.get("device", "")) if isinstance(machine, dict) else ""
    chip = of_device(device)
    if chip is not None and gpu_hours.known and gpu_hours.value:
        origins = (*_of(run, f"run_start[{len(run.attempts) - 1}].machine.device"), *gpu_hours.origins)
        return Figure(chip.server_power_w * DRAWN_SHARE * gpu_hours.value / 1000, "estimated", origins, "kWh",
                      f"GPU hours x {chip.server_power_w:g} W, the most that the share of one {chip.name} in "
                      f"its maker's server draws, x {DRAWN_SHARE} (arXiv 2412.08602)")
    if answers.power_w is not None and process_hours.known:
        return Figure(answers.power_w * process_hours.value / 1000, "estimated",
                      (Origin(ANSWERS, ANSWERS, "power_w"), *process_hours.origins), "kWh",
                      "process hours x the stated power of one process")
    return unknown(f"energy of run {run.name}", "no event tells joules or watts and no chip is known; state "
                   "power_w (watts of one process) in --answers")


def _carbon(energy: Figure, answers: Answers) -> Figure:
    """Return what the energy emits, by the intensity that someone states."""
    if answers.intensity_g_per_kwh is None:
        return unknown("carbon", "state intensity_g_per_kwh in --answers")
    if not energy.known:
        return Figure(None, "unknown", unit="g", how=energy.how)
    pue = answers.pue
    origins = (Origin(ANSWERS, ANSWERS, "intensity_g_per_kwh"), *energy.origins,
               *((Origin(ANSWERS, ANSWERS, "pue"),) if pue is not None else ()))
    how = " x the stated PUE" if pue is not None else "; the site's overhead is not in it"
    return Figure(energy.value * answers.intensity_g_per_kwh * (1.0 if pue is None else pue), "estimated",
                  origins, "g", f"energy x the stated intensity{how}")


def _of(run: RunRecord, *keys: str) -> tuple[Origin, ...]:
    return tuple(Origin(run.id, EVENTS, key) for key in keys)
