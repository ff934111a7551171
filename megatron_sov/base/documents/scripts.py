"""Scripts of a text: which alphabets its letters are of, from the names that Unicode gives them; and which
scripts put no blank between words.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

# Scripts that put no blank between words, or whose blanks do not set words apart.  Who counts such a script
# by its characters names the rows that it takes.  Where they differ it is on purpose:
# - runs of words that texts share (`documents.overlap`) leave Tibetan whole, whose syllables have marks
#   between them, and give Hangul a size of its own.  They look at NFKC, in which half-width kana and
#   compatibility letters do not occur, and take the marks of Han for characters;
# - rules of quality (`data_prep.curate.quality.rules.words`) count what is written by hand and by keyboards,
#   without letters of old Korean;
# - n-grams of scorers (`data_prep.curate.scoring.ngrams`) leave runs of lone Hangul letters, bopomofo and
#   half-width kana whole: as words they say what their letters would not.  To change that means to train all
#   scorers again.
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


LANGUAGES = {
    "ko": ("HANGUL",), "en": ("LATIN",), "th": ("THAI",), "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "zh": ("CJK",),
    "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "bg": ("CYRILLIC",), "ar": ("ARABIC",), "fa": ("ARABIC",),
    "ur": ("ARABIC",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "mr": ("DEVANAGARI",), "ne": ("DEVANAGARI",),
    "bn": ("BENGALI",), "ta": ("TAMIL",), "te": ("TELUGU",), "kn": ("KANNADA",), "ml": ("MALAYALAM",),
    "gu": ("GUJARATI",), "pa": ("GURMUKHI",), "el": ("GREEK",), "ka": ("GEORGIAN",), "hy": ("ARMENIAN",),
    "km": ("KHMER",), "lo": ("LAO",), "my": ("MYANMAR",), "am": ("ETHIOPIC",), "de": ("LATIN",),
    "fr": ("LATIN",), "es": ("LATIN",), "pt": ("LATIN",), "it": ("LATIN",), "nl": ("LATIN",),
    "pl": ("LATIN",),
    "tr": ("LATIN",), "vi": ("LATIN",), "id": ("LATIN",), "sw": ("LATIN",), "fi": ("LATIN",),
}
"""Language (ISO 639-1) -> the scripts that it is written in."""
_WIDE = ("FULLWIDTH", "HALFWIDTH", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "IDEOGRAPHIC", "MATHEMATICAL")


@lru_cache(maxsize=1 << 16)
def script_of(char: str) -> str:
    """Return the script of a letter or a mark; an empty text for digits, signs and what belongs to none.

    Letters of formulas (U+1D400 and on, the Greek of physics) belong to none: they are no text in a language.
    """
    if unicodedata.category(char)[0] not in "LM":
        return ""
    # Unicode names begin with the script: HANGUL SYLLABLE GA, LATIN SMALL LETTER A
    words = unicodedata.name(char, "").split()
    if not words or words[0] in ("COMBINING", "MATHEMATICAL", "VARIATION"):
        return ""
    if words[0] in _WIDE and len(words) > 1:
        words = words[1:]
    return words[0].partition("-")[0]


def letters_by_script(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    # each kind of character once: texts have millions of characters of a few hundred kinds
    for char, count in Counter(text).items():
        if script := script_of(char):
            counts[script] += count
    return counts
