"""What a run tells of itself, what its team answers, and the computing that both give."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import read_file
from megatron_sov.base.settings.text import Text
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.count import train_flops_per_token
from megatron_sov.plan.operation import DRAWN_SHARE
from megatron_sov.runs.checkpoints import refuse_no_run
from megatron_sov.runs.folder import COMPLETION, CONFIG, FAILURE, RunFolder
from megatron_sov.runs.obs.events import EVENTS, final_steps, read_events
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.history import COMPLETE, KINDS, Attempt, Attempts, is_incident
from megatron_sov.work.clusters.chips import of_device
from megatron_sov.work.clusters.units import JOULES_OF_A_KWH, SECONDS_OF_AN_HOUR

# A figure of a card: a value with the manifest or event that it comes from, or the way to learn it.

Basis = Literal["recorded", "measured", "counted", "computed", "estimated", "stated", "unknown"]
"""recorded: stands in the file as it is; measured: a sum or mean of measurements; counted: how often
something stands there; computed: by a formula from what is recorded; estimated: rests on an assumption, which
`how` names; stated: a person's word; unknown: nobody has recorded it."""


@dataclass(frozen=True)
class RecordedOrigin:
    """Where a value stands."""

    of: str
    """The run or artifact, by its name in the provenance graph."""
    file: str
    """File of its folder, or of the command line."""
    key: str
    """In JSON the way to the value (`content.sources[0].name`); in events the kind, which one of them, and
    the way (`run_start[0].num_params`; `step[*].tokens`: of all of them)."""


@dataclass(frozen=True)
class Figure:
    """A value of the card."""

    value: Any
    """A number, a text, a truth value or a list of these; None: not known."""
    basis: Basis
    """What it rests on."""
    origins: tuple[RecordedOrigin, ...] = ()
    """Where it comes from; none of what is unknown."""
    unit: str = ""
    """Such as "FLOP" or "kWh"; empty: a count or a name."""
    how: str = ""
    """The formula, the assumption, or of what is unknown the way to learn it."""

    @property
    def known(self) -> bool:
        return self.value is not None


def unknown(what: str, way_out: str) -> Figure:
    """Return the figure of what nobody has recorded.

    Args:
        what: its name.
        way_out: how a user can add it.
    """
    return Figure(None, "unknown", how=f"{what}; {way_out}")


def as_json(value: Any) -> Any:
    """Return a card's content as plain values."""
    if isinstance(value, Figure):
        return {"value": as_json(value.value), "basis": value.basis,
                **({"unit": value.unit} if value.unit else {}),
                "from": [{"of": o.of, "file": o.file, "key": o.key} for o in value.origins],
                **({"how": value.how} if value.how else {})}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    # NaN is no JSON, and a figure that is none should be seen
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def figures_in(value: Any) -> Iterator[Figure]:
    if isinstance(value, Figure):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from figures_in(item)


def total(parts: Sequence[Figure], what: str) -> Figure:
    """Return the sum of figures of one unit; unknown where one of them is, and then says which.

    Args:
        parts: the figures; at least one.
        what: what is summed, for the sentence on what is missing.
    """
    missing = [part.how for part in parts if not part.known]
    if missing or not parts:
        return Figure(None, "unknown", unit=parts[0].unit if parts else "",
                      how=f"{what}, since a part is not known: {'; '.join(dict.fromkeys(missing))}")
    order: tuple[Basis, ...] = ("estimated", "stated", "computed", "measured", "counted", "recorded")
    weakest = next(basis for basis in order if any(part.basis == basis for part in parts))
    # a sum stands in no file, though each of its parts does
    if len(parts) > 1 and weakest == "recorded":
        weakest = "computed"
    return Figure(sum(part.value for part in parts), weakest,
                  tuple(dict.fromkeys(o for part in parts for o in part.origins)), parts[0].unit,
                  "; ".join(dict.fromkeys(part.how for part in parts if part.how)))


# What a team says of its model that no manifest knows: a YAML file; the card marks it as stated.

ANSWERS = "answers"
"""What the card calls the file, wherever it lies."""
MOST = 1e6


