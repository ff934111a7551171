"""Accounts of records: every record that a command reads is written or set aside for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sov.base.errors import visible


@dataclass(frozen=True)
class RecordAccount:
    """Numbers of the records that a command read, wrote and set aside.  If they do not add up, the program
    has a defect, and RuntimeError is raised."""

    num_read: int
    """Counted where records are read, whatever becomes of them."""
    num_written: int
    set_aside: Mapping[str, int] = field(default_factory=dict)
    """Reason -> records."""
    noun: str = "records"
    """Name of the records, in the plural."""
    verb: str = "written"
    """Participle for the records that are not set aside."""

    def __post_init__(self) -> None:
        if self.num_read != self.num_written + sum(self.set_aside.values()):
            raise RuntimeError(f"account of {self.noun} does not add up: {self.describe()}")

    def describe(self) -> str:
        """Return one line, e.g. "8 records read: 5 written, 3 set aside (2 json, 1 duplicate_id)"."""
        counts = Counter(self.set_aside)
        reasons = ", ".join(f"{count:,} {visible(reason)}" for reason, count in sorted(
            counts.items(), key=lambda item: (-item[1], item[0])) if count)
        return (f"{self.num_read:,} {self.noun} read: {self.num_written:,} {self.verb}, "
                f"{counts.total():,} set aside{f' ({reasons})' if reasons else ''}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "set_aside": {reason: n for reason, n in sorted(self.set_aside.items()) if n}}


@dataclass
class RecordTally:
    """Counts of records while a command reads and writes them."""

    num_read: int = 0
    num_written: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """Reason -> records."""

    def account(self, noun: str = "records", verb: str = "written") -> RecordAccount:
        return RecordAccount(self.num_read, self.num_written, self.set_aside, noun, verb)
