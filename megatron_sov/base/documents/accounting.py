"""Account for records: a command writes each input record, or sets the record aside for a reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_sov.base.errors import escape_controls


@dataclass(frozen=True)
class RecordAccount:
    """Numbers of records read, written and set aside. Raises RuntimeError (a defect): wrong sum."""

    num_read: int
    """Counted at reading, independently of the counts for written and set-aside records."""
    num_written: int
    set_aside: Mapping[str, int] = field(default_factory=dict)
    """Reason -> records."""
    noun: str = "records"
    """Plural noun for the records in messages."""
    verb: str = "written"
    """Participle for records that are not set aside."""

    def __post_init__(self) -> None:
        if self.num_read != self.num_written + sum(self.set_aside.values()):
            raise RuntimeError(f"account of {self.noun} does not add up: {self.describe()}")

    def describe(self) -> str:
        """Format a sentence: "8 records read: 5 written, 3 set aside (2 json, 1 duplicate_id)"."""
        counts = Counter(self.set_aside)
        reasons = ", ".join(f"{count:,} {escape_controls(reason)}" for reason, count in sorted(
            counts.items(), key=lambda item: (-item[1], item[0])) if count)
        return (f"{self.num_read:,} {self.noun} read: {self.num_written:,} {self.verb}, "
                f"{counts.total():,} set aside{f' ({reasons})' if reasons else ''}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "set_aside": {reason: n for reason, n in sorted(self.set_aside.items()) if n}}


@dataclass
class RecordTally:
    """Running counts of a command's records."""

    num_read: int = 0
    num_written: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    """Reason -> records."""

    def account(self, noun: str = "records", verb: str = "written") -> RecordAccount:
        """Return the final account; raises RuntimeError if the counts do not add up."""
        return RecordAccount(self.num_read, self.num_written, self.set_aside, noun, verb)
