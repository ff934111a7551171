"""Token shard artifacts: reading, indices, held-out rule."""

import struct
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_prep.shards.heldout import HeldoutRule, hash_document
from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from data_prep.shards.token_artifact import (
    choose_token_dtype, format_table, iter_shards, open_split, read_tokens_manifest)
from megatron_sov.base.artifacts import create_artifact, read_manifest
from megatron_sov.base.documents import Conversation, Document, Message
from megatron_sov.base.documents.shard_files import CONTENT_VERSION, IndexedWriter
from megatron_sov.base.errors import UserError


def build_source(name: str, train: int, heldout: int) -> dict[str, Any]:
    """Return the manifest entry of a source with `train` training and `heldout` held-out shards."""
    return {"name": name, "splits": {
        split: {"shards": [{"prefix": f"{name}/{split}-{i:05}", "num_tokens": i} for i in range(n)]}
        for split, n in (("heldout", heldout), ("train", train))}}


CONTENT = {"sources": [build_source("web", 2, 1), build_source("books", 1, 0)]}


@pytest.mark.each(("chosen", "prefixes"), [
    ({}, ["web/train-00000", "web/train-00001", "web/heldout-00000", "books/train-00000"]),
    ({"source": "web"}, ["web/train-00000", "web/train-00001", "web/heldout-00000"]),
    ({"split": "train"}, ["web/train-00000", "web/train-00001", "books/train-00000"]),
    ({"source": "books", "split": "heldout"}, [])])
def test_shards_are_ordered_by_source_split_and_number(chosen: dict[str, str], prefixes: list[str]) -> None:
    shards = list(iter_shards(Path("data"), CONTENT, **chosen))
    assert [shard.prefix for shard in shards] == [Path("data") / prefix for prefix in prefixes]
    for shard in shards:
        assert shard.prefix.parent.name == shard.source["name"] and shard.prefix.name.startswith(shard.split)
        assert shard.record["num_tokens"] == int(shard.prefix.name[-5:])


@pytest.mark.parametrize("version", [1, CONTENT_VERSION + 1])
def test_another_content_version_is_rejected(version: int, tmp_path: Path) -> None:
    with create_artifact(tmp_path / "data", "tokens") as artifact:
        artifact.content.update(CONTENT | ({"content_version": version} if version > 1 else {}))
    with pytest.raises(UserError,
                       match=rf"was packed in layout {version}, this version reads layout {CONTENT_VERSION}"):
        read_tokens_manifest(tmp_path / "data")


Documents = list[list[int]]


def write(prefix: Path, documents: Documents, dtype: str) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.write(np.array([len(document)], np.int32), {"bin": np.array(document, np.int32)})


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 65499), min_size=1, max_size=40), min_size=1, max_size=12),
       st.sampled_from(["uint16", "int32"]))
