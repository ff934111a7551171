"""How far what is heard is from what was to be said."""

from __future__ import annotations

import unicodedata

_BREAK = "\N{ZERO WIDTH SPACE}"
"""Stands between words; what else has no width only joins or parts the shapes of letters."""


def normalised(text: str) -> str:
    """Return a text as words are counted: lower case, composed (NFC), punctuation as space, one space between
    words."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return " ".join("".join(map(_kept, folded)).split())


def _kept(character: str) -> str:
    kind = unicodedata.category(character)
    # vowels of Devanagari, Thai or Arabic are marks, and so is an accent that no letter is composed with
    if character.isalnum() or kind.startswith("M"):
        return character
    return "" if kind == "Cf" and character != _BREAK else " "


def error_rates(text: str, heard: str) -> tuple[float, float]:
    """Return the share of a text's words, and that of its characters, that are heard wrong (jiwer): above 1
    where more is heard than there is.

    Args:
        text: what is to be said; has a letter or a digit.
        heard: what a recogniser gives.
    """
    import jiwer

    wanted, got = normalised(text), normalised(heard)
    return float(jiwer.wer(wanted, got)), float(jiwer.cer(wanted, got))
