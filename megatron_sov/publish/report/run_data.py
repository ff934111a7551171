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
import numpy.typing as npt

from megatron_sov.base.artifacts import MANIFEST, manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.plan.footprint import kept as kept_plans
from megatron_sov.publish.report.steps import (
    Curve, ExportEvaluation, StepTable, read_evaluations, sorted_curve, untold_scores)
from megatron_sov.runs.checkpoints import refuse_no_run, short_name
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.lock import living_holder
from megatron_sov.runs.obs.events import EVENTS, final_steps, read_events
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.history import (
    KINDS, PASSED_OVER, Attempt, Attempts, MeasuredStretch, Stretches, is_incident)
from megatron_sov.runs.obs.validation import RESPONSES, VALIDATION
from megatron_sov.runs.obs.wall_time import Timekeeper, WallTime
from megatron_sov.runs.rounds import LEARNS

CONFIG = "config.json"
LEARNING_GROUPS = "learning_groups"
"""Name of the curve of the share of a round's groups that are trained."""
KEPT = ("phase", "eval", "baseline", "needle", "passk", "media", "media_retrieval", "ssp_probe", "gate",
        "decontamination", "conversion", "checkpoint", "memory", "energy", "warning", "routing",
        "heldout_pairs", "heldout_divergence", "round", VALIDATION, "eval_lm", "eval_contamination",
        "forgetting_gate", "score", *KINDS)
"""Events that are kept whole; there are few of them and they are small."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum."""

    name: str
    first_step: int
    last_step: int
    seq_len_tokens: int
    blend: dict[str, float]
    """Source -> weight; empty: every source in proportion to its tokens."""
    batch_sizes: tuple[int, ...] = ()
    """Samples of a step, in the order of use."""


@dataclass(frozen=True)
class HeldoutPart:
    """Held-out loss of a part of a source's conversations."""

    loss: Curve
    """Mean cross-entropy per token, in nats."""
    num_tokens: int
    """Tokens of the last evaluation."""


@dataclass(frozen=True)
class Heldout:
    """Held-out figures of one source over the run."""

    loss: Curve
    """Mean cross-entropy per token, in nats."""
    bits_per_byte: Curve
    """Bits per UTF-8 byte, comparable between tokenizers."""
    num_tokens: int
    """Tokens of the last evaluation."""
    baseline_bits_per_byte: float | None
    """The bigram baseline's bits per byte on the same documents."""
    turns: dict[str, HeldoutPart] = field(default_factory=dict)
    """Of conversations: "first", the first learned turn of each, and "later", all others."""
    kinds: dict[str, HeldoutPart] = field(default_factory=dict)
    """Of conversations: "thought", "call" and "answer"."""


@dataclass(frozen=True)
class ReportedExpertLoad:
    """How the routed tokens spread over experts at one step."""

    step: int
    layers: list[int]
    load: npt.NDArray[np.float64]
    """Share of each layer's routed tokens, shape [moe layers, experts]; a fair share is 1 / experts."""


@dataclass(frozen=True)
class Provenance:
    """One artifact that the run read or wrote."""

    role: str
    """"read" or "written"."""
    kind: str
    path: str
    manifest_sha256: str


@dataclass
class Run:
    """Everything that the report shows of one run."""

    name: str
    """The run folder's name."""
    config: dict[str, Any]
    """The resolved settings; empty where config.json is absent."""
    attempts: list[Attempt] = field(default_factory=list)
    wall_time: WallTime | None = None
    """Where the time went up to the last event; None before the first start."""
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """Group -> name -> curve; see `StepTable.curves`."""
    phases: list[Phase] = field(default_factory=list)
    heldout: dict[str, Heldout] = field(default_factory=dict)
    overall_bits_per_byte: Curve | None = None
    """Bits per byte over all held-out sources together, each weighted by its bytes."""
    expert_load: ReportedExpertLoad | None = None
    expert_load_by_source: dict[str, ReportedExpertLoad] = field(default_factory=dict)
    """Source -> load of its held-out documents at the last evaluation."""
    compute_time: dict[str, Any] | None = None
    """The last measurement of each process's computing time."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """What went wrong and what the run did, in the order of time; steps left out by the
    settings are not among it."""
    data_consumed: dict[str, Any] | None = None
    skipped_steps: list[int] = field(default_factory=list)
    """Steps whose samples were passed over as the settings asked, ascending."""
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
    checkpoint_bytes: int = 0
    """Size of the newest checkpoint; 0: there is none."""
    plans: list[kept_plans.KeptPlan] = field(default_factory=list)
    """What the run kept of what its settings predicted; a start names its own by number."""
    stretches: list[MeasuredStretch] = field(default_factory=list)
    """How long steps took, by start and stretch of the curriculum."""
    provenance: list[Provenance] = field(default_factory=list)

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

    def energy_j(self) -> float:
        """Return the energy of all GPUs up to the last checkpoint of each start, in joules; NaN: no driver
        told, or not every one."""
        # one entry for each start, the last one: energies are cumulative within a start
        of_starts = {event["attempt"]: number(event.get("energy_j")) for event in self.of("energy")}
        ranks = [math.nan, *(number(attempt.start.get("num_ranks")) for attempt in self.attempts)]
        # the energy of some of the GPUs would be read as that of all
        partly = any(number(event.get("num_gpus")) < ranks[event["attempt"]] for event in self.of("energy"))
        return sum(of_starts.values()) if of_starts and not partly else math.nan

    def recipe(self) -> str:
        """Return the recipe's name, or an empty string."""
        return str(self.config.get("recipe") or self.start("recipe") or "")


