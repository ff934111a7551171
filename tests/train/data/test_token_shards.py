"""Token shards, sources and columns: valid reads, and refusal of damaged or mismatched data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.shard_files import pack_flags
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import parse_data_paths
from megatron_sov.train.data.sources import describe_inputs, open_sources, tokenizer_folder
from megatron_sov.train.data.token_shards import ShardChain, TokenShard


def write_shard(prefix: Path, documents: list[list[int]]) -> None:
    """Write Megatron's .bin and .idx files with uint16 tokens (dtype code 8)."""
    lengths = np.array([len(d) for d in documents], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64) * 2
    prefix.with_suffix(".bin").write_bytes(np.array([t for d in documents for t in d], np.uint16).tobytes())
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + np.array([1], np.uint64).tobytes() + bytes([8])
        + np.array([len(lengths), len(lengths) + 1], np.uint64).tobytes() + lengths.tobytes()
        + starts.tobytes() + np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def test_an_id_outside_of_the_vocabulary_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """With tensor parallelism, Megatron-Core would silently embed such an id as a row of zeros."""
    write_shard(tmp_path / "a", [[1, 2, 3], [4, 5, 9, 6]])
    shard = TokenShard(tmp_path / "a", 9)
    assert shard.tokens(0, 0, 3).tolist() == [1, 2, 3] and shard.tokens(1, 3, 1).tolist() == [6]
    assert shard.tokens(1, 2, 0).tolist() == []
    with pytest.raises(UserError, match=r"a\.bin: document 1"):
        shard.tokens(1, 1, 3)
    assert TokenShard(tmp_path / "a", 10).tokens(1, 2, 1).tolist() == [9]


def test_ids_are_checked_against_the_vocabulary_of_the_tokenizer(packed_data: Any, tmp_path: Path) -> None:
    text = shutil.copytree(packed_data.text, tmp_path / "text")
    (damaged,) = (text / "even").glob("train-*.bin")
    ids = np.fromfile(damaged, np.uint16)
    ids[0] = 368  # smaller than the model's vocabulary of 400 ids, but not in the tokenizer, which has 368
    ids.tofile(damaged)
    even, odd = (s.open_split("train") for s in open_sources({str(text): 1.0}, 400))
    assert odd.tokens(0, 0, 1)[0] < 368
    with pytest.raises(UserError, match="document 0 has token"):
        even.tokens(0, 0, 1)


def test_a_negative_id_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1, 2]])  # 4 bytes, rewritten below as one id of 32 bits
    idx = bytearray((tmp_path / "a.idx").read_bytes())
    idx[17], idx[34] = 4, 1  # dtype code 4 (int32), and length 1 of document 0
    (tmp_path / "a.idx").write_bytes(bytes(idx))
    (tmp_path / "a.bin").write_bytes(np.array([-5], np.int32).tobytes())
    with pytest.raises(UserError, match="document 0 has token"):
        TokenShard(tmp_path / "a", 9).tokens(0, 0, 1)


@pytest.mark.each(("suffix", "damage", "message"), [
    (".bin", lambda b: b[:-2], "a.bin: has 8 bytes, its index requires 10"),
    (".loss", lambda b: b + b"1234", "a.loss: has 24 bytes, its index requires 20"),
    (".idx", lambda b: b"PK" + b[2:], "a.idx: is not a Megatron index"),
    (".idx", lambda b: b[:40], "a: cannot be read as a token shard"),
    (".idx", lambda b: b[:17] + bytes([99]) + b[18:], "a: cannot be read as a token shard"),
    (".bin", None, "a: cannot be read as a token shard"),
])
def test_a_damaged_shard_is_refused(tmp_path: Path, suffix: str, damage, message: str) -> None:
    write_shard(tmp_path / "a", [[1, 2], [3, 4, 5]])
    (tmp_path / "a.loss").write_bytes(np.ones(5, np.float32).tobytes())
    file = tmp_path / f"a{suffix}"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        TokenShard(tmp_path / "a")


def test_a_document_beyond_the_end_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1, 2], [3, 4, 5]])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[34:38] = np.int32(9).tobytes()  # length of document 0; the file has 5 tokens
    (tmp_path / "a.idx").write_bytes(content)
    shard = TokenShard(tmp_path / "a")
    with pytest.raises(UserError, match=r"a\.idx: document 0"):
        shard.tokens(0, 0, 9)


