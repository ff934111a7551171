"""`sov-data inspect`: a document's way through a pipeline, and how its id is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cli import main

Ids = Callable[[str, int], str]


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_a_kept_document_is_shown_at_each_step(corpus: Path, ids: Ids,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect(capsys, corpus, "--id", ids("web", 0))
    assert lines[:2] == [ids("web", 0), "  kept through 4 steps"]
    assert "  licence        CC-BY-4.0" in lines and "  where          pages/0.jsonl:1" in lines
    at = lines.index("  00 parse               80 characters, 80 bytes")
    assert lines[at + 1:at + 6] == [
        "  01 language            kept  + language=en, language_score=0.9",
        "  02 rules               kept",
        "  03 pii                 changed  + pii=email=1  80 -> 72 characters",
        "    @ line 2",
        "    ~ Write to [-ann@example.org-]{+<email>+} for a place."]
    assert lines[-3:] == ["  | The ship came in at dawn.", "  | Write to <email> for a place.",
                          "  | It left at noon."]


def test_a_dropped_document_says_why_and_ends_there(corpus: Path, ids: Ids,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect(capsys, corpus, "--id", ids("web", 1))
    assert lines[1] == "  dropped by 02 rules: too few words"
    assert not any("pii" in line for line in lines)
    way = json.loads("\n".join(inspect(capsys, corpus, "--id", ids("web", 4), "--json")))
    assert way["stops"][-1] == {"step": "04 minhash_dedup", "fate": "dropped", "reason": "near duplicate",
                                "columns": {"duplicate_of": ids("web", 0)}, "text": None}


def test_only_the_shard_of_the_id_is_opened(own_corpus: Path, ids: Ids,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    for file in own_corpus.glob("shards/books/*/*.parquet"):
        file.write_bytes(b"nobody reads this")
    assert inspect(capsys, own_corpus, "--id", ids("web", 2))[1] == "  kept through 4 steps"
    assert "is damaged" in refused(capsys, own_corpus, "--id", ids("books", 0))


def test_control_characters_of_documents_are_shown_and_not_sent(corpus: Path, ids: Ids,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(inspect(capsys, corpus, "--id", ids("web", 3)))
    assert "\x1b" not in text and "\x07" not in text
    assert r"\x1b]0;owned\x07\x1b[2J" in text


def test_ids_are_found_by_file_by_words_and_by_reason(corpus: Path, ids: Ids,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, corpus, "--where", "0.jsonl") == [
        f"{ids('web', 0)}  pages/0.jsonl:1  kept",
        f"{ids('web', 1)}  pages/0.jsonl:2  dropped by 02 rules: too few words",
        f"{ids('web', 2)}  pages/0.jsonl:3  kept",
        f"{ids('books', 0)}  pages/0.jsonl:1  kept"]
    assert inspect(capsys, corpus, "--text", "CAME IN AT DAWN", "--count", 1) == [
        f"{ids('web', 0)}  pages/0.jsonl:1  kept", "… and more; --count 10 shows more of them"]
    assert inspect(capsys, corpus, "--dropped", "wanted") == [
        f"{ids('web', 5)}  pages/1.jsonl:3  dropped by 01 language: language not wanted"]
    assert len(inspect(capsys, corpus, "--dropped", "--source", "web")) == 3
    assert inspect(capsys, corpus, "--text", "no such words") == ["no document found"]


def test_a_record_that_could_not_be_read_is_told(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, corpus, "--where", "pages/9.jsonl") == [
        "not read  web: pages/9.jsonl:3: not_json: is no JSON"]


def test_a_search_says_what_it_has_not_looked_at(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect(capsys, corpus, "--text", "Ishmael", "--scan-bytes", 1)
    assert lines[0] == "no document found"
    assert lines[1].startswith("… not looked at: ") and "--source NAME" in lines[1]


def test_a_run_that_is_not_at_its_end_can_be_looked_into(own_corpus: Path, ids: Ids,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    (own_corpus / "summary.json").unlink()
    last, = own_corpus.glob("shards/web/04-*/00000.parquet")
    last.unlink()
    assert inspect(capsys, own_corpus, "--id", ids("web", 0))[1] == (
        "  on its way; 04 minhash_dedup is not done yet")
    assert inspect(capsys, own_corpus)[1:] == [
        "books                                 1 documents, 4 steps begun",
        "web                                   6 documents, 4 steps begun"]


def test_without_an_id_each_source_is_shown_step_by_step(corpus: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect(capsys, corpus)
    assert lines[4].split() == ["web", "02", "rules", "5", "4", "289", "B", "too", "few", "words"]
    assert len(lines) == 2 + 5 + 5 and len(inspect(capsys, corpus, "--source", "books")) == 2 + 5


@pytest.mark.parametrize(("arguments", "said"), [
    (["--id", "web"], "is no id (SOURCE:SHARD:16 hexadecimal digits"),
    (["--id", "../etc:0:0123456789abcdef"], "has no source '../etc'"),
    (["--id", "wep:0:0123456789abcdef"], "did you mean 'web'?"),
    (["--id", "web:7:0123456789abcdef"], "source 'web' has no shard of this number (of its 1)"),
    (["--id", "web:0:0123456789abcdef"], "has no such document among its 6"),
    (["--where", ""], "--where: is empty"),
    (["--text", "x", "--count", "0"], "--count 0: must be at least 1"),
    (["--text", "\udcff"], "is no UTF-8"), (["--text", "x", "--json"], "goes with --id"),
    (["--text", "x", "--source", "none"], "has no source 'none'"),
    (["--id", "a", "--text", "b"], "--text: goes without --id"),
])
def test_mistakes_are_one_sentence(corpus: Path, arguments: Sequence[str], said: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, corpus, *arguments)


def test_token_shards_have_no_ids(token_shards: Path, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert "token shards keep no ids" in refused(capsys, token_shards, "--id", "web:0:0123456789abcdef")
    assert "artifact of kind tokens" in inspect(capsys, token_shards)[0]
    assert "does not exist, and no work on it is unfinished" in refused(capsys, tmp_path / "none")
    assert "is nothing that megatron-sov has made" in refused(capsys, tmp_path)


def test_a_corpus_tells_what_every_artifact_tells(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads("\n".join(inspect(capsys, corpus, "--json")))
    assert (told["kind"], told["path"]) == ("corpus", str(corpus)) and told["content"]["num_documents"]
    assert "every file has the hash of its manifest" in inspect(capsys, corpus, "--verify")[-1]


def test_what_does_not_fit_together_is_told(own_corpus: Path, ids: Ids,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    layer, = own_corpus.glob("shards/web/02-*/00000.parquet")
    other, = own_corpus.glob("shards/books/02-*/00000.parquet")
    layer.write_bytes(other.read_bytes())
    assert "1 rows over 6 documents" in refused(capsys, own_corpus, "--id", ids("web", 0))
    summary = json.loads((own_corpus / "summary.json").read_text())
    summary["sources"][0]["steps"][0]["folder"] = "../../etc"
    (own_corpus / "summary.json").write_text(json.dumps(summary))
    assert "is not inside OUT" in refused(capsys, own_corpus, "--id", ids("web", 0))
    (own_corpus / "summary.json").write_text('{"name": "x", "sources": [{"name": 3}]}')
    assert "is damaged (sources.0" in refused(capsys, own_corpus)


@pytest.mark.parametrize(("column", "said"), [
    (pa.array([b"\xff\xfe"] * 6, pa.binary()).view(pa.string()), "Invalid UTF8 sequence"),
    (pa.array([1] * 6), "is damaged (it has no column 'id' of text)")])
def test_shards_of_strangers_are_refused_in_a_sentence(
        own_corpus: Path, ids: Ids, column: pa.Array, said: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    base, = own_corpus.glob("shards/web/00-*/00000.parquet")
    table = pq.read_table(base)
    pq.write_table(table.set_column(0, "id", column), base)
    for arguments in (["--id", ids("web", 0)], ["--text", "ship"], ["--where", "x"], ["--dropped"]):
        assert said in refused(capsys, own_corpus, *arguments)
