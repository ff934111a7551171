"""`sov-data pack` and `inspect`: shards from files, the same for any number of workers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from data_prep import pack as pack_module
from data_prep.cli import main
from data_prep.indexed import open_split
from data_prep.pack import Source, batches, pack, parse_sources
from megatron_sov.artifacts import manifest_sha256, read_manifest
from megatron_sov.documents import Document
from megatron_sov.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"Document {i} says: 한국어 {i * i}.\n\nIt ends with <|end|>." for i in range(200)]
    (folder / "web.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (folder / "notes").mkdir()
    for i in range(3):
        (folder / "notes" / f"{i}.md").write_text(f"# Note {i}\n\nfour words of text\n")
    chats = [{"messages": [{"role": "user", "content": f"How much is {i} + 1?"},
                           {"role": "assistant", "content": f"It is {i + 1}."}]} for i in range(120)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


@pytest.fixture(scope="module")
def packed(corpus: Path, tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "shards"
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", str(corpus / "web.jsonl"), "--input",
                 f"mine={corpus / 'notes'}", "--output", str(output), "--heldout", "0.1", "--workers", "1"]) == 0
    return output


def test_every_document_is_found_once_as_its_own_text(packed: Path, corpus: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed / "tokenizer")
    found = [tokenizer.decode(d[:-1]) for split in ("train", "heldout") for d in open_split(packed / "web" / split).documents()]
    texts = [json.loads(line)["text"] for line in (corpus / "web.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(texts)
    in_train = [tokenizer.decode(d[:-1]) for d in open_split(packed / "web/train").documents()]
    assert in_train == [t for t in texts if t in set(in_train)]  # the order of the file is kept


def test_megatron_reads_the_shards_and_the_manifest_counts_them(packed: Path, tokenizers: dict[str, Path], corpus: Path) -> None:
    content = read_manifest(packed, "tokens").content
    assert content["tokenizer_sha256"] == hashlib.sha256((packed / "tokenizer/tokenizer.json").read_bytes()).hexdigest()
    assert (content["vocab_size"], content["eos_id"], content["dtype"], content["format"]) == (384, 2, "uint16", "text")
    assert [s["name"] for s in content["sources"]] == ["web", "mine"]
    for source in content["sources"]:
        for record in source["splits"].values():
            theirs = IndexedDataset(str(packed / record["prefix"]))
            assert len(theirs) == record["num_documents"] > 0
            assert sum(len(theirs[i]) for i in range(len(theirs))) == record["num_tokens"]
            assert all(theirs[i][-1] == 2 and (theirs[i][:-1] >= 64).all() for i in range(len(theirs)))
    web = content["sources"][0]["splits"]
    num_bytes = sum(len(json.loads(line)["text"].encode()) for line in (corpus / "web.jsonl").read_text().splitlines())
    assert web["train"]["num_bytes"] + web["heldout"]["num_bytes"] == num_bytes
    assert 5 <= web["heldout"]["num_documents"] <= 40
    [made_from] = read_manifest(packed).inputs
    assert made_from["kind"] == "tokenizer" and made_from["manifest_sha256"] == manifest_sha256(tokenizers["solar-open"])


def test_two_workers_write_the_same_bytes(packed: Path, corpus: Path, tokenizers: dict[str, Path], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "batches", lambda documents: batches(documents, limit_bytes=500))
    pack(tokenizers["solar-open"], [Source("web", corpus / "web.jsonl"), Source("mine", corpus / "notes")], tmp_path / "two",
         heldout_share=0.1, workers=2)
    assert read_manifest(tmp_path / "two").files == read_manifest(packed).files
    assert read_manifest(tmp_path / "two").content == read_manifest(packed).content


def test_chats_have_sidecars(corpus: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "chats"
    pack(tokenizers["k-exaone"], [Source("chat", corpus / "chat.jsonl")], output, format_="chat")
    content = read_manifest(output).content
    assert content["format"] == "chat" and content["sidecars"] == ["loss", "type"]
    for split in ("train", "heldout"):
        tokens = open_split(output / "chat" / split).tokens
        loss, types = np.fromfile(output / f"chat/{split}.loss", "<f4"), np.fromfile(output / f"chat/{split}.type", np.uint8)
        assert len(loss) == len(types) == len(tokens)
        assert ((loss == 1) == (types == 2)).all() and ((loss == 0) == (types == 1)).all()
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    first = next(open_split(output / "chat/train").documents())
    assert tokenizer.decode(first[loss_of(output, len(first)) == 1]).startswith("It is ")


def loss_of(output: Path, num_tokens: int) -> np.ndarray:
    return np.fromfile(output / "chat/train.loss", "<f4", num_tokens)


def test_sources_are_named_after_files_and_folders(corpus: Path) -> None:
    found = parse_sources([str(corpus / "web.jsonl"), f"{corpus}/notes/", f"x.1={corpus}"])
    assert [s.name for s in found] == ["web", "notes", "x.1"]
    for arguments, rule in ((["a.txt", "b/a.txt=x"], "cannot name a source"), (["a=x", "a=y"], "is given already"),
                            (["tokenizer=x"], "cannot name a source"), (["../=x"], "cannot name a source")):
        with pytest.raises(UserError, match=rule):
            parse_sources(arguments)


def test_batches_keep_order_and_fill_up() -> None:
    documents = [Document("", "x" * n) for n in (3, 4, 10, 1, 1)]
    groups = [([len(d.text) for d in group], size_bytes) for group, size_bytes in batches(documents, 5)]
    assert groups == [([3, 4], 7), ([10], 10), ([1, 1], 2)]


def test_mistakes_cost_one_sentence_and_leave_nothing(corpus: Path, tokenizers: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "blank.txt").write_text("\n \n")
    (data / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    base = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--output", str(tmp_path / "new")]
    mistakes = {
        "blank.txt: holds no text": [str(data / "blank.txt")],
        "bad.jsonl:2: is not valid JSON": [str(data / "bad.jsonl")],
        "none: does not exist": [str(data / "none")],
        "chat.jsonl:1: is a chat, but --format is text": [str(corpus / "chat.jsonl")],
        "web.jsonl:1: is plain text, but --format is chat": [str(corpus / "web.jsonl"), "--format", "chat"],
        "--heldout 1.0: must lie in [0, 1)": [str(corpus / "web.jsonl"), "--heldout", "1"],
        "--workers 0: must be at least 1": [str(corpus / "web.jsonl"), "--workers", "0"],
        "every document was held out": [f"one={data / 'one.txt'}", "--heldout", "0.999999"],
    }
    (data / "one.txt").write_text("one document, almost surely held out")
    for sentence, arguments in mistakes.items():
        assert main([*base, "--input", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_killed_command_leaves_no_worker_and_no_output(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"{i} words in a long file\n\n" for i in range(900_000)))
    command = [sys.executable, "-m", "data_prep.cli", "pack", "--tokenizer", str(tokenizers["solar-open"]), "--input",
               str(tmp_path / "long.txt"), "--output", str(tmp_path / "out"), "--workers", "1"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 30
        while not any(tmp_path.glob(".out.tmp-*/long/train.bin")):
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.05)
        time.sleep(0.5)  # the workers start
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
    assert not (tmp_path / "out").exists()
    (tmp_path / "long.txt").write_text("short")
    pack(tokenizers["solar-open"], [Source("long", tmp_path / "long.txt")], tmp_path / "out", heldout_share=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.txt", "out"]  # what the killed one left is gone


def test_one_document_goes_to_training_and_two_are_shared(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the only document")
    (tmp_path / "two.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    pack(tokenizers["solar-open"], [Source("one", tmp_path / "one.txt"), Source("two", tmp_path / "two.jsonl")], tmp_path / "out",
         heldout_share=1e-6)
    one, two = read_manifest(tmp_path / "out").content["sources"]
    assert [one["splits"][s]["num_documents"] for s in ("train", "heldout")] == [1, 0]
    assert [two["splits"][s]["num_documents"] for s in ("train", "heldout")] == [1, 1]
    assert main(["verify", str(tmp_path / "out")]) == 0
