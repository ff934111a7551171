"""Tags of sources: parsing, merging and selection."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.cli import main
from data_prep.tags import (
    AssignedTag, find_source_artifact, is_chosen, merge_source_tags, parse_tags, read_source_tags)
from megatron_sov.base.artifacts import create_artifact, read_manifest
from megatron_sov.base.errors import UserError


def test_pack_records_source_tags(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    rows = {"ko-L2": [{"text": f"문장 {i}.", "kind": "ko", "level": "L2", "synthetic": i % 2 == 0}
                      for i in range(30)],
            "en": [{"text": f"Sentence {i}.", "kind": "domain:law", "level": None, "synthetic": True}
                   for i in range(30)]}
    parquet.write_table(pyarrow.Table.from_pylist(rows["ko-L2"]), tmp_path / "ko-L2.parquet")
    (tmp_path / "en.jsonl").write_text("\n".join(map(json.dumps, rows["en"])))
    command = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--workers", "1", "--input",
               str(tmp_path / "ko-L2.parquet"), str(tmp_path / "en.jsonl")]
    tags = ["--tag", "kind", "--tag", "level", "--tag", "synthetic", "--tag", "year=2026", "--tag",
            "en:level=basic"]
    assert main([*command, *tags, "--output", str(tmp_path / "out")]) == 0
    ko, en = read_manifest(tmp_path / "out").content["sources"]
    assert ko["tags"] == {"kind": ["ko"], "level": ["L2"], "synthetic": ["false", "true"], "year": ["2026"]}
    assert en["tags"] == {"kind": ["domain:law"], "level": ["basic"], "synthetic": ["true"], "year": ["2026"]}
    assert main([*command, "--bucket-by", "synthetic", "--output", str(tmp_path / "sorted")]) == 0
    sources = read_manifest(tmp_path / "sorted").content["sources"]
    assert {source["name"]: read_source_tags(source) for source in sources} == {
        "ko-L2-False": {"synthetic": ["false"]}, "ko-L2-True": {"synthetic": ["true"]},
        "en-True": {"synthetic": ["true"]}}


@pytest.mark.each(("argument", "message"), [
    ("Kind", "--tag 'Kind': 'Kind' cannot name a tag"), ("source=x", "'source' cannot name a tag"),
    ("kind=", "--tag 'kind=': '' cannot be a tag"), ("kind=a b", "'a b' cannot be a tag"),
    ("kind=web-*", "'web-*' cannot be a tag"), ("web:=x", "'' cannot name a tag"),
])
def test_malformed_tags_are_rejected(argument: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        parse_tags([argument])
    assert message in str(e.value)


def test_wrong_tags_give_one_sentence(tokenizers: dict[str, Path], tmp_path: Path, get_refusal: Any) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} text", "kind": [i], "n": i})
                                                for i in range(70)))
    (tmp_path / "a.txt").write_text("plain text")
    for source, tag, message in (
            ("a.jsonl", "kind", "a.jsonl:1: has '[0]' in field 'kind', which --tag names; must be a word"),
            ("a.jsonl", "n", "--tag n: source a has 70 values of it, e.g. '0' and '9'; a tag describes a"),
            ("a.jsonl", "web:kind=ko", "--tag web:kind=ko: there is no source 'web' (sources: a)"),
            ("a.txt", "kind", "is plain text, which has no field 'kind'; pass JSONL or Parquet")):
        assert message in get_refusal("pack", "--tokenizer", str(tokenizers["solar-open"]), "--input",
                                      str(tmp_path / source), "--tag", tag, "--output", str(tmp_path / "out"),
                                      "--workers", "1")
    assert not (tmp_path / "out").exists()


def test_source_is_chosen_if_all_values_match() -> None:
    web = {"name": "web-ko", "tags": {"kind": ["ko"], "synthetic": ["false", "true"],
                                      "topic": ["domain:law"]},
           "bucket": {"source": "web", "field": "level", "value": "L2"}}
    for where, chosen in (({"kind": ["ko"]}, True), ({"kind": ["en", "k?"]}, True), ({"kind": ["en"]}, False),
                          ({"synthetic": ["true"]}, False), ({"synthetic": ["true", "false"]}, True),
                          ({"source": ["web-*"], "level": ["L2"]}, True), ({"level": ["L3"]}, False),
                          ({"topic": ["domain:*"]}, True), ({"licence": ["*"]}, False), ({}, True)):
        assert is_chosen(where, web) is chosen, where


def test_assigned_tags_replace_recorded_tags() -> None:
    assigned = (AssignedTag("kind", "ko", "web"), AssignedTag("kind", "en"), AssignedTag("year", "1"))
    recorded = [{"kind": ["ja"], "level": ["L2"]}, {"kind": ["en"], "level": ["L1", "L2"]}]
    assert merge_source_tags("web", recorded, assigned) == {
        "kind": ["ko"], "level": ["L1", "L2"], "year": ["1"]}
    assert merge_source_tags("code", [], assigned) == {"kind": ["en"], "year": ["1"]}


def test_nearest_complete_artifact_is_found(tmp_path: Path) -> None:
    for name, kind in (("corpus", "corpus"), ("other", "tokenizer")):
        with create_artifact(tmp_path / name, kind) as artifact:
            (artifact.path / "text/web").mkdir(parents=True)
            (artifact.path / "text/web/a.txt").write_text("a")
    corpus = tmp_path / "corpus"
    for inside in (corpus / "text/web/a.txt", corpus / "text", corpus):
        assert find_source_artifact(inside) == corpus
    assert find_source_artifact(tmp_path / "other/text/web/a.txt") is None
    assert find_source_artifact(tmp_path / "none") is None
    (corpus / "manifest.json").write_text("{")
    assert find_source_artifact(corpus / "text") is None
