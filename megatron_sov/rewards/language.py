"""Language: whether a response is in the language that was asked for, by the scripts of its letters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from megatron_sov.documents.scripts import LANGUAGES, letters_by_script, script_of
from megatron_sov.rewards.reward import Refused, Row, Score, text_of
from megatron_sov.settings import Share, one_of

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]{1,500}\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+", re.DOTALL)
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")


@dataclass(frozen=True)
class Language:
    """The share of letters in the scripts of a language; below a share it is 0.

    Languages that share a script (English, German) are not told apart.
    """

    language: Annotated[str, one_of(lambda: {"", *LANGUAGES})] = ""
    """Code such as ko, th, en; empty: the row's own field `language`."""
    also: tuple[Annotated[str, one_of(lambda: LANGUAGES)], ...] = ("en",)
    """Languages whose letters may stand beside it, as names and terms do."""
    max_also_share: Share = 0.2
    """Of all letters, those of `also`; more is code switching."""
    min_share: Share = 0.5
    """Below this share of the language's own letters the reward is 0."""
    ignore_code: bool = True
    """Leave out code, formulas and addresses, which are in no language."""

    def score(self, row: Row) -> Score:
        """Return the share of letters that may stand there, less what is too many of the others."""
        language = self.language or text_of(row, "language")
        if language not in LANGUAGES:
            raise Refused(f"language = {language!r} is not known (languages: {', '.join(sorted(LANGUAGES))})")
        text = text_of(row, "response")
        if self.ignore_code:
            text = _ADDRESS.sub(" ", _FORMULA.sub(" ", _CODE.sub(" ", text)))
        counts = letters_by_script(text)
        total = sum(counts.values())
        if not total:
            return Score(0.0, {"language": language, "num_letters": 0})
        own = set(LANGUAGES[language])
        beside = {script for name in self.also for script in LANGUAGES[name]} - own
        own_share = sum(counts[s] for s in own) / total
        also_share = sum(counts[s] for s in beside) / total
        foreign_share = 1 - own_share - also_share
        reward = own_share + min(also_share, self.max_also_share) if own_share >= self.min_share else 0.0
        return Score(min(reward, 1.0), {
            "language": language, "own_share": own_share, "also_share": also_share,
            "foreign_share": max(foreign_share, 0.0), "switches_per_100_words": switches(text)})


def switches(text: str) -> float:
    """Return how often the script changes from one word to the next, per 100 words that have letters."""
    scripts = [script for word in text.split()
               if (script := next(filter(None, map(script_of, word)), ""))]
    if len(scripts) < 2:
        return 0.0
    return 100 * sum(a != b for a, b in pairwise(scripts)) / len(scripts)
