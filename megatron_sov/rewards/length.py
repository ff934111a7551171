"""Length: a response that is too long, or too short, is punished softly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_sov.rewards.reward import Refused, Row, Score, text_of
from megatron_sov.settings import AtLeastOne, NotNegativeInt, at_most


@dataclass(frozen=True)
class Length:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), and a least length.

    0 up to `max_length - buffer`, then falling evenly to -1 at `max_length`, and -1 beyond.
    """

    max_length: AtLeastOne = 20_480
    """Where the punishment is whole (DAPO: 20,480 tokens)."""
    buffer: Annotated[AtLeastOne, at_most("max_length")] = 4_096
    """Over how much before that it grows (DAPO: 4,096 tokens)."""
    min_length: Annotated[NotNegativeInt, at_most("max_length")] = 0
    """A shorter response is punished whole."""
    unit: Literal["tokens", "characters", "words"] = "tokens"
    """tokens: the row's field `num_tokens`, as the engine that wrote the response counts them."""

    def score(self, row: Row) -> Score:
        """Return a number from -1 to 0."""
        length = self._length(row)
        if length < self.min_length:
            return Score(-1.0, {"length": length, "too_short": True})
        return Score(soft_overlong(length, self.max_length, self.buffer), {"length": length})

    def _length(self, row: Row) -> int:
        text = text_of(row, "response")
        if self.unit == "characters":
            return len(text)
        if self.unit == "words":
            return len(text.split())
        length = row.get("num_tokens")
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise Refused(f"num_tokens = {length!r} must be the number of the response's tokens; "
                          "or set unit=characters or unit=words")
        return length


def soft_overlong(length: int, max_length: int, buffer: int) -> float:
    """Return R_length of arXiv 2503.14476, equation 13."""
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))
