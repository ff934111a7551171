"""A run folder as plain data: its events, settings and artifacts, ready to be shown.

Reads `config.json`, `events.jsonl` and the manifests below a run; one pass, and only what the
report shows is kept.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.publish.report.steps import (
    Curve, ExportEvaluation, StepTable, read_evaluations, sorted_curve, untold_scores)
from megatron_sov.runs.checkpoints import check_run_folder
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.obs.events import EVENTS, final_step_events, read_events
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.history import INCIDENT_NAMES, Attempt, Attempts, is_incident
from megatron_sov.runs.obs.validation import RESPONSES, VALIDATION
from megatron_sov.runs.rounds import TRAINED_GROUPS

CONFIG = "config.json"
LEARNING_GROUPS = "learning_groups"
"""Name of the curve of the share of a round's groups that are trained."""
KEPT = ("eval", "needle", "passk", "gate", "conversion", "checkpoint", "warning",
        "heldout_pairs", "heldout_divergence", "round", VALIDATION, "eval_lm", "forgetting_gate", "score",
        *INCIDENT_NAMES)
"""Events that are kept whole; there are few of them and they are small."""


@dataclass(frozen=True)
class Heldout:
    """Held-out figures of one source over the run."""

    loss: Curve
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: Curve
    """Bits per UTF-8 byte, comparable between tokenizers."""
    num_tokens: int
    """Tokens of the last evaluation."""
    is_chat: bool = False
    """Whether its documents are conversations."""


@dataclass
class Run:
    """Everything that the report shows of one run."""

    name: str
    """The run folder's name."""
    config: dict[str, Any]
    """The resolved settings; empty where config.json is absent."""
    attempts: list[Attempt] = field(default_factory=list)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """Group -> name -> curve; see `StepTable.curves`."""
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, first and last step of each phase."""
    heldout: dict[str, Heldout] = field(default_factory=dict)
    overall_bits_per_byte: Curve | None = None
    """Bits per byte over all held-out sources together, each weighted by its bytes."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """What went wrong and what the run did, in the order of time; steps left out by the
    settings are not among it."""
    gate_checks: list[dict[str, Any]] = field(default_factory=list)
    """Checks of the gate, the last one of each step, in the order of steps."""
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Kind of `KEPT` -> its events, in the order in which they were written."""
    needles: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """What the manifests of its rounds of reinforcement learning say, in order."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """Figures of `eval lm`, in the order in which they were measured."""
    evaluations: list[ExportEvaluation] = field(default_factory=list)
    """Evaluations of exports beside training."""
    responses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What samples of responses are of -> the newest event of them."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, name: str) -> Curve | None:
        """Return a plain step curve (loss, lr, grad_norm, ...), or None where no step has it."""
        return self.curves.get("", {}).get(name)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return self.events.get(kind, [])

    def start(self, name: str) -> Any:
        """Return a field of the newest `run_start` that has it, or None."""
        return next((a.start[name] for a in reversed(self.attempts) if a.start.get(name) is not None), None)

    def setting(self, section: str, name: str) -> Any:
        """Return one resolved setting, e.g. of "model", or None where config.json has none of that form."""
        found = self.config.get(section)
        return found.get(name) if isinstance(found, dict) else None

    def wall_s(self) -> float:
        """Return the run's wall time in seconds, over all attempts, without the pauses between them."""
        return sum(a.wall_s() for a in self.attempts)

    def recipe(self) -> str:
        """Return the recipe's name, or an empty string."""
        return str(self.config.get("recipe") or self.start("recipe") or "")