def test_megatron_reads_every_token(documents: Documents, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "source/train"
        write(prefix, documents, dtype)
        theirs = IndexedDataset(str(prefix))
        assert [theirs[i].tolist() for i in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
        assert [d.tolist() for d in open_split(prefix).documents()] == documents


def test_files_equal_megatrons_builder(tmp_path: Path) -> None:
    documents = [[5, 6, 7], [1], [2, 3]]
    write(tmp_path / "ours", documents, "int32")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.each("vocab_size", [2, 65499, 65500, 65501, 196608])
def test_dtype_is_megatrons_choice(vocab_size: int) -> None:
    assert choose_token_dtype(vocab_size) == DType.optimal_dtype(vocab_size).__name__


def test_an_empty_split_is_readable(tmp_path: Path) -> None:
    write(tmp_path / "none", [], "uint16")
    split = open_split(tmp_path / "none")
    assert len(split.tokens) == len(split.lengths_tokens) == 0 and list(split.documents()) == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    prefix = tmp_path / "s"
    write(prefix, [[1, 2], [3]], "uint16")
    good = (tmp_path / "s.idx").read_bytes()
    # the lengths of both documents, after a header of 34 bytes
    swapped = good[:34] + struct.pack("<ii", 1, 2) + good[42:]
    for raw, rule in ((b"short", "is no index"), (b"X" + good[1:], "is no index"),
                      (good + b"\0", "does not fit its 2"), (swapped, "sequence 1 begins at byte 4")):
        (tmp_path / "s.idx").write_bytes(raw)
        with pytest.raises(UserError, match=rule):
            open_split(prefix)
    (tmp_path / "s.idx").write_bytes(good)
    (tmp_path / "s.bin").write_bytes(b"\0" * 4)
    with pytest.raises(UserError, match="has 4 bytes, the index says 6"):
        open_split(prefix)
    (tmp_path / "s.bin").unlink()
    with pytest.raises(UserError, match=r"s\.bin: cannot be read"):
        open_split(prefix)


def test_joined_and_empty_documents_are_rejected(tmp_path: Path) -> None:
    write(tmp_path / "empty", [[1, 2], []], "int32")
    builder = IndexedDatasetBuilder(str(tmp_path / "joined.bin"), dtype=np.int32)
    builder.add_document(np.array([5, 6, 7]), [1, 2])
    builder.finalize(str(tmp_path / "joined.idx"))
    for name in ("empty", "joined"):
        with pytest.raises(UserError, match=f"{name}.idx: has documents of several sequences, or without"):
            open_split(tmp_path / name)


def test_inspect_shows_counts_per_source(tokenizers: dict[str, Path], tmp_path: Path,
                                         read_output: Any) -> None:
    (tmp_path / "one.txt").write_text("some text of one document " * 100)
    pack_sources(tokenizers["solar-open"], [PackSource("one", tmp_path / "one.txt")], tmp_path / "shards",
                 PackSettings(heldout_share=1e-9))
    lines = read_output("inspect", str(tmp_path / "shards")).split("artifact of kind")[1].splitlines()
    assert [line.removeprefix("  ") for line in lines[1:5]] == format_table(tmp_path / "shards")
    assert lines[-1].startswith("  row 1: == one/train, document 0, ") and "some text of one" in lines[-1]
    assert read_output("inspect", str(tmp_path / "shards"), "--verify").endswith("shards: sound as tokens\n")
    record = read_manifest(tmp_path / "shards").content["sources"][0]["splits"]["train"]
    train, heldout = (line.split() for line in format_table(tmp_path / "shards")[2:])
    ratio = f"{2600 / record['num_tokens']:.3f}"  # bytes per token; 100 x 26 bytes
    assert train == ["one", "text", "train", "1", "1", f"{record['num_tokens']:,}", "2,600", ratio]
    assert heldout == ["one", "text", "heldout", "1", "0", "0", "0", "-"]


def choose_heldout(share: float, count: int = 4000) -> set[int]:
    rule = HeldoutRule(share)
    hashes = np.array([hash_document(Document("", f"document {i}")) for i in range(count)], np.uint64)
    return set(np.flatnonzero(rule.is_heldout(hashes)).tolist())


def test_larger_heldout_share_extends_smaller() -> None:
    two, ten = choose_heldout(0.02), choose_heldout(0.10)
    assert two < ten
    assert 50 <= len(two) <= 115 and 330 <= len(ten) <= 470  # binomial, 4 standard deviations
    assert choose_heldout(0.0) == set()


@given(st.text(), st.text())
def test_equal_content_gives_equal_hash(a: str, b: str) -> None:
    assert hash_document(Document("x.txt", a)) == hash_document(
        Document("y.jsonl:7", unicodedata.normalize("NFD", a)))
    same = unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)
    assert (hash_document(Document("", a)) == hash_document(Document("", b))) == same


def test_chat_hash_depends_on_roles_and_message_ends() -> None:
    chats = [(("user", "ab"), ("assistant", "c")), (("user", "a"), ("assistant", "bc")),
             (("system", "ab"), ("assistant", "c"))]
    assert len({hash_document(Document("", messages=Conversation.of(*chat).messages)) for chat in chats}) == 3


def test_answers_to_a_prompt_share_the_hash() -> None:
    prompt = (Message("user", "2 + 2?"),)
    pairs = [Document("", messages=prompt, chosen=(Message("assistant", chosen),),
                      rejected=(Message("assistant", "5"),)) for chosen in ("4", "four")]
    rl_prompt = Document("", messages=prompt, awaits_response=True, extra='{"answer": 4}')
    group_members = [Document("", messages=(*prompt, Message("assistant", a)), num_prompt=1) for a in "45"]
    assert len({hash_document(d) for d in (*pairs, rl_prompt, *group_members)}) == 1
    # without the length of a shared prompt, the same messages are chats with different content
    chats = [Document("", messages=d.messages) for d in group_members]
    assert len({hash_document(d) for d in (rl_prompt, *chats)}) == 3


def is_heldout(rule: HeldoutRule, hash_: int) -> bool:
    return bool(rule.is_heldout(np.array([hash_], np.uint64))[0])


def test_small_source_holds_out_smallest_hash() -> None:
    rule = HeldoutRule(1e-9)
    smallest, largest, only = 1 << 60, (1 << 64) - 1, 1 << 61
    rule.add_source(smallest, largest)
    assert is_heldout(rule, smallest) and not is_heldout(rule, largest)
    rule.add_source(only, only)  # a source whose documents are all equal needs them for training
    assert not is_heldout(rule, only)
    assert not rule.keep_for_training(largest), "this document was not held out"
    assert rule.keep_for_training(smallest) and not is_heldout(rule, smallest)
    # hashes below the share are held out too, unless they are kept
    assert rule.keep_for_training(5) and not is_heldout(rule, 5) and is_heldout(rule, 4)
    none = HeldoutRule(0.0)
    none.add_source(1, 2)
    assert not is_heldout(none, 1)
