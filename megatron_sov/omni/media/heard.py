"""How far what is heard is from what was to be said."""

from __future__ import annotations


def normalised(text: str) -> str:
    """Return a text as words are counted: lower case, punctuation as space, one space between words."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.casefold())
    return " ".join(kept.split())


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
