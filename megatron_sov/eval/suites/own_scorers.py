"""Scorers that belong to one benchmark and are no reward of training."""

from __future__ import annotations

import re
import string
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from megatron_sov.chat.marks import as_written
from megatron_sov.rewards.reward import Row, Score, text_of


class Copied:
    """OpenAI-MRCR: how much of the answer is said again, word for word, behind a mark that was asked for.

    The ratio of Python's difflib, as the data's publisher computes it (openai/mrcr, `grade` of its page).
    """

    def score(self, row: Row) -> Score:
        """Return 0 where the response does not begin with the row's `prefix`, else the ratio of what stands
        behind it and behind the prefix of the `answer`.

        Raises:
            Refused: the row has no prefix or answer.
        """
        response = as_written(text_of(row, "response"))
        answer, prefix = text_of(row, "answer"), text_of(row, "prefix")
        if not response.startswith(prefix):
            return Score(0.0, {"prefix": False})
        ratio = SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix)).ratio()
        return Score(ratio, {"prefix": True})


@dataclass(frozen=True)
class ShortAnswer:
    """HotpotQA: how many words an answer shares with the known one.

    As in the data's own script (hotpotqa/hotpot, hotpot_evaluate_v1.py): case, punctuation and articles do
    not count, and `yes`, `no` and `noanswer` are right or wrong as a whole.
    """

    exact: bool = False
    """Whether all words have to be the same; else their F1 counts."""

    def score(self, row: Row) -> Score:
        """Return F1 or equality.

        Raises:
            Refused: the row has no answer.
        """
        said, known = (_plain(text_of(row, name)) for name in ("response", "answer"))
        if self.exact or (said != known and {said, known} & {"yes", "no", "noanswer"}):
            return Score(float(said == known), {"extracted": said})
        words, known_words = Counter(said.split()), Counter(known.split())
        shared = (words & known_words).total()
        total = words.total() + known_words.total()
        return Score(2 * shared / total if shared else 0.0, {"extracted": said})


def _plain(answer: str) -> str:
    """Return an answer's words without case, punctuation and articles."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


OWN_SCORERS: dict[str, type[Any]] = {"mrcr": Copied, "short-answer": ShortAnswer}
"""Name -> scorer."""