@dataclass(frozen=True)
class CardAnswers:
    """What a team says; an empty field is one that nobody has filled in."""

    name: Text = ""
    """Name of the model for readers."""
    description: Text = ""
    """What the model is, in a few sentences."""
    licence: Text = ""
    """Licence of the weights, as the Hugging Face hub names it where it does."""
    licence_link: Text = ""
    """Where its text stands."""
    contact: Text = ""
    """Who answers for the model."""
    base_model: tuple[Text, ...] = ()
    """Names on the Hugging Face hub of the models that it was made from."""
    datasets: tuple[Text, ...] = ()
    """Names on the Hugging Face hub of data sets that it was trained on."""
    languages: tuple[Text, ...] = ()
    """Codes of the languages that it is meant for, such as ko."""
    tags: tuple[Text, ...] = ()
    """Further tags."""
    intended_use: Text = ""
    """Tasks that it is meant for, and the systems that it can be built into."""
    out_of_scope: Text = ""
    """What it is not meant for."""
    acceptable_use: Text = ""
    """The acceptable use policy, or where it stands."""
    limitations: Text = ""
    """Known limits, risks and biases."""
    release_date: Text = ""
    """Date of release."""
    distribution: Text = ""
    """How it is handed out."""
    integration: Text = ""
    """What is needed to build it into a system: instructions, infrastructure, tools."""
    rationale: Text = ""
    """Key choices of the design, with reasons and assumptions."""
    data_obtained: Text = ""
    """How data was obtained and selected; how unsuitable sources and biases were looked for."""
    evaluation_strategy: Text = ""
    """How the model is evaluated: criteria, metrics, how limits are found."""
    adversarial_testing: Text = ""
    """Red teaming and adaptations for safety."""
    system_architecture: Text = ""
    """How software components build on each other."""
    region: Text = ""
    """Where it was trained."""
    intensity_g_per_kwh: Annotated[float, Ge(0), Le(MOST)] | None = None
    """Grams of CO2 equivalents that a kilowatt hour emits there."""
    pue: Annotated[float, Ge(1), Le(MOST)] | None = None
    """Energy of the whole site over that of its computers."""
    power_w: Annotated[float, Ge(0), Le(MOST)] | None = None
    """Watts of one process with its share of the machine, where nothing measured them."""
    licences: Mapping[str, Text] = field(default_factory=dict)
    """Source of the data -> its licence, where its manifest has none."""


def read_answers(file: Path) -> CardAnswers:
    """Return what an --answers file says.

    Raises:
        UserError: it cannot be read, or breaks rules; all of them are told.
    """
    return read_file(CardAnswers, file, f"--answers {file}")


KEPT = ("gate", "needle", "passk", "eval", "eval_lm", "decontamination", "heldout_pairs")
"""Events that are kept whole."""
POWER = ("gpu_power_w", "power_w")
"""What steps call the power of their GPU, now and in earlier versions."""
MOST_TOKENS = 1e12
"""No sample is longer."""
MAX_KEPT = 10_000
"""Of each kind, the newest."""


@dataclass
class RecordedWork:
    """What the steps of a run add up to."""

    flops: float = 0.0
    """Model FLOPs of the steps that led to the model; by the formula of `families.count`."""
    flops_again: float = 0.0
    """Of steps that were done again, after a fault or a step back."""
    tokens: int = 0
    """Tokens of the steps that led to the model."""
    energy_by_start: dict[int, float] = field(default_factory=dict)
    """Number of a start -> joules of all GPUs up to its last checkpoint."""
    starts_with_steps: set[int] = field(default_factory=set)
    """Numbers of the starts that came to a step."""
    energy_j: float = 0.0
    """Joules that steps report."""
    num_energy_steps: int = 0
    """Steps that report joules."""
    energy_gpus: int = 0
    """GPUs that a step's joules are of; 0: it does not say."""
    power_ws: float = 0.0
    """Power of the first process's GPU times seconds, over steps that report it."""
    power_s: float = 0.0
    """Seconds of these."""
    power_key: str = ""
    """What these events call the power."""
    num_steps: int = 0
    """Events of steps."""
    unpriced_steps: int = 0
    """Events of steps whose length of samples no phase tells."""


