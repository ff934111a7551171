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
ENTRIES = {name: entry for rows in VERDICTS.values() for name, entry in rows.items()}
FACTORS = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9}
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(e[+-]?\d+)?(?:%|x|s|k|MB|GB)?(?!\w)"
                    rf"(?:\s+({'|'.join(filter(None, FACTORS))})\b)?")
NOT_FIGURES = re.compile(r"`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d|arXiv \d+\.\d+|95 %\s+interval"
                         r"|[A-Z]\w+ \d+\.\d+\b")
"""Numbers that are not results: code, links, dates, widths of intervals, versions of programs."""


def iter_numbers(text: str) -> Iterator[tuple[float, float]]:
    """Yield (absolute value, half of the last digit's unit) for each number in a text."""
    for match in NUMBER.finditer(text):
        digits = match[1].rstrip(",")
        scale = float(f"1{match[2] or 'e0'}") * FACTORS[match[3] or ""]
        decimals = len(digits.partition(".")[2])
        yield float(digits.replace(",", "")) * scale, 0.5001 * 10**-decimals * scale


def find_missing_numbers(sentence: str, file: str) -> list[float]:
    """Return the numbers of a sentence that are absent from a file,
    allowing for rounding and percentages (0.27 is 27 %)."""
    available = [value * scale for value, _ in iter_numbers(file) for scale in (1, 100, 0.01)]
    return [value for value, half in iter_numbers(NOT_FIGURES.sub("", sentence))
            if not any(abs(value - other) <= half for other in available)]


def iter_sentences(page: str) -> Iterator[str]:
    """Yield the sentences and table rows of a page, without code blocks."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=[|-])", text):
        yield from re.split(r"(?<=[.;])\s+(?=[A-Z`\[(])", block)


@pytest.mark.each("page", PAGES)
def test_sentences_cite_only_numbers_of_their_result_file(page: Path) -> None:
    for sentence in iter_sentences(page.read_text()):
        names = re.findall(r"benchmarks/results/(\w+)\.txt", sentence)
        if names:
            results = "\n".join((RESULTS / f"{name}.txt").read_text() for name in names)
            assert find_missing_numbers(sentence, results) == [], sentence


def test_a_number_missing_from_the_file_is_detected() -> None:
    file = "28.3 103.6 0.273 -11.98% 105,193,984"
    assert find_missing_numbers("0.27 of 104 s, 95 % intervals, +12.0, 105 million", file) == []
    assert find_missing_numbers("0.26 and 12.1", "0.273 12.0") == [0.26, 12.1]


def test_every_number_of_a_claim_or_figure_is_in_the_result_file() -> None:
    for name, entry in ENTRIES.items():
        text = ". ".join([entry["claim"], *entry.get("figure", {}).values()])
        assert find_missing_numbers(text, (RESULTS / f"{name}.txt").read_text()) == [], name
    assert sum("figure" in entry for entry in ENTRIES.values()) == 10


def test_every_file_has_a_verdict_a_page_and_a_script() -> None:
    assert sorted(ENTRIES) == sorted(path.stem for path in RESULTS.glob("*.txt"))
    for name, entry in ENTRIES.items():
        has_script = (ROOT / f"benchmarks/{entry.get('script', name)}.py").is_file()
        assert has_script != ("script_commit" in entry), name
        page = (ROOT / "docs" / entry["page"]).read_text()
        assert f"results/{name}.txt" in page, f"docs/{entry['page']} does not name {name}.txt"
