"""Documents one by one: their tree is that of a reference, one is proved by its text or tokens alone, and
proofs that were bent are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.audit.commitment import DOCUMENTS, Entry, Leaf, publish, read_commitment
from megatron_sov.audit.documents import (
    document_in_hand, document_line, document_lines, documents_root, read_document_proof, tokens_sha256)
from megatron_sov.audit.drawing import Draw
from megatron_sov.audit.merkle import inclusion_path, merkle_root
from megatron_sov.audit.preparing import hash_again
from megatron_sov.audit.repeating import RepeatOutcome
from megatron_sov.audit.verdict import AuditVerdict, not_covered, read_prepared
from megatron_sov.base.artifacts import MANIFEST, FileRecord, manifest_sha256
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.model.config import apply_settings
from megatron_sov.train.data.token_shards import open_sources


def audit(*words: object) -> int:
    return cli.main(["audit", *map(str, words)])


def texts_of(shards: Path, source: str) -> list[tuple[str, list[int]]]:
    """Return the text and the ids of each training document, by Megatron-Core's files and the tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shards / "tokenizer/tokenizer.json"))
    [found] = [s for s in open_sources({str(shards): 1.0}, 1 << 20) if s.name == source]
    documents = found.shard("train")
    ids = [documents.tokens(i, 0, int(n)).tolist() for i, n in enumerate(documents.lengths)]
    return [(tokenizer.decode(one[:-1], skip_special_tokens=False), one) for one in ids]


def reference_root(lines: list[bytes]) -> bytes:
    """The tree of RFC 6962 from its bottom: pairs are joined level by level, and a last one without a
    neighbour rises."""
    level = [hashlib.sha256(b"\0" + line).digest() for line in lines]
    while len(level) > 1:
        pairs = [level[i:i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + pair[0] + pair[1]).digest() if len(pair) == 2 else pair[0]
                 for pair in pairs]
    return level[0]


@pytest.fixture
def shards(token_shards: Path, tmp_path: Path) -> Path:
    """A copy of token shards with sources "first" and "second"."""
    return Path(shutil.copytree(token_shards, tmp_path / "shards"))


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    """What a run has before its first step, as its settings name these shards."""
    run = tmp_path / "run"
    run.mkdir()
    config = apply_settings(recipes.get("tiny-qwen3"), [f"data.paths={json.dumps({str(shards): 1.0})}"])
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "events.jsonl").write_text("")
    return run


@pytest.fixture
def log(run: Path, tmp_path: Path) -> Path:
    """What was published of it, with its documents."""
    assert audit("commit", run, "--log", tmp_path / "log.jsonl", "--documents") == ExitCode.OK
    return tmp_path / "log.jsonl"


def test_the_root_is_that_of_every_document_in_its_place(shards: Path) -> None:
    hashes = [(name, number, hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest())
              for name in ("first", "second") for number, (_, ids) in enumerate(texts_of(shards, name))]
    lines = [f"document {name} {number} {sha256}".encode() for name, number, sha256 in hashes]
    assert len(lines) > 100 and documents_root(shards) == reference_root(lines).hex()
    assert list(document_lines(shards)) == lines and inclusion_path(document_lines(shards), 77) == (
        inclusion_path(lines, 77))


