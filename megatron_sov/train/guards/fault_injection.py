"""Fault injection: `--inject` kills, hangs or corrupts a run to test its recovery. Imports no torch.

    --inject kill@step=5,rank=1,nan@step=9 --inject corrupt-checkpoint@save=20

Each fault occurs once in the life of a run folder: RUN/faults records it before it takes effect, so that a
restarted run passes it. `step=N` is the first step from N on, `save=N` the first checkpoint from N on;
`load=N` and `start=N` are the first start that resumes from step N or later.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.base.errors import UserError, suggest_name, warn
from megatron_sov.runs.folder import FAULTS
from megatron_sov.runs.obs.events import EventLog

FAULT_STATES: dict[str, tuple[str, ...]] = {
    "kill": ("start", "load", "step", "save"), "raise": ("start", "load", "step", "save"), "hang": ("step",),
    "nan": ("step",), "spike": ("step",), "bitflip": ("step",), "miscompute": ("step",),
    "slow-rank": ("step",), "corrupt-checkpoint": ("save",)}
"""Fault kind -> run states in which a fault can occur."""
FAULT_OPTIONS: dict[str, dict[str, float | None]] = {
    "spike": {"factor": 1e4}, "slow-rank": {"seconds": 0.1, "steps": 100.0},
    "bitflip": {"bit": None}, "miscompute": {"bit": None}}
"""Fault kind -> option -> default. `bit` = None flips a mantissa bit, which no figure shows; bit 30 of a
float32 belongs to the exponent."""


@dataclass(frozen=True)
class Fault:
    """A fault from `--inject`."""

    kind: str
    state: str
    """Run state: start, load, step or save."""
    at: int
    """First possible step."""
    rank: int = 0
    options: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = "".join(f",{name}={value:g}" for name, value in sorted(self.options.items()))
        return f"{self.kind}@{self.state}={self.at},rank={self.rank}{options}"


class FaultInjector:
    """Injects a process's faults."""

    def __init__(self, faults: Sequence[Fault], run: Path, rank: int) -> None:
        self._faults = faults
        self._rank = rank
        self._folder = run / FAULTS
        self._with_event: set[str] = set()

    def take_due(self, kind: str, state: str, step: int) -> Fault | None:
        """Return a fault that is due on this rank after recording its occurrence, else None."""
        for fault in self._faults:
            matches = (fault.kind, fault.state, fault.rank) == (kind, state, self._rank)
            if matches and step >= fault.at and self._record_occurrence(fault, step):
                return fault
        return None

    def trigger(self, state: str, step: int) -> None:
        """Kill this process, raise `RuntimeError` or hang, if a fault of such a kind is due."""
        if not self._faults:
            return
        if self.take_due("kill", state, step):
            os.kill(os.getpid(), signal.SIGKILL)
        if (fault := self.take_due("raise", state, step)) is not None:
            raise RuntimeError(f"--inject {fault.name}")
        if self.take_due("hang", state, step):
            while True:
                time.sleep(1)

    def get_loss_factor(self, step: int) -> float:
        """Return the factor for this rank's loss at `step`: NaN, a spike, or 1."""
        if not self._faults:
            return 1.0
        if self.take_due("nan", "step", step):
            return math.nan
        spike = self.take_due("spike", "step", step)
        return 1.0 if spike is None else spike.options["factor"]

    def delay_s(self, step: int) -> float:
        """Return the seconds by which `slow-rank` faults, which last several steps, delay this rank."""
        faults = [fault for fault in self._faults if (fault.kind, fault.rank) == ("slow-rank", self._rank)
                  and fault.at <= step < fault.at + fault.options["steps"]]
        for fault in faults:
            self._record_occurrence(fault, step)
        return sum(fault.options["seconds"] for fault in faults)

    def record_events(self, events: EventLog) -> None:
        """Write a `fault` event for each fault that occurred on any rank and has no event yet."""
        if not self._faults or not events.is_open or not self._folder.is_dir():
            return
        for file in sorted(self._folder.glob("*.json"), key=lambda f: f.stat().st_mtime_ns):
            # a mark on the disk: a resumed run must not write the event again
            mark = file.with_suffix(".told")
            if file.name not in self._with_event and not mark.exists():
                try:
                    record = json.loads(file.read_text(encoding="utf-8"))
                except ValueError:  # another rank is writing it
                    continue
                events.write("fault", **record)
                mark.touch()
            self._with_event.add(file.name)

    def _record_occurrence(self, fault: Fault, step: int) -> bool:
        """Record in RUN/faults that a fault occurs now; return False if it occurred before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            # synced before the fault takes effect: a restarted run must not meet it again and again
            with open(_get_record_file(fault, self._folder), "x", encoding="utf-8") as f:
                json.dump({"fault": fault.name, "kind": fault.kind, "state": fault.state, "step": step,
                           "rank": fault.rank}, f)
                f.flush()
                os.fsync(f.fileno())
        except FileExistsError:
            return False
        warn(f"--inject {fault.name}: injected now")
        return True


def parse_faults(texts: Sequence[str], num_ranks: int) -> tuple[Fault, ...]:
    """Parse `--inject` arguments.

    Raises `UserError` for an unknown kind, state or option, a value that is not a number, a rank outside
    `num_ranks`, or a repeated fault.
    """
    faults: list[Fault] = []
    for text in texts:
        for fault_text in _split_faults(text):
            fault = _parse_fault(fault_text)
            if fault.rank >= num_ranks:
                raise UserError(f"--inject {fault_text}: rank {fault.rank} does not exist; "
                                f"the run has {num_ranks} (counted from 0)")
            if fault in faults:
                raise UserError(f"--inject {fault_text}: is passed twice; choose another "
                                "step for one of the two")
            faults.append(fault)
    return tuple(faults)


def list_pending_faults(faults: Sequence[Fault], run: Path) -> list[Fault]:
    """Return the faults that have not occurred yet in the run folder's life."""
    return [fault for fault in faults if not _get_record_file(fault, run / FAULTS).is_file()]


