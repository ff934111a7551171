"""Read a run folder for the report: `config.json`, `events.jsonl`, evaluations and round manifests."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.publish.report.evaluations import ExportEvaluation, find_unrecorded_scores, read_evaluations
from megatron_sov.publish.report.steps import Curve, StepTable, build_curve
from megatron_sov.runs.checkpoints import check_run_folder
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.obs.events import EVENTS, final_step_events, read_events
from megatron_sov.runs.obs.figures import combine_bits_per_byte, parse_number
from megatron_sov.runs.obs.history import INCIDENT_NAMES, Attempt, Attempts, is_incident
from megatron_sov.runs.obs.validation import RESPONSES, VALIDATION
from megatron_sov.runs.rounds import TRAINED_GROUPS

CONFIG = "config.json"
LEARNING_GROUPS = "learning_groups"
"""Curve name: share of a round's groups that the round trained on."""
REPORTED_EVENTS = ("eval", "needle", "passk", "gate", "conversion", "checkpoint", "warning",
                   "heldout_pairs", "heldout_divergence", "round", VALIDATION, "eval_lm",
                   "score", *INCIDENT_NAMES)
"""Small and rare events that the report needs in full."""


@dataclass(frozen=True)
class HeldoutSource:
    """Held-out evaluations of a single source."""

    loss: Curve
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: Curve
    """Bits per UTF-8 byte, comparable between tokenizers."""
    num_tokens: int
    """Tokens in the last evaluation."""
    is_chat: bool = False
    """Whether the documents are conversations."""


