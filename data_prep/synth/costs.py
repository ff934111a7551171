"""What the samples of a folder have cost: requests, tokens, seconds and money, by the answers' record."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.errors import UserError

ANSWERS = "answers*.sqlite"
ANSWERED = "200"
_SUMS = """SELECT outcome, count(*), sum(input_tokens), sum(output_tokens), sum(cost), sum(wall_s)
FROM requests GROUP BY outcome ORDER BY outcome"""


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
    seconds: float = 0.0
    """Of all requests, one after the other; several run at a time."""

    def per(self, num: int) -> dict[str, float] | None:
        """Return the cost of each of so many samples; None: there are none."""
        if not num:
            return None
        return {"requests": self.num_requests / num, "input_tokens": self.input_tokens / num,
                "output_tokens": self.output_tokens / num, "cost": self.cost / num,
                "seconds": self.seconds / num}


def costs_of(output: Path) -> Costs:
    """Return what is on record in a folder.

    Raises:
        UserError: a file of answers is damaged.
    """
    outcomes: Counter[str] = Counter()
    read = wrote = 0
    cost, seconds = 0.0, 0.0
    for file in sorted(output.glob(ANSWERS)):
        try:
            connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
            try:
                for outcome, num, *sums in connection.execute(_SUMS):
                    outcomes[str(outcome)] += num
                    read, wrote = read + (sums[0] or 0), wrote + (sums[1] or 0)
                    cost, seconds = cost + (sums[2] or 0.0), seconds + (sums[3] or 0.0)
            finally:
                connection.close()
        except sqlite3.Error as e:
            raise UserError(f"{file}: cannot be read ({e}); restore it from a copy, or delete it: then its "
                            "answers are asked, and paid, again") from None
    return Costs(outcomes.total(), outcomes[ANSWERED], dict(sorted(outcomes.items())), read, wrote, cost,
                 seconds)
