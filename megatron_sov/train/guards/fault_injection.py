"""Faults on purpose: what a run survives is shown by doing it to the run.  No torch here.

    --inject kill@step=5,rank=1,nan@step=9 --inject corrupt-checkpoint@save=20

A fault comes once in the life of a run folder: that it came is written to RUN/faults before it does its work,
so that a run which starts again after it goes on.  `step=N` means the first step that is N or later; `save=N`
the first checkpoint there; `load=N` and `start=N` the first start that goes on from step N or later.
"""

from __future__ import annotations

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
"""Kind of fault -> the states of a run in which it can come."""
FAULT_OPTIONS: dict[str, dict[str, float | None]] = {
    "spike": {"factor": 1e4}, "slow-rank": {"seconds": 0.1, "steps": 100.0},
    "bitflip": {"bit": None}, "miscompute": {"bit": None}}
"""Kind of fault -> what can be said beside where it comes, and what holds otherwise (None: a bit of the
mantissa, which no figure shows; 30 of a float32 is in its exponent)."""


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: str
    state: str
    """What the run does when it comes: start, load, step or save."""
    at: int
    """From which step on."""
    rank: int = 0
    options: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = "".join(f",{name}={value:g}" for name, value in sorted(self.options.items()))
        return f"{self.kind}@{self.state}={self.at},rank={self.rank}{options}"


def parse_faults(texts: Sequence[str], num_ranks: int) -> tuple[Fault, ...]:
    """Return the faults that --inject arguments name.

    Raises:
        UserError: an unknown kind, state or option, a value that is no number, a rank that does not exist, or
            a fault that is given twice.
    """
    faults: list[Fault] = []
    for text in texts:
        for part in _parts(text):
            fault = _parse_one(part)
            if fault.rank >= num_ranks:
                raise UserError(f"--inject {part}: rank {fault.rank} does not exist; "
                                f"the run has {num_ranks} (counted from 0)")
            if fault in faults:
                raise UserError(f"--inject {part}: is given twice, and a fault comes once; "
                                "give the other one another step")
            faults.append(fault)
    return tuple(faults)


def _parts(text: str) -> Iterator[str]:
    """Cut at every comma that a new fault follows: one that has an @."""
    current: list[str] = []
    for piece in text.split(","):
        if "@" in piece and current:
            yield ",".join(current)
            current = []
        current.append(piece)
    yield ",".join(current)


def _parse_one(text: str) -> Fault:
    kind, _, rest = text.partition("@")
    if kind not in FAULT_STATES:
        raise UserError(f"--inject {text}: there is no fault {kind!r}{suggest_name(kind, FAULT_STATES)} "
                        f"(faults: {', '.join(FAULT_STATES)})")
    values: dict[str, float] = {}
    for setting in rest.split(","):
        name, _, value = setting.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        whole = name in (*FAULT_STATES[kind], "rank", "bit")
        known = whole or name in FAULT_OPTIONS.get(kind, {})
        if not known or not 0 <= values[name] < math.inf or (whole and values[name] % 1):
            allowed = (*FAULT_STATES[kind], "rank", *FAULT_OPTIONS.get(kind, {}))
            raise UserError(f"--inject {text}: {setting!r} must be "
                            f"{' or '.join(f'{a}=NUMBER' for a in allowed)}")
    states = [name for name in FAULT_STATES[kind] if name in values]
    if len(states) != 1:
        raise UserError(f"--inject {text}: must say once when it comes, "
                        f"by {' or '.join(f'{s}=N' for s in FAULT_STATES[kind])}")
    stated = {name: values.get(name, default) for name, default in FAULT_OPTIONS.get(kind, {}).items()}
    options = {name: number for name, number in stated.items() if number is not None}
    return Fault(kind, states[0], int(values[states[0]]), int(values.get("rank", 0)), options)


def list_pending_faults(faults: Sequence[Fault], run: Path) -> list[Fault]:
    """Return the faults that have not come in the life of a run folder."""
    return [fault for fault in faults if not _file(fault, run / FAULTS).is_file()]


def _file(fault: Fault, folder: Path) -> Path:
    return folder / f"{fault.name}.json"


def corrupt_checkpoint(checkpoint: Path) -> None:
    """Change one byte in the middle of a checkpoint's largest file."""
    file = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        # the size stays as it is, so that the hash alone can find it
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 0xFF]))


class FaultInjector:
    """The faults of one process of a run."""

    def __init__(self, faults: Sequence[Fault], run: Path, rank: int) -> None:
        self._faults = faults
        self._rank = rank
        self._folder = run / FAULTS
        self._told: set[str] = set()

    def take_due(self, kind: str, state: str, step: int) -> Fault | None:
        """Return a fault of this kind that comes to this process now, and has not come before;
        it is noted as come."""
        for fault in self._faults:
            here = (fault.kind, fault.state, fault.rank) == (kind, state, self._rank)
            if here and step >= fault.at and self._note(fault, step):
                return fault
        return None

    def _note(self, fault: Fault, step: int) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            # on the disk before the fault comes: a run that is started again must not meet it forever
            with open(_file(fault, self._folder), "x", encoding="utf-8") as f:
                json.dump({"fault": fault.name, "kind": fault.kind, "state": fault.state, "step": step,
                           "rank": fault.rank}, f)
                f.flush()
                os.fsync(f.fileno())
        except FileExistsError:
            return False
        warn(f"--inject {fault.name}: comes now")
        return True

    def trigger(self, state: str, step: int) -> None:
        """Kill this process, raise an error, or stand still, where such a fault is due."""
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
        """Return what this process's loss is multiplied by."""
        if not self._faults:
            return 1.0
        if self.take_due("nan", "step", step):
            return math.nan
        spike = self.take_due("spike", "step", step)
        return 1.0 if spike is None else spike.options["factor"]

    def delay_s(self, step: int) -> float:
        """Return the seconds by which this process is slow in a step; the one fault that lasts."""
        slow = [f for f in self._faults
                if (f.kind, f.rank) == ("slow-rank", self._rank) and f.at <= step < f.at + f.options["steps"]]
        for fault in slow:
            self._note(fault, step)
        return sum(f.options["seconds"] for f in slow)

    def record_events(self, events: EventLog) -> None:
        """Write an event for every fault that came since the last call, also for processes that could not."""
        if not self._faults or not events.is_open or not self._folder.is_dir():
            return
        for file in sorted(self._folder.glob("*.json"), key=lambda f: f.stat().st_mtime_ns):
            # a mark on the disk: a resumed run must not tell of the fault again
            told = file.with_suffix(".told")
            if file.name not in self._told and not told.exists():
                try:
                    record = json.loads(file.read_text(encoding="utf-8"))
                except ValueError:  # is being written
                    continue
                events.write("fault", **record)
                told.touch()
            self._told.add(file.name)
