"""docs/results.md lists every file of benchmarks/results/, and a sentence that cites such a file contains
only numbers from the file."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.pages_typed import PAGES, ROOT

RESULTS = ROOT / "benchmarks/results"
VERDICTS = yaml.safe_load((RESULTS / "verdicts.yaml").read_text())
SHOWN = {name: shown for rows in VERDICTS.values() for name, shown in rows.items()}
WORDS = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9}
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(e[+-]?\d+)?(?:%|x|s|k|MB|GB)?(?!\w)"
                    rf"(?:\s+({'|'.join(filter(None, WORDS))})\b)?")
NO_FIGURES = re.compile(r"`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d|arXiv \d+\.\d+|95 %\s+interval"
                        r"|[A-Z]\w+ \d+\.\d+\b")
"""Code, links, dates, the width of an interval, versions of programs."""


def numbers(text: str) -> Iterator[tuple[float, float]]:
    """Yield each number of a text, without its sign, and half of its last digit."""
    for found in NUMBER.finditer(text):
        digits = found[1].rstrip(",")
        scale = float(f"1{found[2] or 'e0'}") * WORDS[found[3] or ""]
        decimals = len(digits.partition(".")[2])
        yield float(digits.replace(",", "")) * scale, 0.5001 * 10**-decimals * scale


def missing(sentence: str, file: str) -> list[float]:
    """Return the numbers of a sentence that are absent from a file, allowing for rounding and percentages
    (0.27 is 27 %)."""
    there = [value * scale for value, _ in numbers(file) for scale in (1, 100, 0.01)]
    return [value for value, half in numbers(NO_FIGURES.sub("", sentence))
            if not any(abs(value - other) <= half for other in there)]


def sentences(page: str) -> Iterator[str]:
    """Yield the sentences and the rows of tables of a page."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=[|-])", text):
        yield from re.split(r"(?<=[.;])\s+(?=[A-Z`\[(])", block)


@pytest.mark.each("page", PAGES)
def test_sentences_cite_only_numbers_of_their_result_file(page: Path) -> None:
    wrong = {sentence: found for sentence in sentences(page.read_text())
             if (names := re.findall(r"benchmarks/results/(\w+)\.txt", sentence))
             and (found := missing(sentence, "\n".join((RESULTS / f"{n}.txt").read_text() for n in names)))}
    assert wrong == {}


def test_a_number_missing_from_the_file_is_detected() -> None:
    file = "28.3 103.6 0.273 -11.98% 105,193,984"
    assert missing("0.27 of 104 s, 95 % intervals, +12.0, 105 million", file) == []
    assert missing("0.26 and 12.1", "0.273 12.0") == [0.26, 12.1]


def test_every_number_of_a_claim_or_figure_is_in_the_result_file() -> None:
    wrong = {name: absent for name, shown in SHOWN.items()
             if (absent := missing(". ".join([shown["claim"], *shown.get("figure", {}).values()]),
                                   (RESULTS / f"{name}.txt").read_text()))}
    assert wrong == {}
    assert sum("figure" in shown for shown in SHOWN.values()) == 10


def test_every_file_has_a_verdict_a_page_and_a_script() -> None:
    assert sorted(SHOWN) == sorted(path.stem for path in RESULTS.glob("*.txt"))
    for name, shown in SHOWN.items():
        is_there = (ROOT / f"benchmarks/{shown.get('script', name)}.py").is_file()
        assert is_there != ("script_commit" in shown), name
        page = (ROOT / "docs" / shown["page"]).read_text()
        assert f"results/{name}.txt" in page, f"docs/{shown['page']} does not name {name}.txt"
