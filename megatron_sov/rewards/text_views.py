"""A response as it stands, and with its sentences or words set apart, for functions that split at full stops
and blanks where a language has none."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Literal

from megatron_sov.settings import Bound, Code

INSTALLED = Bound(lambda segmenter: None if segmenter != "pythainlp" or find_spec("pythainlp") else (
    Code.RULE, "needs pythainlp, which is not installed", "pip install pythainlp, or set segmenter=rules"))
Segmenter = Annotated[Literal["none", "rules", "pythainlp"], INSTALLED]
"""none: the text as it stands alone; rules: line ends end sentences; pythainlp: Thai words and sentences by
the library of that name, where it is installed."""


def views_of(text: str, segmenter: Segmenter) -> list[str]:
    """Return a text, with its sentences set apart by full stops, and with its words by blanks as well; each
    different one once.

    As Typhoon-S has it (arXiv 2601.18129, the authors' `data_processing`): there a response keeps a
    constraint where a function accepts any of the three.
    """
    if segmenter == "none":
        return [text]
    if segmenter == "rules":
        views = [text.replace("\n", ". ").strip(), " ".join(text.split())]
    else:
        from pythainlp import sent_tokenize, word_tokenize
        sentences = sent_tokenize(text)
        views = [".".join(sentences), ".".join(" ".join(word_tokenize(part)) for part in sentences)]
        views = [view.strip().strip(".").strip() for view in views]
    return list(dict.fromkeys([text, *views]))