def test_a_document_is_proved_by_its_text_or_its_tokens_alone(
        shards: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof, mine, tokenizer = tmp_path / "proof.json", tmp_path / "mine", tmp_path / "tokenizer"
    root, (text, ids) = read_commitment(log).root, texts_of(shards, "second")[17]
    assert audit("prove", shards, "--document", "second:17", "--log", log, "--output", proof) == ExitCode.OK
    shutil.copytree(shards / "tokenizer", tokenizer)
    shutil.rmtree(shards)
    log.unlink()
    mine.write_bytes(text.encode())
    given = ("check", proof, "--root", root, "--of", mine)
    assert audit(*given, "--tokenizer", tokenizer) == ExitCode.OK
    said = capsys.readouterr().out
    assert "document second:17 of documents" in said and "published" in said
    mine.write_bytes(text.encode() + b" ")
    assert audit(*given, "--tokenizer", tokenizer) == ExitCode.GATE_FAILED
    mine.write_text(json.dumps(ids))
    assert audit(*given) == ExitCode.OK
    mine.write_text(json.dumps(ids[:-1]))
    assert audit(*given) == ExitCode.GATE_FAILED
    assert "is not document second:17; every character counts" in capsys.readouterr().out
    # a tokenizer that reads the text as the tokens of another one
    mine.write_bytes(text.encode())
    file = tokenizer / "tokenizer.json"
    file.write_text(file.read_text().replace('"normalizer"', '"normalizer" '))
    assert audit(*given, "--tokenizer", tokenizer) == ExitCode.USER_ERROR
    assert "is not the one by which the shards were packed" in capsys.readouterr().err
    assert audit(*given) == ExitCode.USER_ERROR
    assert "is no JSON list of token ids" in capsys.readouterr().err


def test_the_text_of_a_chat_is_asked_for_as_token_ids(shards: Path, tmp_path: Path) -> None:
    """A template has framed it: its text alone would never be the document."""
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["content"]["sources"][1]["format"] = "chat"
    mine, tokenizer = tmp_path / "mine", shards / "tokenizer"
    mine.write_text("Hello")
    assert document_in_hand(mine, tokenizer, json.dumps(manifest), "first")
    with pytest.raises(UserError, match=r"second holds documents of format 'chat'.*give the document's"):
        document_in_hand(mine, tokenizer, json.dumps(manifest), "second")
    with pytest.raises(UserError, match="the shards' manifest in the proof names none"):
        document_in_hand(mine, tokenizer, json.dumps(manifest), "third")


def swapped(proof: dict[str, Any], shards: Path) -> None:
    """Another document, with the path of this one."""
    proof["document"]["sha256"] = tokens_sha256(texts_of(shards, "second")[18][1])


def renumbered(proof: dict[str, Any], shards: Path) -> None:
    proof["document"]["number"] = 18


def moved(proof: dict[str, Any], shards: Path) -> None:
    proof["document"]["index"] += 1


def shortened(proof: dict[str, Any], shards: Path) -> None:
    del proof["document"]["path"][-1]


def lengthened(proof: dict[str, Any], shards: Path) -> None:
    proof["document"]["path"].append("0" * 64)


def of_a_node(proof: dict[str, Any], shards: Path) -> None:
    """A node of the tree for a leaf: their hashes begin with another byte."""
    lines = document_lines(shards)
    path = inclusion_path(lines, 0)
    proof["document"] |= {"index": 0, "size": (len(lines) + 1) // 2, "path": path[1:], "sha256": path[0]}


def of_another_line(proof: dict[str, Any], shards: Path) -> None:
    """The hash of a line of data for a root of documents."""
    proof["leaf"]["kind"] = "data"


def of_another_manifest(proof: dict[str, Any], shards: Path) -> None:
    """One that names another tokenizer."""
    proof["manifest"] += " "


def shapeless(proof: dict[str, Any], shards: Path) -> None:
    proof["document"] = ["second:17"]


@pytest.mark.parametrize("bend", [swapped, renumbered, moved, shortened, lengthened, of_a_node,
                                  of_another_line, of_another_manifest, shapeless])
def test_a_proof_that_was_bent_is_refused(
        bend: Callable[[dict[str, Any], Path], None], shards: Path, log: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "proof.json"
    assert audit("prove", shards, "--document", "second:17", "--log", log, "--output", file) == ExitCode.OK
    proof = json.loads(file.read_text())
    bend(proof, shards)
    file.write_text(json.dumps(proof))
    assert audit("check", file, "--root", read_commitment(log).root) == ExitCode.USER_ERROR
    assert "is no proof of" in capsys.readouterr().err


def test_a_root_that_leads_to_no_published_line_is_told(shards: Path, log: Path, tmp_path: Path) -> None:
    """A whole proof of documents that were never published, made by whoever likes to."""
    file, other = tmp_path / "proof.json", document_line("second", 17, tokens_sha256([1, 2, 3]))
    assert audit("prove", shards, "--document", "second:17", "--log", log, "--output", file) == ExitCode.OK
    proof = json.loads(file.read_text())
    proof["leaf"]["sha256"] = merkle_root([other])
    proof["document"] |= {"sha256": tokens_sha256([1, 2, 3]), "index": 0, "size": 1, "path": []}
    file.write_text(json.dumps(proof))
    assert audit("check", file, "--root", read_commitment(log).root) == ExitCode.GATE_FAILED


def test_no_number_of_a_line_is_told_that_nothing_proves(
        shards: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A root does not say of how many lines it is: the last of four has the path of the last of six."""
    file, commitment = tmp_path / "proof.json", read_commitment(log)
    assert audit("prove", commitment.leaves[3].sha256, "--log", log, "--output", file) == ExitCode.OK
    proof, said = json.loads(file.read_text()), []
    assert (proof["index"], proof["size"]) == (3, 4)
    for bent in ({}, {"index": 5, "size": 6}):
        file.write_text(json.dumps(proof | bent))
        capsys.readouterr()
        assert audit("check", file, "--root", commitment.root) == ExitCode.OK
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "published" in said[0]


@pytest.mark.parametrize(("named", "said"), [
    ("third:1", "there is no source 'third'; the shards have first, second"),
    ("second", "must be SOURCE:NUMBER"), ("second:1-2", "must be SOURCE:NUMBER"),
    ("second:99999", "training documents, numbered from 0")])
def test_a_document_that_is_not_there_is_refused(
        named: str, said: str, shards: Path, log: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    proof = tmp_path / "proof.json"
    assert audit("prove", shards, "--document", named, "--log", log, "--output", proof) == ExitCode.USER_ERROR
    assert said in capsys.readouterr().err and not proof.exists()


def test_a_proof_is_not_written_over_what_it_proves(
        shards: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    shard = next((shards / "second").glob("train-*.idx"))
    before = shard.read_bytes()
    for what, output in ((shard, shard), (".", "manifest.json"), (shards, "second/proof.json")):
        assert audit("prove", what, "--log", log, "--output", output) == ExitCode.USER_ERROR
        assert "which is then no longer what was published" in capsys.readouterr().err
    assert shard.read_bytes() == before and not (shards / "second/proof.json").exists()


@pytest.mark.parametrize("root", ["ROOT", "f" * 63, "f" * 64 + " "])
def test_what_is_no_root_is_told_before_anything_else(
        root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit("check", tmp_path / "proof.json", "--root", root) == ExitCode.USER_ERROR
    assert "must be the 64 digits 0-9 and a-f that the lab has published" in capsys.readouterr().err


def test_shards_that_were_changed_since_prove_nothing(
        shards: Path, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next((shards / "second").glob("train-*.bin"))
    file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
    given = ("--document", "first:0", "--log", log, "--output", tmp_path / "proof.json")
    assert audit("prove", shards, *given) == ExitCode.USER_ERROR
    assert "its documents are not those that were published; restore them" in capsys.readouterr().err
    for other in (shards / "tokenizer", tmp_path, "f" * 64):
        assert audit("prove", other, *given) == ExitCode.USER_ERROR
        assert "has no line for the documents of" in capsys.readouterr().err


def test_the_page_says_whether_the_documents_were_hashed_again(
        shards: Path, log: Path, tmp_path: Path) -> None:
    commitment = read_commitment(log)
    [leaf] = commitment.find(DOCUMENTS)
    for made, said in (((), True), ((hash_again(shards, leaf, tmp_path / "audit"),), False)):
        verdict = AuditVerdict(commitment, Draw(commitment.root, "a", (), 0), (), (), made)
        assert ("the documents that were published one by one" in not_covered(verdict)) == said
    assert [p.kind for p in read_prepared(commitment, tmp_path / "audit")] == [DOCUMENTS]


def test_documents_are_published_once_and_only_where_that_is_asked_for(
        run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    log, proof = tmp_path / "log.jsonl", tmp_path / "proof.json"
    assert not [leaf for leaf in publish(run, log) if leaf.kind == DOCUMENTS]
    assert audit("prove", shards, "--document", "first:0", "--log", log, "--output", proof) == (
        ExitCode.USER_ERROR)
    assert "`audit commit --documents` published them" in capsys.readouterr().err
    # a log that has begun without them gets them later, in a line of its own
    [leaf] = publish(run, log, documents=True)
    assert (leaf.kind, leaf.name) == (DOCUMENTS, manifest_sha256(shards))
    assert len(read_commitment(log).entries) == 2
    assert audit("prove", shards, "--document", "first:0", "--log", log, "--output", proof) == ExitCode.OK
    for file in shards.rglob("train-*.bin"):
        file.unlink()  # what is known is not read again
    assert publish(run, log, documents=True) == ()
    text = log.read_text()
    log.write_text(text.replace(f'"name": "{leaf.name}"', '"name": "second"'))
    with pytest.raises(UserError, match="it has documents of 'second'"):
        read_commitment(log)


def test_the_same_documents_are_proved_of_each_folder_that_holds_them(shards: Path, tmp_path: Path) -> None:
    """Their roots are equal, and the manifests are not: the same texts were packed twice."""
    again, run, log, proof = (tmp_path / name for name in ("again", "twice", "log.jsonl", "proof.json"))
    shutil.copytree(shards, again)
    manifest = json.loads((again / MANIFEST).read_text())
    (again / MANIFEST).write_text(json.dumps(manifest | {"created_s": 1.0, "sha256": ""}))
    run.mkdir()
    paths = json.dumps({str(shards): 1.0, f"more={again}": 1.0})
    config = apply_settings(recipes.get("tiny-qwen3"), [f"data.paths={paths}"])
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "events.jsonl").write_text("")
    assert len({leaf.sha256 for leaf in publish(run, log, documents=True) if leaf.kind == DOCUMENTS}) == 1
    for folder in (shards, again):
        given = ("--document", "first:0", "--log", log, "--output", proof)
        assert audit("prove", folder, *given) == ExitCode.OK
        assert audit("check", proof, "--root", read_commitment(log).root) == ExitCode.OK
        assert json.loads(proof.read_text())["leaf"]["name"] == manifest_sha256(folder)


def test_documents_of_what_is_no_data_of_the_run_are_refused(log: Path) -> None:
    """A lab that proves documents which its run never read."""
    before = read_commitment(log)
    others = Leaf(DOCUMENTS, "a" * 64, "b" * 64)
    lines = [leaf.line() for leaf in (*before.leaves, others)]
    last = log.read_text().rstrip("\n")
    entry = Entry(1, hashlib.sha256(last.encode()).hexdigest(), "run", "", (others,), merkle_root(lines))
    log.write_text(f"{last}\n{entry.line()}\n")
    with pytest.raises(UserError, match="line 2 has documents of aaaaaaaaaaaa, which is no data"):
        read_commitment(log)


def test_an_auditor_hashes_the_documents_again(shards: Path, log: Path, tmp_path: Path) -> None:
    [leaf] = read_commitment(log).find(DOCUMENTS)
    assert hash_again(shards, leaf, tmp_path / "audit").outcome == RepeatOutcome.EQUAL
    # a lab that shows other documents than it trains on: the shards are whole, their root is not that
    file = next((shards / "second").glob("train-*.bin"))
    file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
    found = hash_again(shards, leaf, tmp_path / "other")
    assert found.outcome == RepeatOutcome.UNPROVED and file.name in found.detail
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["files"][f"second/{file.name}"]["digest"] = FileRecord.of(file).digest
    (shards / MANIFEST).write_text(json.dumps(manifest | {"sha256": ""}))
    found = hash_again(shards, leaf, tmp_path / "other")
    assert found.outcome == RepeatOutcome.DIFFERENT and "have another root" in found.detail


def test_the_line_of_a_document_is_read_in_one_way() -> None:
    """Source "a 5 b", document 7, has the same line as source "a", document 5, with a hash that is none."""
    sha256 = tokens_sha256([1])
    assert document_line("a 5 b", 7, sha256) == document_line("a", 5, f"b 7 {sha256}")
    whole = {"source": "a 5 b", "number": 7, "sha256": sha256, "index": 0, "size": 1, "path": []}
    assert read_document_proof(whole).name == "a 5 b:7"
    with pytest.raises(ValueError, match="its document has the hash"):
        read_document_proof(whole | {"source": "a", "number": 5, "sha256": f"b 7 {sha256}"})


@pytest.mark.parametrize("ids", [[-1], [1 << 32], [0.5], ["1"], [[1]], [True], 1, [[1], [1, 2]]])
def test_what_is_no_list_of_token_ids_has_no_hash(ids: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        tokens_sha256(ids)
    assert tokens_sha256([1, 2]) == hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).hexdigest()