@dataclass
class CardRunRecord:
    """One run."""

    name: str
    """In the card; runs whose folders are named alike have a number behind."""
    path: Path
    """Its folder; never written into a card."""
    config: RunConfig
    """Its settings."""
    settings: dict[str, Any]
    """The same, as config.json has them."""
    completion: dict[str, Any] | None
    """complete.json; None: it has not come to its end."""
    failure: str | None
    """What its gate did not pass by."""
    attempts: list[Attempt] = field(default_factory=list)
    """Its starts."""
    inputs: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    """Manifest hash -> artifact that it read, and the event that says so."""
    work: RecordedWork = field(default_factory=RecordedWork)
    """What its steps add up to."""
    kept: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    """Kind -> events with their numbers among their kind."""
    incidents: Counter[str] = field(default_factory=Counter)
    """Kind of incident -> how often."""
    skipped_by_setting: int = 0
    """Steps passed over as the settings asked."""
    final_loss: float = math.nan
    """Of the last step."""
    longest_tokens: int = 0
    """Longest samples of a step; 0: not known."""

    @property
    def id(self) -> str:
        return f"run {self.name}"

    @property
    def start(self) -> dict[str, Any]:
        """The newest `run_start`; empty where it never started."""
        return self.attempts[-1].start if self.attempts else {}

    @property
    def outcome(self) -> str:
        if self.completion is not None:
            return COMPLETE
        return self.attempts[-1].outcome if self.attempts else "not started"

    def last(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """Return the kept events of a kind, of a step that was done again the last one."""
        numbered = self.kept.get(kind, [])
        # by identity: equal events may stand twice, and the card names the place of the one that counts
        numbers = {id(event): i for i, event in numbered}
        chosen = final_steps([event for _, event in numbered], kind)
        return [(numbers[id(event)], event) for event in chosen]

    def files(self) -> dict[str, str]:
        """Return name -> SHA-256 of the files that the card reads of it."""
        return {name: sha256_file(self.path / name) for name in (CONFIG, EVENTS, COMPLETION, FAILURE)
                if (self.path / name).is_file()}


def read_run_record(path: Path, name: str, flops_per_token: Callable[[RunConfig, int],
                                                                     float]) -> CardRunRecord:
    """Read a run's folder.

    Args:
        path: the folder.
        name: what the card calls it.
        flops_per_token: model FLOPs of a token, by settings and tokens of a sample.

    Raises:
        UserError: it is no run folder, or a file of it is damaged.
    """
    folder = RunFolder(path)
    refuse_no_run(path)
    config = folder.config()
    if config is None:
        raise UserError(f"{path}: holds no {CONFIG}, so it is no run folder; pass the folder given to --run")
    try:
        failure = folder.failure()
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path / FAILURE}: is damaged ({e}); restore it from a copy") from None
    raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    run = CardRunRecord(name, path, config, raw, _completion(folder), failure)
    _read_events(run, lambda seq_len: flops_per_token(config, seq_len))
    return run


def _completion(folder: RunFolder) -> dict[str, Any] | None:
    """Return complete.json, as far as a card can add up what it says."""
    found = folder.completion()
    for name in ("step", "tokens", "wall_s"):
        if found is not None and name in found and not 0 <= number(found[name]) < math.inf:
            raise UserError(f"{folder.path / COMPLETION}: is damaged ({name} = {str(found[name])[:40]!r} is "
                            "no number from 0); restore it from a copy")
    return found


