"""What is looked at while it grows: a run's events, a store of rollouts, the work on rows."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError
from megatron_sov.publish.report.run_data import Run, RunReader
from megatron_sov.runs.obs.events import EVENTS, GrowingFile, parse_event
from megatron_sov.runs.obs.figures import number
from megatron_sov.runs.obs.history import tell
from megatron_sov.work.progress.journal import later_records, read_job, work_folder

if TYPE_CHECKING:
    from megatron_sov.rollouts.rows import Key, RewardRow, Rollout

DAMAGE = (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError)
"""What events and records of a stranger may raise; the page goes on with what it has."""
MAX_NEWS = 60
"""Events in words, the newest."""
STATE_EVERY_S = 10.0
"""How old the state of a run without new events may be: to ask a queue for it costs time."""
LIVELY_S = 2.0
"""The same of a run whose process lives, since ages and the time left are part of it."""
MAX_GROUPS, MAX_RESPONSES = 3, 4
"""Prompts of a round that are shown, and responses to each."""
PIPELINE, SYNTH_RUN = "pipeline.json", "run.json"
"""Files by which the outputs of `sov-data run` and `sov-data synth` are known."""
MAX_ROWS = 4
"""Rows that are shown of each kind."""
STORE = "store.json"


class StateReader(Protocol):
    """Says how a run stands, by its events: `commands.operate.run_state.RunStateReader`."""

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in."""

    def state(self) -> Any:
        """Return a `RunState`."""


@dataclass(frozen=True)
class ShownGroup:
    """Responses to one prompt."""

    round: int
    prompt: str
    responses: list[tuple[Rollout, RewardRow | None]]


@dataclass
class WatchedRun:
    """A run's folder; it need not be there yet, and its events may begin again."""

    path: Path
    state_reader: Callable[[Path], StateReader]
    state: Any = None
    """The newest `RunState`; None: nothing is there."""
    run: Run | None = None
    news: deque[tuple[float, int, str]] = field(default_factory=lambda: deque(maxlen=MAX_NEWS))
    """Unix time, step and words of events that say something to people."""
    groups: list[ShownGroup] = field(default_factory=list)
    problem: str = ""
    """Why it cannot be read."""

    def __post_init__(self) -> None:
        self._file = GrowingFile(self.path / EVENTS)
        self._store: Path | None = None
        self._parts = ""
        self._state_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self._events, self._states = RunReader(self.path), self.state_reader(self.path)
        self._generation = self._file.generation
        self.news.clear()

    def look(self) -> None:
        """Read what is new."""
        is_new = False
        for line in self._file.lines():
            if self._file.generation != self._generation:
                self._begin()
            if (event := parse_event(line)) is not None:
                is_new = True
                self._add(event)
        try:
            if is_new:
                self.run = self._events.run()
            if self.path.is_dir() and (is_new or time.monotonic() - self._state_s > self._patience_s()):
                self.state, self._state_s = self._states.state(), time.monotonic()
            self.problem = ""
        except (UserError, OSError) as e:
            self.problem = str(e)
        except DAMAGE as e:
            self.problem = f"what it has recorded cannot be read ({e!r:.200})"
        self._look_at_rollouts()

    def _patience_s(self) -> float:
        return LIVELY_S if self.state is not None and self.state.state == "running" else STATE_EVERY_S

    def _add(self, event: dict[str, Any]) -> None:
        if event["event"] == "store" and (Path(str(event.get("path"))) / STORE).is_file():
            self._store = Path(str(event["path"]))
        # a run that a stranger wrote must not end the page
        try:
            self._events.add(event)
            self._states.add(event)
            words = tell(event)
        except DAMAGE as e:
            words = f"an event cannot be read ({e!r:.100})"
        if words is not None:
            self.news.append((number(event.get("time_s")), int(event.get("step") or 0), words))

    def _look_at_rollouts(self) -> None:
        try:
            if self._store is not None:
                self.groups, self._parts = newest_groups(self._store, self.groups, self._parts)
        except (UserError, OSError, *DAMAGE) as e:
            self.problem = f"its rollouts cannot be read: {e}"


def newest_groups(store_path: Path, before: list[ShownGroup], parts_before: str
                  ) -> tuple[list[ShownGroup], str]:
    """Return some groups of the newest round of a store, those with the widest rewards first, and what they
    were read from; `before` and its source where nothing is new."""
    from megatron_sov.rollouts.store import RolloutStore

    store = RolloutStore.open(store_path)
    parts = list(store.parts())
    if not parts:
        return [], ""
    newest = [part for part in parts if part.round == max(one.round for one in parts)]
    # by what their parts say: folders have short names
    judged = {part.version: part.name for folder in store.versions()
              for part in store.parts(newest[0].round, folder) if part.name == newest[0].name}
    now = json.dumps([[part.name for part in newest], judged], default=str)
    if now == parts_before:
        return before, parts_before
    rows = store.read_rollouts(newest[0].name, ("record", "tokens", "versions", "finish_reason", "response"))
    found: dict[tuple[Key, int], RewardRow] = {}
    for version, name in judged.items():
        found |= {(one.key, one.attempt): one for one in store.read_rewards(version, name)}
    groups: dict[str, list[tuple[Rollout, RewardRow | None]]] = {}
    for row in rows:
        groups.setdefault(row.key.prompt, []).append((row, found.get((row.key, row.attempt))))
    # a group whose rewards differ is what the policy learns from
    order = sorted(groups.values(), key=lambda group: -_spread([one for _, one in group]))[:MAX_GROUPS]
    return [ShownGroup(newest[0].round, _prompt(group[0][0].record), _ends(group)) for group in order], now