class RunReader:
    """Takes a run's events in one by one, and makes a `Run` of them whenever it is asked.

    Args:
        path: the run's folder; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._steps, self._attempts = StepTable(), Attempts()
        self._keeper, self._stretches = Timekeeper(), Stretches()
        # what is shown is kept, everything else is forgotten
        self._kept: dict[str, list[dict[str, Any]]] = {name: [] for name in KEPT}
        self._last: dict[str, dict[str, Any]] = {}
        self._by_source: dict[str, dict[str, Any]] = {}
        self._samples: list[dict[str, Any]] = []
        self._responses: dict[str, dict[str, Any]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        kind, kept, attempts = event["event"], self._kept, self._attempts
        attempts.add(event)
        self._keeper.add(event)
        self._stretches.add(event)
        if kind == "phase" and kept["phase"] and kept["phase"][-1]["attempt"] != len(attempts.all):
            kept["phase"].clear()  # every start announces the whole curriculum anew, as it is from then on
        if kind in ("phase", "memory", "energy"):
            event["attempt"] = len(attempts.all)
        if kind == "step" and event.get("step") is not None:
            self._steps.add(event)
        elif kind in kept:
            kept[kind].append(event)
        # samples of the newest step alone
        elif kind == "sample":
            self._samples = [s for s in self._samples if s.get("step") == event.get("step")] + [event]
        elif kind == RESPONSES:
            self._responses[str(event.get("of"))] = event
        elif kind == "expert_load" and event.get("source") is not None:
            self._by_source[str(event["source"])] = event
        elif kind in ("expert_load", "data_consumed", "compute_time"):
            self._last[kind] = event

    def run(self) -> Run:
        """Return the run as far as its events have come.

        Raises:
            UserError: its config.json is damaged.
        """
        path, kept, last, attempts = self._path, self._kept, self._last, self._attempts.all
        # of a living run the time since its last event is not lost yet
        lives = living_holder(path) is not None
        now_s = max((a.last_time_s for a in attempts), default=0.0) if lives else None
        evals = _evals(kept["eval"])
        run = Run(path.resolve().name, _read_config(path / CONFIG), attempts, self._keeper.account(now_s))
        run.curves = self._steps.curves() | {"rounds": round_curves(kept["round"])}
        run.phases = _phases(self._steps.phases(), kept["phase"])
        run.heldout = _heldout(evals, kept["baseline"])
        run.overall_bits_per_byte = _overall_bits_per_byte(evals)
        run.expert_load = _expert_load(last.get("expert_load"))
        run.expert_load_by_source = {name: load for name, e in self._by_source.items()
                                     if (load := _expert_load(e)) is not None}
        run.data_consumed, run.compute_time = last.get("data_consumed"), last.get("compute_time")
        run.events, run.gate_checks = kept, final_steps(kept["gate"], "gate")
        run.checkpoints = final_steps(kept["checkpoint"], "checkpoint")
        run.stretches, run.samples, run.responses = self._stretches.all, self._samples, self._responses
        run.skipped_steps = [int(e["step"]) for e in final_steps(kept["skip"], "skip")
                             if e.get("reason") in PASSED_OVER]
        run.incidents = sorted((e for kind in KINDS for e in kept[kind] if is_incident(e)),
                               key=lambda e: number(e.get("time_s")))
        run.needles, run.scores = _last_of_each_when(kept["needle"]), kept["eval_lm"]
        return run


def read_run(path: Path) -> Run:
    """Read a run folder: its events, and the files beside them.

    Raises:
        UserError: it is no run folder (it has no events), or its config.json is damaged.
    """
    refuse_no_run(path)
    reader = RunReader(path)
    for event in read_events(path / EVENTS):
        reader.add(event)
    run = reader.run()
    run.plans, run.rounds = kept_plans.read(path), read_rounds(path)
    run.evaluations = read_evaluations(path)
    run.scores = run.scores + untold_scores(run.evaluations, run.scores)
    run.provenance = _provenance(path, run)
    return run


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


def _phases(spans: list[tuple[str, int, int]], events: list[dict[str, Any]]) -> list[Phase]:
    """Return the phases that the steps went through, with what the `phase` events say about each."""
    found = []
    for name, first, last in spans:
        announced = [e for e in events if e.get("name") == name]
        # the last one: a resumed run may have announced the phase with other settings
        event = announced[-1] if announced else {}
        sizes = tuple(dict.fromkeys(int(e.get("global_batch_size") or 0) for e in announced))
        found.append(Phase(name, first, last, int(event.get("seq_len") or 0),
                           event.get("blend") or {}, sizes))
    return found


def _evals(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations by step: `eval ppl --run` adds sources to what training measured there."""
    sources: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("step") is not None:
            sources.setdefault(event["step"], {}).update(event.get("heldout") or {})
    return [{"step": step, "heldout": sources[step]} for step in sorted(sources)]