@dataclass
class Run:
    """Contents of a run folder that the report shows."""

    name: str
    config: dict[str, Any]
    """Resolved settings; empty without `config.json`."""
    attempts: list[Attempt] = field(default_factory=list)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """Group -> name -> curve, see `StepTable.build_curves`; group `rounds`: means per RL round."""
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, first step, last step) per phase."""
    heldout: dict[str, HeldoutSource] = field(default_factory=dict)
    overall_bits_per_byte: Curve | None = None
    """Bits per byte over all held-out sources, weighted by bytes."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Failures and recoveries in time order, except steps in `data.skip_steps`."""
    gate_checks: list[dict[str, Any]] = field(default_factory=list)
    """The last gate check per step, in step order."""
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Name from `REPORTED_EVENTS` -> its events in file order."""
    needles: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Manifest contents of RL rounds, in order."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """`eval_lm` events in time order."""
    evaluations: list[ExportEvaluation] = field(default_factory=list)
    responses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Origin (round or validation) -> newest event with sampled responses."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wall_time_s(self) -> float:
        """Seconds over all attempts, without the pauses between attempts."""
        return sum(attempt.wall_s() for attempt in self.attempts)

    @property
    def recipe_name(self) -> str:
        return str(self.config.get("recipe") or self.get_start_field("recipe") or "")

    def get_curve(self, name: str) -> Curve | None:
        """Return the curve of a plain field (loss, lr, grad_norm, ...), or None if no step has the field."""
        return self.curves.get("", {}).get(name)

    def get_events(self, name: str) -> list[dict[str, Any]]:
        return self.events.get(name, [])

    def get_start_field(self, name: str) -> Any:
        """Return a field from the newest `run_start` that has it, or None."""
        return next((attempt.start[name] for attempt in reversed(self.attempts)
                     if attempt.start.get(name) is not None), None)

    def get_setting(self, section: str, name: str) -> Any:
        """Return a setting from `config.json`, or None."""
        settings = self.config.get(section)
        return settings.get(name) if isinstance(settings, dict) else None


def read_run(path: Path) -> Run:
    """Read a run folder in a single pass over its events.

    Raises:
        UserError: the folder has no events, or its `config.json` is damaged.
    """
    check_run_folder(path)
    steps, attempts = StepTable(), Attempts()
    events: dict[str, list[dict[str, Any]]] = {name: [] for name in REPORTED_EVENTS}
    samples: list[dict[str, Any]] = []
    responses: dict[str, dict[str, Any]] = {}
    for event in read_events(path / EVENTS):
        name = event["event"]
        attempts.add(event)
        if name == "step" and event.get("step") is not None:
            steps.add_event(event)
        elif name in events:
            events[name].append(event)
        elif name == "sample":
            # keep only the samples of the newest step
            samples = [sample for sample in samples if sample.get("step") == event.get("step")] + [event]
        elif name == RESPONSES:
            responses[str(event.get("of"))] = event
    heldout, evaluations = _merge_heldout_events(events["eval"]), read_evaluations(path)
    incidents = [event for name in INCIDENT_NAMES for event in events[name] if is_incident(event)]
    # the newest needle test before and after the run, for each kind of judging
    needles = {(str(event.get("when", "")), str(event.get("by", ""))): event for event in events["needle"]}
    return Run(
        path.resolve().name, _read_config(path / CONFIG), attempts.all,
        curves=steps.build_curves() | {"rounds": _build_round_curves(events["round"])},
        phases=steps.find_phases(), heldout=_build_heldout_sources(heldout),
        overall_bits_per_byte=_combine_sources(heldout),
        incidents=sorted(incidents, key=lambda event: parse_number(event.get("time_s"))),
        gate_checks=final_step_events(events["gate"], "gate"), events=events,
        needles=list(needles.values()), rounds=read_rounds(path),
        scores=events["eval_lm"] + find_unrecorded_scores(evaluations, events["eval_lm"]),
        evaluations=evaluations, responses=responses, samples=samples,
        checkpoints=final_step_events(events["checkpoint"], "checkpoint"))


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """Read the manifests of RL rounds, sorted by round.

    A round with a damaged manifest is omitted: it may be incomplete, and `rl train` reports damage.
    """
    contents = []
    for file in (run / ROUNDS).glob(f"[0-9]*/{MANIFEST}"):
        try:
            content = read_manifest(file.parent, "tokens").content
        except UserError:
            continue
        if isinstance(content.get("means"), dict) and "round" in content:
            contents.append(content)
    return sorted(contents, key=lambda content: parse_number(content["round"]))


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is not valid JSON ({e}); restore it from a copy") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: contains a {type(config).__name__} instead of the run's settings; "
                        "restore it from a copy")
    return config


def _merge_heldout_events(events: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """Return step -> source -> figures: `eval ppl --run` adds sources to a step that training evaluated."""
    sources: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("step") is not None:
            sources.setdefault(event["step"], {}).update(event.get("heldout") or {})
    return {step: sources[step] for step in sorted(sources)}


def _build_heldout_sources(heldout: dict[int, dict[str, dict[str, Any]]]) -> dict[str, HeldoutSource]:
    names = dict.fromkeys(name for figures in heldout.values() for name in figures)
    sources = {}
    for name in names:
        rows = {int(step): figures[name] for step, figures in heldout.items() if name in figures}
        last = list(rows.values())[-1]
        sources[name] = HeldoutSource(
            build_curve(name, {step: parse_number(row.get("loss")) for step, row in rows.items()}),
            build_curve(name, {step: parse_number(row.get("bits_per_byte")) for step, row in rows.items()}),
            int(last.get("tokens") or 0), any(row.get("turns") for row in rows.values()))
    return sources


def _combine_sources(heldout: dict[int, dict[str, dict[str, Any]]]) -> Curve | None:
    """Return the bits per byte over all sources per step, without steps whose sources lack figures."""
    values = {int(step): combine_bits_per_byte(sources) for step, sources in heldout.items()}
    known = {step: value for step, value in values.items() if math.isfinite(value)}
    return build_curve("all sources", known) if known else None


def _build_round_curves(events: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return curves over steps: the means in `round` events, and `LEARNING_GROUPS`."""
    values: dict[str, dict[int, float]] = {}
    for event in events:
        groups, means = event.get("groups"), event.get("means")
        figures = dict(means) if isinstance(means, dict) else {}
        if isinstance(groups, dict) and groups:
            num_groups = max(1.0, sum(map(parse_number, groups.values())))
            figures[LEARNING_GROUPS] = parse_number(groups.get(TRAINED_GROUPS, 0)) / num_groups
        for name, value in figures.items():
            if not isinstance(value, dict):
                values.setdefault(name, {})[int(event.get("step") or 0)] = parse_number(value)
    return {name: build_curve(name, by_step) for name, by_step in values.items()}