def _spread(rewards: Sequence[RewardRow | None]) -> float:
    values = [one.reward for one in rewards if one is not None and one.reward is not None]
    return max(values) - min(values) if values else -1.0


def _ends(group: list[tuple[Rollout, RewardRow | None]]) -> list[tuple[Rollout, RewardRow | None]]:
    """Return the best and the worst responses of a group, the best first."""
    ranked = sorted(group, key=lambda one: -(one[1].reward if one[1] and one[1].reward is not None else -1e9))
    return ranked if len(ranked) <= MAX_RESPONSES else [*ranked[:MAX_RESPONSES // 2],
                                                        *ranked[-(MAX_RESPONSES // 2):]]


def _prompt(record: Any) -> str:
    given = record.get("messages", record.get("prompt", record.get("question", "")))
    if isinstance(given, list):
        return "\n".join(f"{one.get('role', '')}: {one.get('content', '')}" for one in given
                         if isinstance(one, dict))
    return str(given)


# Work on rows.


@dataclass
class WatchedWork:
    """The output of a command that makes rows of rows, and what is done of it."""

    path: Path
    what: str = ""
    """The command."""
    num_done: int = 0
    num_items: int = 0
    """Of all; 0: not known."""
    unit: str = "items"
    facts: dict[str, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    kept: int = 0
    rows: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    """Samples: what it is, and (who, text)."""
    speed: float = 0.0
    """Units a second, over the last minutes."""
    is_complete: bool = False
    problem: str = ""

    def __post_init__(self) -> None:
        self._ends: dict[Path, int] = {}
        self._seen: set[str] = set()
        self._times: deque[tuple[float, int]] = deque(maxlen=60)

    @property
    def left_s(self) -> float:
        """Seconds to the end; 0: not known."""
        return (self.num_items - self.num_done) / self.speed if self.speed > 0 and self.num_items else 0.0

    def look(self) -> None:
        """Read what is new."""
        try:
            if (self.path / PIPELINE).is_file():
                self._look_at_pipeline()
            else:
                self._look_at_journal()
            self.problem = ""
        except (OSError, *DAMAGE) as e:
            self.problem = f"{self.path}: cannot be read now ({e!r:.200})"
        self.is_complete = (self.path / MANIFEST).is_file()
        self._times.append((time.monotonic(), self.num_done))
        (first_s, before), (last_s, now) = self._times[0], self._times[-1]
        self.speed = (now - before) / (last_s - first_s) if last_s > first_s else 0.0

    def _look_at_pipeline(self) -> None:
        """Add up the counts that tasks of `sov-data run` have left for each step and shard."""
        told = json.loads((self.path / PIPELINE).read_text(encoding="utf-8"))
        self.what, self.unit = "sov-data run", "tasks"
        self.num_done = self.num_items = self.kept = 0
        self.rejected, self.rows = Counter(), []
        last: dict[tuple[str, int], int] = {}
        for source in told["sources"]:
            for step in source["steps"]:
                self.num_items += int(source["num_shards"])
                for file in sorted((self.path / step["folder"]).glob("[0-9]*.json")):
                    found = json.loads(file.read_text(encoding="utf-8"))
                    self.num_done += 1
                    for reason, count in found["dropped"].items():
                        self.rejected[f"{step['kind']}: {reason}"] += count["documents"]
                    last[source["name"], step["number"]] = (
                        last.get((source["name"], step["number"]), 0) + found["documents_kept"])
                    self._take_samples(step["kind"], found["samples"])
            steps = [number for name, number in last if name == source["name"]]
            self.kept += last.get((source["name"], max(steps, default=-1)), 0)

    def _take_samples(self, kind: str, samples: dict[str, list[dict[str, Any]]]) -> None:
        for way in ("changed", "dropped"):
            for one in samples.get(way, [])[:1]:
                why = f" ({one['reason']})" if one.get("reason") else ""
                texts = [("before", str(one["before"]))]
                texts += [("after", str(one["after"]))] if one.get("after") is not None else []
                self.rows = [*self.rows, (f"{kind}: {way}{why}", texts)][-MAX_ROWS:]

    def _look_at_journal(self) -> None:
        """Take in the records that a job has added; a record of `sov-data synth` tells of its samples."""
        folder = work_folder(self.path)
        if folder.is_dir():
            self.what = self.what or str(read_job(folder)["made_by"])
            for item, payload in later_records(folder, self._ends):
                self._add_record(str(item), payload)
            self.num_done = len(self._seen)
        if (self.path / SYNTH_RUN).is_file():
            told = json.loads((self.path / SYNTH_RUN).read_text(encoding="utf-8"))
            self.num_items = int(told.get("num_items") or 0)
            self.facts = {name: str(told[name]) for name in ("generator", "model", "judge") if told.get(name)}

    def _add_record(self, item: str, payload: bytes) -> None:
        self._seen.add(item)
        try:
            told = json.loads(payload)
            samples, unusable = told["samples"], str(told.get("unusable") or "")
        except (ValueError, KeyError, TypeError, RecursionError):  # a job whose records are of another form
            return
        if unusable:
            self.rejected["no answer of use"] += 1
        for sample in samples:
            failed = next((one for one in sample.get("verdicts") or [] if not one.get("passed")), None)
            if failed is None:
                self.kept += 1
            else:
                self.rejected[str(failed["check"])] += 1
            told_as = "kept" if failed is None else f"rejected: {failed['check']}"
            self.rows = [*self.rows, (f"item {item}, {told_as}", [
                (str(name), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                for name, value in sample["record"].items()])][-MAX_ROWS:]


def is_work(path: Path) -> bool:
    """Return whether a folder is the output of a command on rows, and no run's."""
    return not (path / EVENTS).is_file() and any(
        found.exists() for found in (path / PIPELINE, path / SYNTH_RUN, work_folder(path)))
