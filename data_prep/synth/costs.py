"""What the samples of a folder have cost: requests, tokens, seconds and money, from what is kept of answers."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.errors import UserError

ANSWERS = "answers*.sqlite"
ANSWERED = "200"


@dataclass(frozen=True)
class Costs:
    """Sums over all requests of a run, those that failed too."""

    num_requests: int = 0
    """Sent, each attempt."""
    num_answered: int = 0
    """Of them, those that an answer came to."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Status, or what happened instead -> requests."""
    input_tokens: int = 0
    """Tokens that were read, as the endpoint has billed them."""
    output_tokens: int = 0
    """Tokens that were written."""
    cost: float = 0.0
    """In the currency of the prices; 0 where none was given."""
    seconds: float | None = None
    """Of all requests, one after the other; several run at a time.  None: not on record."""

    def per(self, num: int) -> dict[str, float | None] | None:
        """Return the cost of each of so many samples; None: there are none."""
        if not num:
            return None
        return {"requests": self.num_requests / num, "input_tokens": self.input_tokens / num,
                "output_tokens": self.output_tokens / num, "cost": self.cost / num,
                "seconds": None if self.seconds is None else self.seconds / num}


def costs_of(output: Path) -> Costs:
    """Return what is on record in a folder.

    Raises:
        UserError: a file of answers is damaged.
    """
    outcomes: Counter[str] = Counter()
    read = wrote = 0
    cost, seconds = 0.0, 0.0
    is_timed = True
    for file in sorted(output.glob(ANSWERS)):
        try:
            connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
            try:
                names = [row[1] for row in connection.execute("PRAGMA table_info(requests)")]
                timed = "wall_s" in names
                for outcome, num, *sums in connection.execute(
                        "SELECT outcome, count(*), sum(input_tokens), sum(output_tokens), sum(cost)"
                        f"{', sum(wall_s)' if timed else ''} FROM requests GROUP BY outcome ORDER BY outcome"):
                    outcomes[str(outcome)] += num
                    read, wrote, cost = read + (sums[0] or 0), wrote + (sums[1] or 0), cost + (sums[2] or 0)
                    seconds += (sums[3] or 0.0) if timed else 0.0
                is_timed &= timed
            finally:
                connection.close()
        except sqlite3.Error as e:
            raise UserError(f"{file}: cannot be read ({e}); restore it from a copy, or delete it: then its "
                            "answers are asked, and paid, again") from None
    return Costs(outcomes.total(), outcomes[ANSWERED], dict(sorted(outcomes.items())), read, wrote, cost,
                 seconds if is_timed and outcomes else None)