def write_artifact(path: Path, names: dict[str, int], *, tokenizer: str = "t" * 64, vocab_size: int = 50,
                   format_: str = "text", tokens: dict[str, int] | None = None,
                   indent: int | None = None) -> str:
    """Write a token artifact, and return its path.

    Args:
        path: the artifact.
        names: source -> number of documents, each with 2 tokens.
        tokenizer: digest in the manifest.
        vocab_size, format_: recorded in the manifest.
        tokens: vocabulary of the tokenizer.json.
        indent: of the tokenizer.json.
    """
    with create_artifact(path, "tokens") as artifact:
        sources = []
        for name, count in names.items():
            write_shard(artifact.path / name, [[1, 2]] * count)
            train = {"prefix": name, "shards": [{"prefix": name}], "num_tokens": 2 * count}
            sources.append({"name": name, "format": format_, "splits": {"train": train}})
        (artifact.path / "tokenizer").mkdir()
        (artifact.path / "tokenizer" / "tokenizer.json").write_text(json.dumps(
            {"model": {"type": "BPE", "vocab": tokens or {"a": 1}, "merges": []}}, indent=indent))
        artifact.content = {"content_version": 2, "tokenizer_sha256": tokenizer, "vocab_size": vocab_size,
                            "format": format_, "sources": sources}
    return str(path)


def test_sources_share_by_folder_weight_then_by_tokens(tmp_path: Path) -> None:
    paths = {write_artifact(tmp_path / "a", {"web": 3, "code": 1}): 3.0,
             write_artifact(tmp_path / "b", {"chat": 9}, format_="chat"): 1.0}
    sources = open_sources(paths, 64)
    # folder a has 3 of 4, of which web has 3 of 4 documents
    assert {s.name: s.share for s in sources} == {"web": 0.5625, "code": 0.1875, "chat": 0.25}
    assert [s.name for s in sources if s.is_chat] == ["chat"]
    assert sources[0].open_split("train").tokens(2, 0, 2).tolist() == [1, 2]
    assert tokenizer_folder(sources) == tmp_path / "a" / "tokenizer"
    assert [p["path"] for p in describe_inputs(sources)] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_name_before_the_folder_renames_its_sources(tmp_path: Path) -> None:
    web, code = (write_artifact(tmp_path / name, {"train": 3}) for name in ("a", "b"))
    two_sources = write_artifact(tmp_path / "c=d", {"train": 1, "test": 1})
    sources = open_sources({f"web={web}": 1, f"code={code}": 1, f"rest={two_sources}": 1}, 64)
    assert [s.name for s in sources] == ["web", "code", "rest-train", "rest-test"]
    assert sources[1].open_split("train").tokens(2, 0, 2).tolist() == [1, 2]
    assert sources[1].artifact == tmp_path / "b"
    assert [s.name for s in open_sources({two_sources: 1, f"x={web}": 1}, 64)] == ["train", "test", "x"]
    assert parse_data_paths([f"web={web}:2", f"code={code}"]) == {f"web={web}": 2.0, f"code={code}": 1.0}
    for data, message in (([f"w b={web}"], "must be NAME=DIR; use letters"),
                          ([f"={web}"], "must be NAME=DIR"), ([f"a={web}", f"b={web}"], "is given twice")):
        with pytest.raises(UserError, match=message):
            parse_data_paths(data)


def test_data_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    web = write_artifact(tmp_path / "a", {"web": 3})
    with pytest.raises(UserError, match=r"data\.paths is empty"):
        open_sources({}, 64)
    with pytest.raises(UserError, match="'b' here, 'a' there"):
        other = write_artifact(tmp_path / "other", {"x": 1}, tokenizer="u" * 64, tokens={"b": 1})
        open_sources({web: 1, other: 1}, 64)
    reformatted = write_artifact(tmp_path / "copied", {"y": 1}, tokenizer="u" * 64, indent=2)
    assert [s.name for s in open_sources({web: 1, f"z={reformatted}": 1}, 64)] == ["web", "z"], (
        "the same tokenizer in another JSON layout")
    with pytest.raises(UserError, match="'web': is in --data"):
        open_sources({web: 1, write_artifact(tmp_path / "same", {"web": 1}): 1}, 64)
    with pytest.raises(UserError, match=r"model\.vocab_size = 32"):
        open_sources({web: 1}, 32)
    with pytest.raises(UserError, match="be positive"):
        open_sources({web: 0}, 64)
    with pytest.raises(UserError, match="holds no training tokens"):
        open_sources({write_artifact(tmp_path / "none", {"x": 0}): 1}, 64)


def test_columns_are_sidecars_that_the_manifest_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1, 2], [3, 4, 5]])
    (tmp_path / "a.score").write_bytes(np.float32([-1, 2, np.nan, 4, 5.5]).tobytes())
    shard = ShardChain([tmp_path / "a"], columns=("score",))
    assert shard.columns == ("score",) and shard.is_plain
    assert shard.column("score", 1, 1, 2).tolist() == [4, 5.5]
    with pytest.raises(UserError, match=r"a\.score: document 1"):
        shard.column("score", 1, 0, 2)
    with pytest.raises(UserError, match=r"token shard .*a\.advantage"):
        TokenShard(tmp_path / "a", columns=("advantage",))
    (tmp_path / "a.score").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"a\.score: has 4 bytes"):
        TokenShard(tmp_path / "a", columns=("score",))


