"""A run as a card sees it: its settings, what its events add up to in one pass, how it ended."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import sha256_file
from megatron_sov.config import RunConfig
from megatron_sov.errors import UserError
from megatron_sov.obs.attempts import COMPLETE, Attempt, Attempts
from megatron_sov.obs.events import EVENTS, final_steps, read_events
from megatron_sov.obs.figures import number
from megatron_sov.obs.incidents import KINDS, is_incident
from megatron_sov.runs.checkpoints import refuse_no_run
from megatron_sov.runs.folder import COMPLETION, CONFIG, FAILURE, RunFolder

KEPT = ("gate", "needle", "passk", "eval", "eval_lm", "decontamination", "heldout_pairs")
"""Events that are kept whole."""
POWER = ("gpu_power_w", "power_w")
"""What steps call the power of their GPU, now and in earlier versions."""
MOST_TOKENS = 1e12
"""No sample is longer."""
MAX_KEPT = 10_000
"""Of each kind, the newest."""


@dataclass
class Work:
    """What the steps of a run add up to."""

    flops: float = 0.0
    """Model FLOPs of the steps that led to the model; by the formula of `models.count`."""
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
class RunRecord:
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
    work: Work = field(default_factory=Work)
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
        """Its name in the provenance graph."""
        return f"run {self.name}"

    @property
    def start(self) -> dict[str, Any]:
        """The newest `run_start`; empty where it never started."""
        return self.attempts[-1].start if self.attempts else {}

    @property
    def outcome(self) -> str:
        """How it stands, in words."""
        if self.completion is not None:
            return COMPLETE
        return self.attempts[-1].outcome if self.attempts else "not started"

    def last(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """Return the kept events of a kind, of a step that was done again the last one."""
        numbered = self.kept.get(kind, [])
        numbers = {id(event): i for i, event in numbered}
        chosen = final_steps([event for _, event in numbered], kind)
        return [(numbers[id(event)], event) for event in chosen]

    def files(self) -> dict[str, str]:
        """Return name -> SHA-256 of the files that the card reads of it."""
        return {name: sha256_file(self.path / name) for name in (CONFIG, EVENTS, COMPLETION, FAILURE)
                if (self.path / name).is_file()}


def read_run_record(path: Path, name: str, flops_per_token: Callable[[RunConfig, int], float]) -> RunRecord:
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
    run = RunRecord(name, path, config, raw, _completion(folder), failure)
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
        """Take a step's event in."""
        while self._steps and self._steps[-1][0] >= step:
            self.flops_again += self._steps.pop()[2]
        before = self._steps[-1][1] if self._steps else 0
        self._steps.append((step, tokens, max(0, tokens - before) * per_token))

    @property
    def flops(self) -> float:
        """FLOPs of the steps that stand."""
        return math.fsum(flops for _, _, flops in self._steps)

    @property
    def tokens(self) -> int:
        """Tokens up to the last one."""
        return self._steps[-1][1] if self._steps else 0


def _read_events(run: RunRecord, flops_per_token: Callable[[int], float]) -> None:
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
            phases.clear()
            _add_inputs(run, event, index)
        elif kind == "phase" and 1 <= number(event.get("seq_len")) < MOST_TOKENS and "step" in event:
            phases.append((int(event["step"] or 0), int(number(event["seq_len"]))))
        elif kind == "step" and event.get("step") is not None:
            step = int(event["step"])
            run.final_loss = number(event.get("loss"))
            seq_len = next((length for first, length in reversed(phases) if first < step), 0)
            run.longest_tokens = max(run.longest_tokens, seq_len)
            if seq_len not in per_token:
                per_token[seq_len] = flops_per_token(seq_len) if seq_len else 0.0
            tokens = number(event.get("tokens"))
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
            del kept[:-MAX_KEPT]
    run.attempts = attempts.all
    work.flops, work.flops_again, work.tokens = timeline.flops, timeline.flops_again, timeline.tokens


def _add_inputs(run: RunRecord, event: dict[str, Any], index: int) -> None:
    """Take in what a start says that it reads; what is no such record is passed over."""
    inputs = event.get("inputs")
    for i, item in enumerate(inputs if isinstance(inputs, list) else []):
        if isinstance(item, dict) and all(isinstance(item.get(key), str)
                                          for key in ("kind", "path", "manifest_sha256")):
            run.inputs[item["manifest_sha256"]] = item, f"run_start[{index}].inputs[{i}].manifest_sha256"


def _add_energy(work: Work, event: dict[str, Any], place: int, start: dict[str, Any]) -> None:
    """Take in the energy of all GPUs since a start; that of some of them is no measure of the run."""
    work.energy_by_start.pop(place, None)
    if not number(event.get("num_gpus")) < number(start.get("num_ranks")):
        work.energy_by_start[place] = number(event["energy_j"])


def _add_power(work: Work, event: dict[str, Any], seq_len: int) -> None:
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
    if 0 <= watts < math.inf and 0 < seconds < math.inf:
        work.power_ws += watts * seconds
        work.power_s += seconds
        work.power_key = power_key
