"""Search of options and settings by meaning: the parts of an unknown word against names, help texts and the
words of other programs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_sov.base.hints.table import by_word, last_part, table

MIN_SHARE = 0.5
"""Least share of an unknown word's weight that a name with its text must hold."""
NAME_WEIGHT, TEXT_WEIGHT = 1.0, 0.5
"""What a part counts that stands in the name or in another program's word for it, and in the text alone."""
MIN_BEGIN = 4
"""Letters of a stem that may be the begin of another: "norm" of "normalization"."""
MAX_RESULTS = 3
MAX_TEXT = 70
_ENDINGS = re.compile(r"(izations?|ations?|ings?|ers?|ed|es|e|s)\Z")


def find_by_meaning(word: str, texts: Mapping[str, str]) -> list[str]:
    """Return the names nearest in meaning to an unknown word, the nearest first, at most `MAX_RESULTS`.

    Each part of the word weighs its inverse document frequency over `texts`; a part in a name counts
    `NAME_WEIGHT`, in the text `TEXT_WEIGHT`, and names below `MIN_SHARE` of the whole weight are left out.

    Args:
        word: an option or setting of another program, e.g. "--moe-router-load-balancing-type".
        texts: name of an option or setting -> its help.
    """
    wanted = set(stems_of(last_part(word)))
    foreign = _words_of_settings()
    names = {name: set(stems_of(name)) | foreign.get(name, set()) for name in texts}
    inside = {name: set(stems_of(text)) for name, text in texts.items()}
    counts = Counter(stem for name in texts for stem in wanted if _holds(names[name] | inside[name], stem))
    weights = {stem: math.log((1 + len(texts)) / (0.5 + counts[stem])) for stem in wanted}
    whole = sum(weights.values())
    scores: dict[str, float] = {}
    for name in texts:
        in_name = {stem for stem in wanted if _holds(names[name], stem)}
        in_text = {stem for stem in wanted - in_name if _holds(inside[name], stem)}
        score = (NAME_WEIGHT * sum(weights[stem] for stem in in_name)
                 + TEXT_WEIGHT * sum(weights[stem] for stem in in_text))
        if whole and score / whole >= MIN_SHARE:
            scores[name] = score - 0.01 * len(names[name] - wanted)
    return sorted(scores, key=lambda name: -scores[name])[:MAX_RESULTS]


def describe_found(found: Sequence[str], texts: Mapping[str, str]) -> str:
    """Return the end of a sentence about an unknown word: the names nearest in meaning, with the begin of
    their help; "": none was found."""
    lines = [f"{name} ({first_sentence(texts[name])})" for name in found]
    return f" (by its words it may be {', '.join(lines)})" if lines else ""


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, at most `MAX_TEXT` characters."""
    sentence = re.split(r"(?<=\w)[.;:](?: |\Z)", text, maxsplit=1)[0]
    return sentence if len(sentence) <= MAX_TEXT else f"{sentence[:MAX_TEXT].rpartition(' ')[0]} ..."


def stems_of(text: str) -> Sequence[str]:
    """Return the words of a name or text in lower case, without endings; abbreviations are written out."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)]
    abbreviations = table()["abbreviations"]
    written = [part for word in words for part in abbreviations.get(word, word).split()]
    written = [word for word in written if word not in table()["stop_words"]]
    return [_ENDINGS.sub("", word) if len(word) > 4 else word for word in written]


def _holds(stems: set[str], wanted: str) -> bool:
    """Return whether stems hold one; of two longer ones the shorter may be the begin of the other."""
    if wanted in stems:
        return True
    return len(wanted) >= MIN_BEGIN and any(
        len(stem) >= MIN_BEGIN and (stem.startswith(wanted) or wanted.startswith(stem)) for stem in stems)


def _words_of_settings() -> Mapping[str, set[str]]:
    """Return setting or option -> stems of what other programs call it."""
    found: dict[str, set[str]] = {}
    for part in ("settings", "options"):
        for word, meant in by_word(part).items():
            for name in meant:
                found.setdefault(name.partition("=")[0], set()).update(stems_of(word))
    return found