def read_run(path: Path) -> Run:
    """Read a run folder: its events, and the files beside them.

    Raises:
        UserError: it is no run folder (it has no events), or its config.json is damaged.
    """
    check_run_folder(path)
    steps, attempts = StepTable(), Attempts()
    # what is shown is kept, everything else is forgotten
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in KEPT}
    samples: list[dict[str, Any]] = []
    responses: dict[str, dict[str, Any]] = {}
    for event in read_events(path / EVENTS):
        kind = event["event"]
        attempts.add(event)
        if kind == "step" and event.get("step") is not None:
            steps.add(event)
        elif kind in kept:
            kept[kind].append(event)
        # samples of the newest step alone
        elif kind == "sample":
            samples = [s for s in samples if s.get("step") == event.get("step")] + [event]
        elif kind == RESPONSES:
            responses[str(event.get("of"))] = event
    evals, evaluations = _evals(kept["eval"]), read_evaluations(path)
    return Run(
        path.resolve().name, _read_config(path / CONFIG), attempts.all,
        curves=steps.curves() | {"rounds": round_curves(kept["round"])}, phases=steps.phases(),
        heldout=_heldout(evals), overall_bits_per_byte=_overall_bits_per_byte(evals),
        incidents=sorted((e for kind in INCIDENT_NAMES for e in kept[kind] if is_incident(e)),
                         key=lambda e: parse_number(e.get("time_s"))),
        gate_checks=final_step_events(kept["gate"], "gate"), events=kept,
        needles=_last_of_each_when(kept["needle"]), rounds=read_rounds(path),
        scores=kept["eval_lm"] + untold_scores(evaluations, kept["eval_lm"]), evaluations=evaluations,
        responses=responses, samples=samples, checkpoints=final_step_events(kept["checkpoint"], "checkpoint"))


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file}: is not valid JSON ({e}); restore it from a copy") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__} where the run's settings are needed; "
                        "restore it from a copy")
    return config


def _evals(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations by step: `eval ppl --run` adds sources to what training measured there."""
    sources: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("step") is not None:
            sources.setdefault(event["step"], {}).update(event.get("heldout") or {})
    return [{"step": step, "heldout": sources[step]} for step in sorted(sources)]


def _heldout(evals: list[dict[str, Any]]) -> dict[str, Heldout]:
    names = dict.fromkeys(name for e in evals for name in e.get("heldout", {}))
    found = {}
    for name in names:
        rows = [(int(e["step"]), e["heldout"][name]) for e in evals if name in e.get("heldout", {})]
        at = np.array([step for step, _ in rows], dtype=np.int64)
        loss = np.array([parse_number(row.get("loss")) for _, row in rows])
        bits_per_byte = np.array([parse_number(row.get("bits_per_byte")) for _, row in rows])
        found[name] = Heldout(Curve(name, at, loss), Curve(name, at, bits_per_byte),
                              int(rows[-1][1].get("tokens") or 0), any(row.get("turns") for _, row in rows))
    return found


def _overall_bits_per_byte(evals: list[dict[str, Any]]) -> Curve | None:
    """Return bits over bytes of all sources together; a source's bytes are loss x tokens / (ln
    2 x bits per byte)."""
    steps, values = [], []
    for event in evals:
        bits = num_bytes = 0.0
        for row in event.get("heldout", {}).values():
            source_bits = parse_number(row.get("loss")) * parse_number(row.get("tokens")) / math.log(2)
            per_byte = parse_number(row.get("bits_per_byte"))
            # a source without bytes per token has no share in the sum
            if math.isfinite(source_bits) and math.isfinite(per_byte) and per_byte > 0:
                bits += source_bits
                num_bytes += source_bits / per_byte
        if num_bytes > 0:
            steps.append(int(event["step"]))
            values.append(bits / num_bytes)
    return Curve("all sources", np.array(steps, dtype=np.int64), np.array(values)) if steps else None


def round_curves(rounds: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return the means of a run's rounds over its steps, and the share of groups that learn."""
    values: dict[str, dict[int, float]] = {}
    for event in rounds:
        step, groups, told = int(event.get("step") or 0), event.get("groups"), event.get("means")
        means = {name: value for name, value in told.items()
                 if not isinstance(value, dict)} if isinstance(told, dict) else {}
        if isinstance(groups, dict) and groups:
            num_groups = max(1.0, sum(map(parse_number, groups.values())))
            means[LEARNING_GROUPS] = parse_number(groups.get(TRAINED_GROUPS, 0)) / num_groups
        for name, value in means.items():
            values.setdefault(name, {})[step] = parse_number(value)
    return {name: sorted_curve(name, of_step) for name, of_step in values.items()}


def _last_of_each_when(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest needle test of each moment and way of judging,
    in the order of their first showing."""
    return list({(str(e.get("when", "")), str(e.get("by", ""))): e for e in events}.values())


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """Return what the manifests of a run's published rounds say, in order; one that is damaged is left out,
    since it is being written, or `rl train` will name it."""
    found = []
    for file in sorted((run / ROUNDS).glob(f"[0-9]*/{MANIFEST}")):
        try:
            content = read_manifest(file.parent, "tokens").content
        except UserError:
            continue
        if isinstance(content.get("means"), dict) and "round" in content:
            found.append(content)
    return sorted(found, key=lambda content: parse_number(content["round"]))