def _heldout(evals: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> dict[str, Heldout]:
    bigram = baselines[-1].get("bigram", {}) if baselines else {}
    names = dict.fromkeys(name for e in evals for name in e.get("heldout", {}))
    found = {}
    for name in names:
        rows = [(int(e["step"]), e["heldout"][name]) for e in evals if name in e.get("heldout", {})]
        at = np.array([step for step, _ in rows], dtype=np.int64)
        loss = np.array([number(row.get("loss")) for _, row in rows])
        bits_per_byte = np.array([number(row.get("bits_per_byte")) for _, row in rows])
        baseline = number(bigram.get(name, {}).get("bits_per_byte"))
        found[name] = Heldout(Curve(name, at, loss), Curve(name, at, bits_per_byte),
                              int(rows[-1][1].get("tokens") or 0), None if math.isnan(baseline) else baseline,
                              _parts(rows, "turns"), _parts(rows, "kinds"))
    return found


def _parts(rows: list[tuple[int, dict[str, Any]]], of: str) -> dict[str, HeldoutPart]:
    """Return the turns, or the kinds, that a source's (step, figures) tell apart."""
    found = {}
    for part in dict.fromkeys(part for _, row in rows for part in row.get(of) or {}):
        of_part = [(step, row[of][part]) for step, row in rows if part in (row.get(of) or {})]
        loss = Curve(part, np.array([step for step, _ in of_part], dtype=np.int64),
                     np.array([number(turn.get("loss")) for _, turn in of_part]))
        found[part] = HeldoutPart(loss, int(of_part[-1][1].get("tokens") or 0))
    return found


def _overall_bits_per_byte(evals: list[dict[str, Any]]) -> Curve | None:
    """Return bits over bytes of all sources together; a source's bytes are loss x tokens / (ln
    2 x bits per byte)."""
    steps, values = [], []
    for event in evals:
        bits = num_bytes = 0.0
        for row in event.get("heldout", {}).values():
            source_bits = number(row.get("loss")) * number(row.get("tokens")) / math.log(2)
            per_byte = number(row.get("bits_per_byte"))
            # a source without bytes per token has no share in the sum
            if math.isfinite(source_bits) and math.isfinite(per_byte) and per_byte > 0:
                bits += source_bits
                num_bytes += source_bits / per_byte
        if num_bytes > 0:
            steps.append(int(event["step"]))
            values.append(bits / num_bytes)
    return Curve("all sources", np.array(steps, dtype=np.int64), np.array(values)) if steps else None


def _expert_load(event: dict[str, Any] | None) -> ReportedExpertLoad | None:
    if not event or not event.get("load"):
        return None
    try:  # bits of the file may have changed
        load = np.array([[number(x) for x in row] for row in event["load"]])
        layers = [int(x) for x in event.get("layers") or range(len(load))]
    except (TypeError, ValueError):  # rows of several lengths are no table
        return None
    # names of layers that do not fit the rows are no table either
    return ReportedExpertLoad(int(event.get("step") or 0), layers, load) if len(layers) == len(load) else None


def round_curves(rounds: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return the means of a run's rounds over its steps, and the share of groups that learn."""
    values: dict[str, dict[int, float]] = {}
    for event in rounds:
        step, groups, told = int(event.get("step") or 0), event.get("groups"), event.get("means")
        means = {name: value for name, value in told.items()
                 if not isinstance(value, dict)} if isinstance(told, dict) else {}
        if isinstance(groups, dict) and groups:
            means[LEARNING_GROUPS] = number(groups.get(LEARNS, 0)) / max(1.0, sum(map(number,
                                                                                      groups.values())))
        for name, value in means.items():
            values.setdefault(name, {})[step] = number(value)
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
    return sorted(found, key=lambda content: number(content["round"]))


def _provenance(path: Path, run: Run) -> list[Provenance]:
    """Return what the run read, by the hashes of its `run_start`, then its newest checkpoint and what
    that was made from; the run learns how large that is."""
    inputs: list[dict[str, str]] = run.start("inputs") or []
    found = {i["manifest_sha256"]: Provenance("read", i["kind"], short_name(Path(i["path"])),
                                              i["manifest_sha256"]) for i in inputs}
    manifests = list((path / "checkpoints").glob(f"step-*/{MANIFEST}"))
    if manifests:
        # by number: as text, step 1000 comes before step 999
        newest = max(manifests, key=lambda m: int("0" + "".join(filter(str.isdigit, m.parent.name)))).parent
        manifest = read_manifest(newest)
        run.checkpoint_bytes = sum(f.size_bytes for f in manifest.files.values())
        for item in manifest.inputs:
            found.setdefault(item["manifest_sha256"],
                             Provenance("read", item["kind"], short_name(Path(item["path"])),
                                        item["manifest_sha256"]))
        found[newest.name] = Provenance("written", manifest.kind, str(newest.relative_to(path)),
                                        manifest_sha256(newest))
    return list(found.values())
