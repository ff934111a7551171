"""Scripts of a text: which alphabets its letters are of, from the names that Unicode gives them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

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
    words = unicodedata.name(char, "").split()
    if not words or words[0] in ("COMBINING", "MATHEMATICAL", "VARIATION"):
        return ""
    if words[0] in _WIDE and len(words) > 1:
        words = words[1:]
    return words[0].partition("-")[0]


def letters_by_script(text: str) -> Counter[str]:
    """Return script -> letters of a text."""
    counts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if script := script_of(char):
            counts[script] += count
    return counts