def corrupt_checkpoint(checkpoint: Path) -> None:
    """Change the middle byte in a checkpoint's largest file."""
    file = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        # the size stays, so that only the hash can reveal the damage
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 0xFF]))


def _split_faults(text: str) -> Iterator[str]:
    """Yield the faults in a comma-separated list; each begins with KIND@."""
    current: list[str] = []
    for item in text.split(","):
        if "@" in item and current:
            yield ",".join(current)
            current = []
        current.append(item)
    yield ",".join(current)


def _parse_fault(text: str) -> Fault:
    kind, _, rest = text.partition("@")
    if kind not in FAULT_STATES:
        raise UserError(f"--inject {text}: unknown fault {kind!r}{suggest_name(kind, FAULT_STATES)} "
                        f"(faults: {', '.join(FAULT_STATES)})")
    states, defaults = FAULT_STATES[kind], FAULT_OPTIONS.get(kind, {})
    values: dict[str, float] = {}
    for setting in rest.split(","):
        name, _, value = setting.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        must_be_integer = name in (*states, "rank", "bit")
        is_valid = 0 <= values[name] < math.inf and not (must_be_integer and values[name] % 1)
        if not is_valid or name not in (*states, "rank", *defaults):
            allowed = " or ".join(f"{option}=NUMBER" for option in (*states, "rank", *defaults))
            raise UserError(f"--inject {text}: {setting!r} must be {allowed}")
    named_states = [name for name in states if name in values]
    if len(named_states) != 1:
        raise UserError(f"--inject {text}: must have exactly one of "
                        f"{', '.join(f'{state}=N' for state in states)}")
    state = named_states[0]
    options = {name: values.get(name, default) for name, default in defaults.items()}
    numbers = {name: number for name, number in options.items() if number is not None}
    return Fault(kind, state, int(values[state]), int(values.get("rank", 0)), numbers)


def _get_record_file(fault: Fault, folder: Path) -> Path:
    return folder / f"{fault.name}.json"
