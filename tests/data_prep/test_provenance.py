"""Which artifact a file of text belongs to."""

from __future__ import annotations

from pathlib import Path

from data_prep.provenance import artifact_of
from megatron_sov.artifacts import new_artifact


def test_the_nearest_complete_artifact_counts(tmp_path: Path) -> None:
    for name, kind in (("corpus", "corpus"), ("other", "tokenizer")):
        with new_artifact(tmp_path / name, kind) as artifact:
            (artifact.path / "text/web").mkdir(parents=True)
            (artifact.path / "text/web/a.txt").write_text("a")
    corpus = tmp_path / "corpus"
    for inside in (corpus / "text/web/a.txt", corpus / "text", corpus):
        assert artifact_of(inside) == corpus
    assert artifact_of(tmp_path / "other/text/web/a.txt") is None and artifact_of(tmp_path / "none") is None
    (corpus / "manifest.json").write_text("{")
    assert artifact_of(corpus / "text") is None
