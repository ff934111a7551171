"""`sov-data adopt`: pairs from Megatron-LM's builder give the same artifact as `sov-data pack`."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import cli
from data_prep.shards.token_artifact import iter_shards, read_tokens_manifest
from megatron_sov.base.documents.shard_files import HEADER


@pytest.fixture(scope="module")
def tokenizer(token_shards: Path) -> Path:
    return token_shards.parent / "tokenizer"


@pytest.fixture(scope="module")
def texts(token_shards: Path) -> list[str]:
    lines = (token_shards.parent / "first.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines][:200]


def encode_texts(tokenizer: Path, texts: list[str]) -> tuple[list[list[int]], int]:
    """Return the token ids of each text without eos, and the id of eos."""
    from data_prep.shards.encode import Encoder

    encoder = Encoder(tokenizer)
    return [encoder.plain.encode(text, add_special_tokens=False).ids for text in texts], encoder.eos_id


def build_pair(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16) -> Path:
    """Write PREFIX.bin and PREFIX.idx with Megatron-Core's builder, as its preprocess_data does.

    Args:
        documents: ids of the tokens, by document and sequence (sentence) of it.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.tensor([id_ for ids in sequences for id_ in ids]),
                             [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def pair(tokenizer: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids, eos = encode_texts(tokenizer, texts)
    return build_pair(tmp_path_factory.mktemp("theirs") / "corpus_text_document",
                      [[[*document, eos]] for document in ids])


def read_shards(data: Path) -> dict[str, bytes]:
    """Return `SPLIT.bin` and `SPLIT.idx` -> content, for data with one shard in a split."""
    return {f"{shard.split}.{suffix}": Path(f"{shard.prefix}.{suffix}").read_bytes()
            for shard in iter_shards(data, read_tokens_manifest(data).content) for suffix in ("bin", "idx")}


def test_adopt_writes_the_same_artifact_as_pack(tokenizer: Path, pair: Path, texts: list[str],
                                                tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--tokenizer", str(tokenizer), "--heldout", "0.1", "--output"]
    assert cli.main(["pack", "--input", str(tmp_path / "corpus.jsonl"), *options, str(tmp_path / "packed"),
                     "--workers", "1"]) == 0
    assert cli.main(["adopt", f"corpus={pair}.bin", *options, str(tmp_path / "adopted")]) == 0
    assert read_shards(tmp_path / "adopted") == read_shards(tmp_path / "packed")
    packed, adopted = (read_tokens_manifest(tmp_path / name).content for name in ("packed", "adopted"))
    assert adopted["sources"][0]["splits"] == packed["sources"][0]["splits"]
    assert {name: adopted[name] for name in packed if name != "sources"} == {
        name: packed[name] for name in packed if name != "sources"}
    for command in ("verify", "inspect", "sample"):
        assert cli.main([command, str(tmp_path / "adopted")]) == 0
    # an existing output is refused before the pair, which does not exist, is opened
    assert cli.main(["adopt", "none", *options, str(tmp_path / "adopted")]) == 2
    assert "adopted: already exists" in capsys.readouterr().err


def test_adopt_links_files_and_joins_sentences(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    ids, eos = encode_texts(tokenizer, texts[:20])
    halves = [[document[:3], [*document[3:], eos]] for document in ids]
    halves.insert(5, [[]])  # a document without tokens
    halves.append([[0, eos]])
    real = build_pair(tmp_path / "real", halves, np.int32)
    prefix = tmp_path / "split_sentences"  # symbolic links, as in a download cache
    for ending in (".bin", ".idx"):
        Path(f"{prefix}{ending}").symlink_to(f"{real}{ending}")
    assert cli.main(["adopt", str(prefix), "--tokenizer", str(tokenizer), "--heldout", "0", "--link",
                     "--output", str(tmp_path / "linked")]) == 0
    shard = next(iter_shards(tmp_path / "linked", read_tokens_manifest(tmp_path / "linked").content))
    assert Path(f"{shard.prefix}.bin").samefile(f"{real}.bin")
    assert not Path(f"{shard.prefix}.bin").is_symlink()
    assert [document.tolist() for document in shard.open().documents()] == [[*d, eos] for d in [*ids, [0]]]
    assert cli.main(["verify", str(tmp_path / "linked")]) == 0


def change_index(pair: Path, folder: Path, offset: int, raw: bytes) -> Path:
    """Copy a pair to FOLDER/bad.bin and bad.idx, with the bytes `raw` at an offset of the index."""
    whole = bytearray(Path(f"{pair}.idx").read_bytes())
    whole[offset:offset + len(raw)] = raw
    Path(f"{folder}/bad.idx").write_bytes(whole)
    Path(f"{folder}/bad.bin").write_bytes(Path(f"{pair}.bin").read_bytes())
    return folder / "bad"


# After the header, the index has for 200 sequences their lengths (4 bytes each), their offsets (8 bytes
# each), and then the document bounds (8 bytes each).
@pytest.mark.each(("offset", "raw", "message"), [
    (0, b"nothing", "is no index of Megatron's indexed datasets"),
    (18, struct.pack("<Q", 7), "which does not fit its 7 sequences"),
    (HEADER.size, struct.pack("<i", -5), "sequence 0 has -5 tokens"),
    (HEADER.size, struct.pack("<i", 1), "sequence 1 begins at byte"),
    (HEADER.size + 12 * 200 + 8, struct.pack("<q", 300), "document bounds do not go from 0"),
    (HEADER.size + 12 * 200 + 8, struct.pack("<3q", (1 << 63) - 1, -1 << 63, -1),
     "document bounds do not go from 0"),
])
def test_adopt_rejects_damaged_index(offset: int, raw: bytes, message: str, pair: Path, tokenizer: Path,
                                     tmp_path: Path, get_refusal: Any) -> None:
    bad, out = change_index(pair, tmp_path, offset, raw), tmp_path / "out"
    assert message in get_refusal("adopt", str(bad), "--tokenizer", str(tokenizer), "--output", str(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.bin", "bad.idx"]


def test_adopt_rejects_another_tokenizer(tokenizer: Path, texts: list[str], tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    ids, eos = encode_texts(tokenizer, texts[:50])

    def get_adopt_error(name: str, documents: list[list[int]], *more: str) -> str:
        """Adopt a pair of documents with one sequence each, and return the error."""
        prefix = build_pair(tmp_path / name, [[document] for document in documents])
        assert cli.main(["adopt", str(prefix), "--tokenizer", str(tokenizer), "--output",
                         str(tmp_path / "out"), *more]) == 2
        return capsys.readouterr().err

    assert "has id 1024, and the tokenizer's ids are 0 to 1023" in get_adopt_error(
        "large", [[*ids[0], 1024, eos], *ids[1:]])
    # ids from 293 to 992: all exist, and mean other text than with the right tokenizer
    shifted = [[*((id_ - 300) % 700 + 300 - 7 for id_ in document), eos] for document in ids]
    assert "is of another tokenizer" in get_adopt_error("shifted", shifted)
    assert "every document ends with id 5" in get_adopt_error(
        "other-eod", [[*document, 5] for document in ids])
    assert "1 of 50 documents do not end with the tokenizer's eos" in get_adopt_error(
        "one-without", [[*document, eos] for document in ids[:-1]] + [ids[-1]])
    assert "--link: keeps the files as they are" in get_adopt_error("ok", ids, "--link")
    assert not (tmp_path / "out").exists()
