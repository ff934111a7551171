"""The plan that a run keeps in its folder, so that it can be held to account: what its settings predict of
memory, speed and time, on the machine on which it runs.

`RUN/plan.json` is written by the run itself before its first step, and grows by one plan when the run goes on
with settings, on machines or in a layout that it has not had yet; each start names its own by a number in its
`run_start` event.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, read as read_settings
from megatron_sov.runs.folder import PLAN

FORMAT_VERSION = 1
MAX_BYTES = 64 << 20
"""A larger file is no plan of ours."""
Amount = Annotated[float, Ge(0), Le(1e18)]
Count = Annotated[int, Ge(0), Le(10**18)]
"""A report reckons with all numbers of a plan."""


@dataclass(frozen=True)
class StretchPlan:
    """Steps that are alike: of one phase and one batch size."""

    phase: str
    first_step: Count
    """1-based, as in events."""
    last_step: Count
    seq_len: Count
    global_batch_size: Count
    seconds: dict[str, Amount]
    """Component -> seconds of one step; they add up to the step; empty: no speed is predicted."""

    @property
    def step_s(self) -> float:
        """Seconds of one step; 0: none are predicted."""
        return sum(self.seconds.values())

    @property
    def step_tokens(self) -> int:
        """Tokens of one step, padding counted in."""
        return self.seq_len * self.global_batch_size


@dataclass(frozen=True)
class KeptPlan:
    """What is predicted of a run on one machine and in one layout."""

    time_s: Amount
    """Unix time at which it was made."""
    recipe: str
    num_ranks: Count
    layout: dict[str, Any]
    device: str
    """What the GPUs, or the processor, call themselves."""
    chip: str
    """Key of the chip whose figures were taken; empty: a processor, or a GPU that is in no table."""
    threads: Count
    no_speed: str
    """Why no speed is predicted; empty: it is."""
    parameters: str
    """Where the numbers of the model of speed come from."""
    memory_bytes: tuple[dict[str, Count], ...]
    """Of a process of each pipeline stage: item -> bytes; they add up to what it needs."""
    memory_before_bytes: Count
    """What a process had of the host's memory before its model was built, where there are no GPUs, and
    memory is the host's; else 0."""
    checkpoint_bytes: Count
    """Size of a checkpoint; 0: not predicted."""
    checkpoint_s: Amount
    """Seconds until one is on disk; 0: not predicted."""
    failures_per_hour: Amount
    """Faults that end all processes; 0: not known."""
    effective_share: Amount
    """Share of the wall-clock time that is training, by those; 0: not predicted."""
    power_w: Amount
    """Power that one GPU's share of the machine draws; 0: not known."""
    stretches: tuple[StretchPlan, ...]
    cluster: str = ""
    """Where its links, storage and failures come from; empty: no speed is predicted on a GPU."""

    def stage_bytes(self, stage: int) -> int:
        return self.memory_before_bytes + sum(self.memory_bytes[stage].values())

    def stretch(self, step: int) -> StretchPlan | None:
        """Return the stretch that a step (1-based) belongs to; None: it is none of the plan's."""
        return next((s for s in self.stretches if s.first_step <= step <= s.last_step), None)

    def says_the_same(self, other: KeptPlan) -> bool:
        """Return whether it predicts what `other` does; what a process had before is measured anew by each
        start."""
        same = dataclasses.replace(self, time_s=other.time_s, memory_before_bytes=other.memory_before_bytes)
        return same == other


@dataclass(frozen=True)
class _Kept:
    format_version: Literal[1]
    plans: tuple[KeptPlan, ...]


def keep(run: Path, plan: KeptPlan) -> int:
    """Put a plan beside those that a run has, unless one of them says the same; returns its number.

    Raises:
        UserError: the file that is there cannot be read, or written.
    """
    plans = read(run)
    for number, earlier in enumerate(plans):
        if plan.says_the_same(earlier):
            return number
    content = {"format_version": FORMAT_VERSION, "plans": [dataclasses.asdict(p) for p in (*plans, plan)]}
    atomic_write(run / PLAN, to_json(content))
    return len(plans)


def read(run: Path) -> list[KeptPlan]:
    """Return the plans of a run, in order; none where it has kept none.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    file = run / PLAN
    if not file.is_file():
        return []
    way_out = "restore it, or delete it: the run goes on without, and keeps a new one"
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file}: has {file.stat().st_size:,} bytes, and a plan has {MAX_BYTES:,} at most; "
                        f"{way_out}")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # editors put a mark in front
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); see to its permissions") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: is no JSON ({e}); {way_out}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format_version = {version!r} is not {FORMAT_VERSION}; read it with the "
                        f"version that wrote it, or {way_out}")
    try:
        return list(read_settings(_Kept, content, str(file)).plans)
    except SettingsError as e:
        raise UserError(f"{e}; {way_out}") from None
