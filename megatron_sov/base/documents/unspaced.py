"""Scripts that put no blank between words, or whose blanks do not set words apart: one table of their code
points, and who takes which of them.

Whoever counts such a script by its characters names the rows that it takes.  Where they differ it is on
purpose, and stands here:

- runs of words that texts share (`documents.overlap`) leave Tibetan whole, whose syllables have marks between
  them, and give Hangul a size of its own.  They look at NFKC, in which half-width kana and compatibility
  letters do not occur, and take the marks of Han for characters;
- rules of quality (`data_prep.curate.quality.rules.words`) count what is written by hand and by keyboards,
  without letters of old Korean;
- n-grams of scorers (`data_prep.curate.scoring.ngrams`) leave runs of lone Hangul letters ("ㅋㅋㅋ"),
  bopomofo and half-width kana whole: they tell as words what their letters would not.  To change that means
  to train all scorers anew.
"""

from __future__ import annotations

from collections.abc import Sequence

CODE_POINTS: dict[str, tuple[tuple[int, int], ...]] = {
    "thai": ((0x0E00, 0x0E80),),
    "lao": ((0x0E80, 0x0F00),),
    "tibetan letters": ((0x0F40, 0x0FBD),),
    "tibetan signs": ((0x0F00, 0x0F40), (0x0FBD, 0x1000)),
    "burmese": ((0x1000, 0x10A0),),
    "khmer": ((0x1780, 0x1800),),
    "kana": ((0x3040, 0x3100), (0x31F0, 0x3200)),
    "half-width kana": ((0xFF66, 0xFFA0),),
    "bopomofo": ((0x3100, 0x3130),),
    "han": ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)),
    "marks of han": ((0x3005, 0x3008),),
    "hangul": ((0x1100, 0x1200), (0xAC00, 0xD7A4)),
    "old hangul": ((0xA960, 0xA980), (0xD7A4, 0xD800)),
    "lone hangul letters": ((0x3130, 0x3190),),
}
"""Script -> its ranges of code points: first, and the one behind the last."""

OF_RUNS = ("thai", "lao", "burmese", "khmer", "marks of han", "kana", "han")
"""Scripts of which runs of words count a character as a quarter of a word."""
HANGUL_OF_RUNS = ("hangul", "old hangul", "lone hangul letters")
"""Those of which they count one as a third."""
OF_RULES = ("thai", "lao", "tibetan letters", "burmese", "khmer", "kana", "bopomofo", "han",
            "half-width kana", "hangul", "lone hangul letters")
"""Scripts whose characters the rules of quality count."""
OF_SCORERS = ("thai", "lao", "tibetan letters", "tibetan signs", "burmese", "khmer", "kana", "han", "hangul",
              "old hangul")
"""Scripts of which the n-grams of scorers take characters for units."""


def code_points(scripts: Sequence[str]) -> list[tuple[int, int]]:
    """Return the ranges of some scripts: first code point, and the one behind the last."""
    return [span for script in scripts for span in CODE_POINTS[script]]


def in_brackets(scripts: Sequence[str]) -> str:
    """Return the ranges of some scripts as they stand between the brackets of a regular expression."""
    return "".join(f"{chr(begin)}-{chr(end - 1)}" for begin, end in code_points(scripts))
