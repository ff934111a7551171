"""Search of options and settings by meaning: parts of an unknown word against names, help texts and the
words of other programs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_sov.base.hints.table import get_last_part, index_words, load_table

MIN_SHARE = 0.5
"""Lowest share of an unknown word's weight that a candidate must match."""
NAME_WEIGHT, TEXT_WEIGHT = 1.0, 0.5
"""Weight of a stem in the candidate's name (or in foreign words for the candidate), and in its help only."""
MIN_PREFIX = 4
"""Shortest stem that may abbreviate a longer stem: "norm" for "normalization"."""
MAX_RESULTS = 3
MAX_TEXT_CHARS = 70
_ENDINGS = re.compile(r"(izations?|ations?|ings?|ers?|ed|es|e|s)\Z")


def find_by_meaning(word: str, texts: Mapping[str, str]) -> list[str]:
    """Return the names nearest in meaning to an unknown word, the nearest first, at most `MAX_RESULTS`.

    Each part of the word weighs its inverse document frequency over `texts`; a part in a name counts
    `NAME_WEIGHT`, in the text `TEXT_WEIGHT`, and names below `MIN_SHARE` of the total weight are dropped.

    Args:
        word: an option or setting of another program, e.g. "--moe-router-load-balancing-type".
        texts: name of an option or setting -> its help.
    """
    query = set(split_stems(get_last_part(word)))
    foreign = _index_foreign_stems()
    names = {name: set(split_stems(name)) | foreign.get(name, set()) for name in texts}
    helps = {name: set(split_stems(text)) for name, text in texts.items()}
    counts = Counter(stem for name in texts for stem in query if _has_stem(names[name] | helps[name], stem))
    weights = {stem: math.log((1 + len(texts)) / (0.5 + counts[stem])) for stem in query}
    total = sum(weights.values())
    scores: dict[str, float] = {}
    for name in texts:
        in_name = {stem for stem in query if _has_stem(names[name], stem)}
        in_help = {stem for stem in query - in_name if _has_stem(helps[name], stem)}
        score = (NAME_WEIGHT * sum(weights[stem] for stem in in_name)
                 + TEXT_WEIGHT * sum(weights[stem] for stem in in_help))
        if total and score / total >= MIN_SHARE:
            scores[name] = score - 0.01 * len(names[name] - query)
    return sorted(scores, key=lambda name: -scores[name])[:MAX_RESULTS]


def describe_candidates(names: Sequence[str], texts: Mapping[str, str]) -> str:
    """Return the end of a sentence about an unknown word: results of `find_by_meaning`, each with the first
    sentence of its help; "" for no results."""
    parts = [f"{name} ({shorten_help(texts[name])})" for name in names]
    return f" (by its words it may be {', '.join(parts)})" if parts else ""


def shorten_help(text: str) -> str:
    """Return the first sentence of a help text, at most `MAX_TEXT_CHARS`."""
    sentence = re.split(r"(?<=\w)[.;:](?: |\Z)", text, maxsplit=1)[0]
    if len(sentence) <= MAX_TEXT_CHARS:
        return sentence
    return f"{sentence[:MAX_TEXT_CHARS].rpartition(' ')[0]} ..."


def split_stems(text: str) -> Sequence[str]:
    """Split a name or text into lower-case words without endings; abbreviations are expanded, stop words
    dropped."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)]
    abbreviations, stop_words = load_table()["abbreviations"], load_table()["stop_words"]
    expanded = [part for word in words for part in abbreviations.get(word, word).split()]
    return [_ENDINGS.sub("", word) if len(word) > 4 else word for word in expanded if word not in stop_words]


def _has_stem(stems: set[str], query: str) -> bool:
    """Return whether `stems` contain a stem, its beginning or its continuation (from `MIN_PREFIX`
    letters)."""
    if query in stems:
        return True
    return len(query) >= MIN_PREFIX and any(
        len(stem) >= MIN_PREFIX and (stem.startswith(query) or query.startswith(stem)) for stem in stems)


def _index_foreign_stems() -> Mapping[str, set[str]]:
    """Return setting or option -> stems of its names in other programs."""
    stems: dict[str, set[str]] = {}
    for section in ("settings", "options"):
        for word, names in index_words(section).items():
            for name in names:
                stems.setdefault(name.partition("=")[0], set()).update(split_stems(word))
    return stems
