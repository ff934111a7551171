"""The page of a run: figures are those of the summary, text of documents stays text, charts are drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.curate.journey.page import render, write_report
from megatron_sov.base.pages.page import PageTable

OpenPage = Callable[[Path], tuple[str, list[str]]]


def words(page: str) -> str:
    """Return what a reader sees, without scripts."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_tells_what_became_of_each_source(corpus: Path) -> None:
    shown = words(render(corpus, now_s=0))
    assert "2 sources, 7 documents read; 4 in the output" in shown
    assert "02 rules too few words 1 11 B" in shown  # why documents were dropped
    assert "03 pii 5 5 1" not in shown and "03 pii 4 4 1" in shown  # in, kept, changed
    assert "web not_json 1" in shown  # the quarantine
    assert "near duplicate" in shown and "Clusters by size: documents clusters 2 1" in shown
    assert "Write to [-ann@example.org-]{+&lt;email&gt;+} for a place." in shown
    for title in ("Languages and levels", "Scores", "Time", "Settings", "Examples"):
        assert title in shown


def test_a_changed_figure_changes_the_page(own_corpus: Path) -> None:
    summary = json.loads((own_corpus / "summary.json").read_text())
    summary["sources"][0]["steps"][0]["documents_kept"] = 123_456
    (own_corpus / "summary.json").write_text(json.dumps(summary))
    assert "123,457 documents read" in words(render(own_corpus))


def test_text_of_documents_stays_text(corpus: Path, hostile: str) -> None:
    page = render(corpus)
    assert "<script>window.hacked" not in page and "<img src=x" not in page
    assert page.count("\x1b") == 0 and r"\x1b" in page


def test_findings_that_cannot_be_read_are_told_on_the_page(own_corpus: Path) -> None:
    file, = own_corpus.glob("shared/*/report.json")
    file.write_text('{"tables": [{"title": 3}]}')
    assert "report.json cannot be shown: tables.0.title" in words(render(own_corpus))


def test_a_run_of_sources_without_output_has_a_page(own_corpus: Path) -> None:
    for file in own_corpus.glob("text/*/*"):
        file.unlink()
    assert "0 in the output" in words(render(own_corpus))


def test_the_command_leaves_the_corpus_as_it_is(own_corpus: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(own_corpus.rglob("*"))
    monkeypatch.chdir(own_corpus)
    assert main(["report", "."]) == 0
    assert (tmp_path / "corpus-report.html").is_file() and sorted(own_corpus.rglob("*")) == before
    assert main(["report", str(own_corpus), "--output", str(tmp_path / "p/page.html")]) == 0
    assert (tmp_path / "p/page.html").is_file()


def test_folders_without_a_summary_are_refused(own_corpus: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    (own_corpus / "summary.json").unlink()
    for folder in (own_corpus, tmp_path / "none"):
        assert main(["report", str(folder)]) == 2
        assert "pass the folder that `sov-data run` or `sov-data synth` wrote" in capsys.readouterr().err


def test_every_chart_is_drawn_and_nothing_complains(own_corpus: Path, open_page: OpenPage) -> None:
    file = write_report(own_corpus)
    dom, console = open_page(file)
    assert console == []
    body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    plots = body.split('<div class="drawing"')[1:]
    assert len(plots) >= 8 and all(re.search(r'<rect x|<path class="fill"', plot) for plot in plots)
    assert "<img" not in body


def test_the_table_of_reasons_has_a_row_for_each_reason(corpus: Path) -> None:
    from data_prep.curate.journey.page import reasons_table
    from data_prep.curate.journey.summary import dropped_by_reason, read_summary

    steps = [step for source in read_summary(corpus).sources for step in source.steps]
    assert reasons_table(dropped_by_reason(steps)) == PageTable(["step", "reason", "documents", "text"], [
        ["01 language", "language not wanted", "1", "22 B"], ["02 rules", "too few words", "1", "11 B"],
        ["04 minhash_dedup", "near duplicate", "1", "42 B"]])