class _Timeline:
    """The steps that led to the model, and those that were done again: a step of an earlier number than the
    last one takes back what stands behind it."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int, float]] = []
        """Step, tokens up to it, FLOPs since the one before."""
        self.flops_again = 0.0

    def add(self, step: int, tokens: int, per_token: float) -> None:
        # a restart goes back to a checkpoint: the steps behind it count as done again
        while self._steps and self._steps[-1][0] >= step:
            self.flops_again += self._steps.pop()[2]
        before = self._steps[-1][1] if self._steps else 0
        self._steps.append((step, tokens, max(0, tokens - before) * per_token))

    @property
    def flops(self) -> float:
        return math.fsum(flops for _, _, flops in self._steps)

    @property
    def tokens(self) -> int:
        return self._steps[-1][1] if self._steps else 0


def _read_events(run: CardRunRecord, flops_per_token: Callable[[int], float]) -> None:
    attempts, timeline, work = Attempts(), _Timeline(), run.work
    phases: list[tuple[int, int]] = []
    per_token: dict[int, float] = {}
    numbers: Counter[str] = Counter()
    for event in read_events(run.path / EVENTS):
        kind = str(event["event"])
        attempts.add(event)
        index = numbers[kind]
        numbers[kind] += 1
        if kind == "run_start":
            # each start announces its curriculum from the beginning
            phases.clear()
            _add_inputs(run, event, index)
        elif kind == "phase" and 1 <= number(event.get("seq_len")) < MOST_TOKENS and "step" in event:
            phases.append((int(event["step"] or 0), int(number(event["seq_len"]))))
        elif kind == "step" and event.get("step") is not None:
            step = int(event["step"])
            run.final_loss = number(event.get("loss"))
            # the phase that began before this step; its length decides the FLOPs of a token
            seq_len = next((length for first, length in reversed(phases) if first < step), 0)
            run.longest_tokens = max(run.longest_tokens, seq_len)
            # once for each length: a run has hundreds of thousands of steps
            if seq_len not in per_token:
                per_token[seq_len] = flops_per_token(seq_len) if seq_len else 0.0
            tokens = number(event.get("tokens"))
            # events are data of others: a number that is none must not spoil the sum
            if 0 <= tokens < math.inf:
                timeline.add(step, int(tokens), per_token[seq_len])
            work.starts_with_steps.add(numbers["run_start"] - 1)
            _add_power(work, event, seq_len)
        elif kind == "energy" and 0 <= number(event.get("energy_j")) < math.inf:
            _add_energy(work, event, numbers["run_start"] - 1, attempts.all[-1].start if attempts.all else {})
        elif kind in KINDS:
            run.incidents[kind] += is_incident(event)
            run.skipped_by_setting += not is_incident(event)
        elif kind in KEPT:
            kept = run.kept.setdefault(kind, [])
            kept.append((index, event))
            # the newest ones: memory stays bounded however long the run was
            del kept[:-MAX_KEPT]
    run.attempts = attempts.all
    work.flops, work.flops_again, work.tokens = timeline.flops, timeline.flops_again, timeline.tokens


def _add_inputs(run: CardRunRecord, event: dict[str, Any], index: int) -> None:
    """Take in what a start says that it reads; what is no such record is passed over."""
    inputs = event.get("inputs")
    for i, item in enumerate(inputs if isinstance(inputs, list) else []):
        if isinstance(item, dict) and all(isinstance(item.get(key), str)
                                          for key in ("kind", "path", "manifest_sha256")):
            run.inputs[item["manifest_sha256"]] = item, f"run_start[{index}].inputs[{i}].manifest_sha256"


def _add_energy(work: RecordedWork, event: dict[str, Any], place: int, start: dict[str, Any]) -> None:
    """Take in the energy of all GPUs since a start; that of some of them is no measure of the run."""
    # the last word of a start counts: its energy is cumulative
    work.energy_by_start.pop(place, None)
    # written with "not" so that NaN, where a start names no ranks, lets the energy pass
    if not number(event.get("num_gpus")) < number(start.get("num_ranks")):
        work.energy_by_start[place] = number(event["energy_j"])


def _add_power(work: RecordedWork, event: dict[str, Any], seq_len: int) -> None:
    """Take in what a step says of itself beside its tokens."""
    work.num_steps += 1
    work.unpriced_steps += not seq_len
    power_key = next((name for name in POWER if name in event), "")
    watts = number(event.get(power_key))
    joules, seconds = number(event.get("energy_j")), number(event.get("step_time_s"))
    if 0 <= joules < math.inf:
        work.energy_j += joules
        work.num_energy_steps += 1
        gpus = number(event.get("energy_gpus"))
        work.energy_gpus = int(gpus) if 0 < gpus < math.inf else 0
    # power times time, for runs whose drivers tell watts and no joules
    if 0 <= watts < math.inf and 0 < seconds < math.inf:
        work.power_ws += watts * seconds
        work.power_s += seconds
        work.power_key = power_key


# What a run has cost: hours, floating point operations, energy, carbon; each measured or estimated.

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
    """Return the model FLOPs of a token in training (`families.count`)."""
    return train_flops_per_token(config.model, seq_len)


def compute_of(run: CardRunRecord, answers: CardAnswers) -> Compute:
    process_hours = _process_hours(run)
    gpu_hours = _gpu_hours(run, process_hours)
    energy = _energy(run, process_hours, gpu_hours, answers)
    flops, again = _flops(run)
    return Compute(process_hours, gpu_hours, flops, again, energy, _carbon(energy, answers))


def total_compute(parts: Sequence[Compute]) -> Compute:
    return Compute(*(total([getattr(part, name) for part in parts], f"{what} of all runs") for name, what in (
        ("process_hours", "process hours"), ("gpu_hours", "GPU hours"), ("flops", "FLOPs"),
        ("flops_again", "repeated FLOPs"), ("energy_kwh", "energy"), ("carbon_g", "carbon"))))


def _process_hours(run: CardRunRecord) -> Figure:
    """Return processes times the time from the beginning of each start to its last event."""
    if not run.attempts:
        return unknown(f"hours of run {run.name}", "its events tell of no start; they cannot be added later")
    seconds = 0.0
    for attempt in run.attempts:
        began = number(attempt.start.get("began_s", attempt.start.get("time_s")))
        wall_s = attempt.last_time_s - began
        # clocks of two machines may differ
        seconds += max(0.0, wall_s) * max(0.0, number(attempt.start.get("num_ranks")))
    if not seconds < float("inf"):
        return unknown(f"hours of run {run.name}", "a start does not tell when, or how many processes")
    begins = ["run_start[*].began_s"] if any("began_s" in a.start for a in run.attempts) else []
    origins = _of(run, "run_start[*].num_ranks", *begins, "*[*].time_s")
    return Figure(seconds / SECONDS_OF_AN_HOUR, "measured", origins, "h",
                  "processes x (last event - begin), over all starts")


def _gpu_hours(run: CardRunRecord, process_hours: Figure) -> Figure:
    """Return the process hours of a run whose processes had a GPU each."""
    on_gpu = [attempt.start.get("on_gpu") for attempt in run.attempts]
    # mixed or silent starts: a figure for a part of the run would be taken for all of it
    if not process_hours.known or not (all(x is True for x in on_gpu) or all(x is False for x in on_gpu)):
        return unknown(f"GPU hours of run {run.name}", "its starts do not tell whether it ran on GPUs; runs "
                       "of this version do")
    value = process_hours.value if on_gpu[0] else 0.0
    return Figure(value, "measured", (*_of(run, "run_start[*].on_gpu"), *process_hours.origins), "h",
                  "process hours of processes with a GPU each")


def _flops(run: CardRunRecord) -> tuple[Figure, Figure]:
    """Return the FLOPs of the steps that led to the model, and of those that were done again."""
    # one step without a price would make the sum too small
    if not run.work.num_steps or run.work.unpriced_steps:
        missing = unknown(f"FLOPs of run {run.name}", "its events do not tell tokens and phase of each step; "
                          "they cannot be added later")
        return missing, missing
    origins = (*_of(run, "step[*].tokens", "phase[*].seq_len"), RecordedOrigin(run.id, CONFIG, "model"))
    how = ("tokens of each step x 6 x weights that a token is multiplied with, and attention (PaLM, arXiv "
           "2204.02311, appendix B); what a teacher, a reference or generation computes is not in it")
    if run.config.lora.on:
        how += "; frozen weights of an adapter's model need a third less than is counted"
    return (Figure(run.work.flops, "computed", origins, "FLOP", how),
            Figure(run.work.flops_again, "computed", origins, "FLOP",
                   "the same, of steps that were done again after a fault or a step back"))


def _energy(run: CardRunRecord, process_hours: Figure, gpu_hours: Figure, answers: CardAnswers) -> Figure:
    """Return kilowatt hours by the best that there is: joules, watts, the chip's maker, a person's word."""
    work, ranks = run.work, number(run.start.get("num_ranks"))
    # all starts or none: a start without this event would be left out of the sum, and nobody would see it
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
                      (RecordedOrigin(ANSWERS, ANSWERS, "power_w"), *process_hours.origins), "kWh",
                      "process hours x the stated power of one process")
    return unknown(f"energy of run {run.name}", "no event tells joules or watts and no chip is known; state "
                   "power_w (watts of one process) in --answers")


def _carbon(energy: Figure, answers: CardAnswers) -> Figure:
    """Return what the energy emits, by the intensity that someone states."""
    if answers.intensity_g_per_kwh is None:
        return unknown("carbon", "state intensity_g_per_kwh in --answers")
    if not energy.known:
        return Figure(None, "unknown", unit="g", how=energy.how)
    pue = answers.pue
    origins = (RecordedOrigin(ANSWERS, ANSWERS, "intensity_g_per_kwh"), *energy.origins,
               *((RecordedOrigin(ANSWERS, ANSWERS, "pue"),) if pue is not None else ()))
    how = " x the stated PUE" if pue is not None else "; the site's overhead is not in it"
    return Figure(energy.value * answers.intensity_g_per_kwh * (1.0 if pue is None else pue), "estimated",
                  origins, "g", f"energy x the stated intensity{how}")


def _of(run: CardRunRecord, *keys: str) -> tuple[RecordedOrigin, ...]:
    return tuple(RecordedOrigin(run.id, EVENTS, key) for key in keys)