def test_token_bits_and_document_values_replace_columns(tmp_path: Path) -> None:
    """Bits per token (.written) replace weights and types; NAME.documents has one value per document."""
    lengths = [3, 9, 1]
    write_shard(tmp_path / "a", [list(range(n)) for n in lengths])
    is_written = np.random.default_rng(0).random(sum(lengths)) < 0.5
    is_written[3:5] = True, False
    (tmp_path / "a.written").write_bytes(pack_flags(is_written).tobytes())
    (tmp_path / "a.advantage.documents").write_bytes(np.float32([0.1, -2, np.inf]).tobytes())
    shard = ShardChain([tmp_path / "a"], columns=("advantage.documents",))
    assert shard.columns == ("advantage",) and not shard.is_plain
    for document, first in ((0, 0), (1, 3)):
        for start in range(lengths[document]):
            expected = is_written[first + start:first + lengths[document]]
            span = document, start, len(expected)
            assert shard.loss_weights(*span).tolist() == expected.astype(float).tolist()
            assert shard.types(*span).tolist() == np.where(expected, 2, 1).tolist()
            value = np.float32([0.1, -2][document])
            assert shard.column("advantage", *span).tolist() == np.where(expected, value, 0).tolist()
    is_written[:] = True
    (tmp_path / "a.written").write_bytes(pack_flags(is_written).tobytes())
    with pytest.raises(UserError, match=r"a\.advantage\.documents: document 2"):
        TokenShard(tmp_path / "a", columns=("advantage.documents",)).column("advantage", 2, 0, 1)
    (tmp_path / "a.written").write_bytes(b"1")
    with pytest.raises(UserError, match=r"a\.written: has 1 bytes"):
        TokenShard(tmp_path / "a")


# A split of several shards (`ShardChain`) has the same documents as the same split in one shard.


@pytest.fixture(scope="module")
def packed_chats(token_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with the same chats in one shard, and in many."""
    folder = tmp_path_factory.mktemp("chain")
    lines = [{"messages": [{"role": "user", "content": f"{i}?"},
                           {"role": "assistant", "content": f"{i} " * (i % 9 + 1)}]}
             for i in range(100)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = token_shards.parent / "tokenizer"
    for name, shard_tokens in (("one", 10**9), ("many", 300)):
        pack_sources(tokenizer, [PackSource("chat", folder / "chat.jsonl")], folder / name,
                     PackSettings(0.1, RecordReading("chat"), shard_tokens=shard_tokens))
    return folder / "one", folder / "many"


def test_a_chain_equals_one_shard(packed_chats: tuple[Path, Path]) -> None:
    [one_shard], [many_shards] = (open_sources({str(path): 1.0}, 2000) for path in packed_chats)
    assert len(one_shard.prefixes["train"]) == 1 and len(many_shards.prefixes["train"]) > 5
    assert (one_shard.num_tokens, one_shard.share) == (many_shards.num_tokens, many_shards.share)
    for split in ("train", "heldout"):
        single, chain = one_shard.open_split(split), many_shards.open_split(split)
        lengths = list(single.lengths)
        assert list(chain.lengths) == [chain.lengths[i] for i in range(len(chain.lengths))] == lengths
        for document, length in enumerate(chain.lengths):
            for column in ("tokens", "loss_weights", "types"):
                values, expected = (getattr(documents, column)(document, 1, length - 1)
                                    for documents in (chain, single))
                assert values.dtype == expected.dtype and np.array_equal(values, expected)
        for invalid_index in (-1, len(chain.lengths)):
            with pytest.raises(IndexError, match=f"document {invalid_index} of {len(chain.lengths)}"):
                chain.tokens(invalid_index, 0, 1)


def test_other_layouts_and_formats_are_refused(packed_chats: tuple[Path, Path], tmp_path: Path) -> None:
    raw = json.loads((packed_chats[0] / "manifest.json").read_text())
    del raw["content"]["content_version"]
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"sha256": ""}))
    with pytest.raises(UserError, match="version reads layout 2"):
        open_sources({str(tmp_path): 1.0}, 2000)
    with pytest.raises(UserError, match="learns from preference; `megatron-sov"):
        open_sources({str(packed_chats[0]): 1.0}, 2000, formats=("preference",))


# Opens all shards under given limits (soft, hard) on open files.
LIMITED_PROGRAM = """
import resource, sys
from pathlib import Path
from megatron_sov.train.data.token_shards import ShardChain
from megatron_sov.base.errors import UserError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
try:
    shards = sorted({p.with_suffix('') for p in Path(sys.argv[1]).glob('train-*.idx')})
    print(f"{len(ShardChain(shards).lengths)} documents")
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize(("limits", "message"), [
    ((16, 4096), "93 documents"),
    ((16, 16), "this process may not open more than 16 files; raise `ulimit -n`, or pack into larger shards"),
])
def test_more_shards_than_open_files_are_allowed(packed_chats: tuple[Path, Path], limits: tuple[int, int],
                                                 message: str) -> None:
    """Each mapped shard keeps a file descriptor, so the soft limit on open files is raised up to
    the hard limit."""
    argv = [sys.executable, "-c", LIMITED_PROGRAM, str(packed_chats[1] / "chat"), *map(str, limits)]
    completed = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert message in completed.stdout
