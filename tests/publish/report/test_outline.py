"""What a report holds, as its outline: every section with its charts and tables, against `outline.txt`.

A change of how pages are made leaves the outline as it is; a change of what they hold is seen in the file,
which `python -m tests.publish.report.test_outline` writes it anew.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.publish.report.page import opening
from megatron_sov.publish.report.run_data import Run, read_run
from megatron_sov.publish.report.sections import key_figures, sections

OUTLINE = Path(__file__).with_name("outline.txt")


def outline(runs: list[Run]) -> Iterator[str]:
    """Yield a line for each chart and table: captions and heads, with `#` for numbers."""
    for panel in opening(runs):
        yield f"panel {panel.title}: {', '.join(label for label, _ in panel.facts)}".rstrip()
        yield from _held(panel)
    for run in runs:
        yield f"run {run.name}: {', '.join(label for label, *_ in key_figures(run))}"
        for section in sections(run):
            yield f"section {section.title}: {masked(section.text)}".rstrip()
            yield from _held(section)
            yield from (f"  sample of {len(sample['prompt'])} characters" for sample in section.samples)


def _held(part: object) -> Iterator[str]:
    yield from (f"  chart {masked(chart.caption)} {masked(chart.note)}".rstrip() for chart in part.charts)
    yield from (f"  table of {len(table.rows)} rows: {masked(' | '.join(table.head))}"
                for table in part.tables)


def masked(text: str) -> str:
    """Return a text without its numbers: times differ from one writing to the next, with all that follows."""
    return re.sub(r"[\d.,]*\d( (ms|s|min|h|d)\b)?", "#", text)


def written(runs: list[Path]) -> str:
    return "\n".join(outline([read_run(path) for path in runs])) + "\n"


def test_the_report_holds_what_its_outline_says(runs: list[Path]) -> None:
    assert written(runs) == OUTLINE.read_text(encoding="utf-8")


if __name__ == "__main__":
    from tests.publish.report.conftest import write_run

    with tempfile.TemporaryDirectory() as folder:
        stages = [write_run(Path(folder) / "pretrain"),
                  write_run(Path(folder) / "extend", when=("before", "after"))]
        OUTLINE.write_text(written(stages), encoding="utf-8")
