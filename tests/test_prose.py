"""Pages are written for readers in a hurry whose first language may not be English: limits for words,
sentences and total length.

Code, tables and headings are not counted.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_WORDS = 25_650
MAX_MEAN_WORDS = 14.0
LONG_SENTENCE_WORDS = 35
MAX_LONG_SHARE = 0.01
MAX_ODD_PER_1000 = 1.0
MIN_YOU_PER_1000 = 6.0
ODD = re.compile(r"\b(stands?|lies?|tells?|told|beside|behind|whatever|whoever|anew|nobody|whom|wherein|"
                 r"thereof|comes? to|anyway|meanwhile|besides|hence|thus|shall|upon|that which|of its own|"
                 r"as it were)\b", re.IGNORECASE)
"""Words that make a reader stop, where a plain one says the same (CONTRIBUTING has both)."""


def sentences(text: str) -> list[str]:
    """Return the sentences of a page: paragraphs and items of lists, links as their text."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!", "<"))]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    parts = (part for block in re.split(r"\n\s*\n|\n\s*[-*0-9.]+\s", text)
             for part in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(block.split())))
    return [part for part in parts if len(part.split()) > 2]


@pytest.fixture(scope="module")
def prose() -> list[str]:
    return [sentence for page in PAGES for sentence in sentences(page.read_text(encoding="utf-8"))]


def num_words(found: list[str]) -> int:
    return sum(len(sentence.split()) for sentence in found)


def test_total_length_of_pages_is_limited(prose: list[str]) -> None:
    assert num_words(prose) <= MAX_WORDS


def test_a_sentence_has_one_thought(prose: list[str]) -> None:
    assert num_words(prose) / len(prose) <= MAX_MEAN_WORDS
    long = [sentence for sentence in prose if len(sentence.split()) > LONG_SENTENCE_WORDS]
    assert len(long) <= MAX_LONG_SHARE * len(prose), long


def test_words_are_plain(prose: list[str]) -> None:
    odd = [f"{found[0]}: {sentence}" for sentence in prose for found in ODD.finditer(sentence)]
    assert len(odd) <= MAX_ODD_PER_1000 * num_words(prose) / 1000, odd


def test_the_reader_is_spoken_to(prose: list[str]) -> None:
    you = sum(len(re.findall(r"\byou(?:r|rs)?\b", sentence, re.IGNORECASE)) for sentence in prose)
    assert you >= MIN_YOU_PER_1000 * num_words(prose) / 1000


def test_prose_measure_detects_bad_sentences() -> None:
    page = ("# Title\n\nYou read this [page](a.md). It tells you more.\n\n| a | b |\n\n- an item of three\n\n"
            "```sh\nls one two\n```\n")
    assert sentences(page) == ["You read this page.", "It tells you more.", "- an item of three"]
    assert [found[0] for found in ODD.finditer(page)] == ["tells"]
