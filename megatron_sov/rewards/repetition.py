"""Repetition: loops, repeated n-grams, responses that never end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.documents.scripts import script_of
from megatron_sov.rewards.reward import Row, Score, text_of
from megatron_sov.settings import AtLeastOne, Share

MAX_CHARS = 400_000
"""Of a longer response the end is looked at: loops stand there."""
_WORD = re.compile(r"\w+|[^\w\s]")
_NO_SPACES = {"THAI", "LAO", "KHMER", "MYANMAR", "CJK", "HIRAGANA", "KATAKANA"}
"""Scripts written without spaces: a word there would be a sentence, so its characters count as words."""


@dataclass(frozen=True)
class Repetition:
    """0 for a sound response, down to -1 for one that repeats itself or never ends.

    The share of repeated n-grams is the penalty of Open-R1 (arXiv 2502.03373, section 4.2): one less
    than the share of different n-grams, here beyond a share that sound text has anyway.
    """

    ngram: AtLeastOne = 4
    """Words of an n-gram."""
    allowed_share: Annotated[float, Ge(0), Le(0.99)] = 0.2
    """Of repeated n-grams; sound text repeats some."""
    min_loop_repeats: Annotated[int, Ge(2)] = 4
    """How often the same piece in a row, at the end of the response, is a loop."""
    min_loop_chars: AtLeastOne = 24
    """Length of a loop in all, at least: "......" is none, and no table's rule."""
    no_end_penalty: Share = 1.0
    """For a row whose `finish_reason` is length: the response did not end by itself. 0: is no fault."""

    def score(self, row: Row) -> Score:
        """Return the worst of what was seen, as a number from -1 to 0."""
        text = text_of(row, "response")[-MAX_CHARS:]
        share = repeated_share(words_of(text), self.ngram)
        piece, repeats = loop_at_end(text, self.min_loop_chars)
        loops = repeats >= self.min_loop_repeats
        unended = row.get("finish_reason") == "length"
        excess = max(0.0, share - self.allowed_share) / (1 - self.allowed_share)
        worst = max(excess, float(loops), self.no_end_penalty * unended)
        return Score(0.0 - worst, {"repeated_share": share, "loop": piece[:40] if loops else "",
                                   "loop_repeats": repeats if loops else 0, "no_end": unended})


def words_of(text: str) -> list[str]:
    """Return the words and signs of a text; each character where a script has no spaces."""
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        if any(script_of(char) in _NO_SPACES for char in set(word)):
            words.extend(word)
        else:
            words.append(word)
    return words


def repeated_share(words: list[str], ngram: int) -> float:
    """Return the share of n-grams that have stood before; 0 where there are none."""
    count = len(words) - ngram + 1
    if count <= 0:
        return 0.0
    return 1 - len({tuple(words[i:i + ngram]) for i in range(count)}) / count


def loop_at_end(text: str, min_chars: int = 1) -> tuple[str, int]:
    """Return the piece of at least `min_chars` in all that a text ends with over and over, and how often it
    stands there in a row; an empty text and 1 where nothing does.

    The failure function of Knuth, Morris and Pratt over the reversed text gives the shortest period of each
    of its beginnings; the one with the most repeats counts.  Work and memory grow with the length alone.
    """
    backwards = text.rstrip()[::-1]
    failure = [0] * len(backwards)
    best_period, best_repeats = 0, 1
    k = 0
    for i in range(1, len(backwards)):
        while k and backwards[i] != backwards[k]:
            k = failure[k - 1]
        if backwards[i] == backwards[k]:
            k += 1
        failure[i] = k
        repeats = (i + 1) // (i + 1 - k)
        if repeats > best_repeats and i + 1 >= min_chars:
            best_period, best_repeats = i + 1 - k, repeats
    return backwards[:best_period][::-1], best_repeats
