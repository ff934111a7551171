"""Published figures: every file is sound, names its document, and says what is not told."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.report.published_figures import NOT_TOLD, published_tables, read_table


def test_every_table_names_its_document_and_protocols() -> None:
    tables = {table.model: table for table in published_tables()}
    assert len(tables) == 6 and all(table.document and table.figures for table in tables.values())
    small = tables["VibeThinker-1.5B"]
    assert small.figures["aime24"].value == 80.3 and small.verified
    assert "mean of 64 answers" in small.protocol(small.figures["aime24"])
    solar = tables["Solar Open 102B"]
    assert not solar.verified and solar.protocol(solar.figures["kmmlu"]) == NOT_TOLD
    assert {"mmlu_pro", "kgc_safety", "tau2_retail"} <= set(tables["K-EXAONE-236B-A23B"].figures)


@pytest.mark.parametrize(("text", "said"), [
    ("model: m\ndocument: d\nverified: true\nfigures: {a: {name: A, value: 180}}",
     "value = 180 must be at most 100"),
    ("model: m\ndocument: d\nverified: true\nfigures: {a: {name: A, value: 1, protocol: x}}",
     "must be one of protocols"),
    ("model: m\nverified: true\nfigures: {}", "document: is missing"),
    ("model: m\ndocument: d\nverified: true\nfigures: {a: {name: A}}", "value: is missing"),
])
def test_a_figure_without_its_source_or_value_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_table(tmp_path / "t.yaml")
