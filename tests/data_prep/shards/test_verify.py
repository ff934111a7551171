"""`sov-data verify`, `stats` and `sample`."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.cli import main
from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from data_prep.shards.sample import sample_documents
from data_prep.shards.stats import compute_statistics
from data_prep.shards.token_artifact import SIDECARS
from data_prep.shards.verify import verify_shards
from megatron_sov.base.artifacts import FileRecord, format_json, read_manifest
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.shard_files import IndexedWriter, RouteShape

ANSWERS = [f"{i} and {'more ' * (i % 7)}" for i in range(40)]


@pytest.fixture(scope="module")
def chats(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed chats, one for each of ANSWERS, which no test changes."""
    folder = tmp_path_factory.mktemp("stats")
    lines = [{"messages": [{"role": "user", "content": "Go on?"}, {"role": "assistant", "content": a}]}
             for a in ANSWERS]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack_sources(tokenizers["solar-open"], [PackSource("chat", folder / "chat.jsonl")], folder / "out",
                 PackSettings(0.2, RecordReading("chat")))
    return folder / "out"


def rehash(data: Path) -> None:
    """Update the hashes in the manifest, so that only checks of the contents can find the damage."""
    raw = json.loads((data / "manifest.json").read_text())
    raw["files"] = {name: FileRecord.of(data / name) for name in raw["files"]}
    (data / "manifest.json").write_text(format_json(raw | {"sha256": ""}))


def set_token(data: Path, index: int, value: int) -> None:
    tokens = np.memmap(data / "chat/train-00000.bin", "<u2", mode="r+")
    tokens[index] = value
    tokens.flush()


def copy_training_to_heldout(data: Path) -> None:
    """Rewrite the held-out split as a copy of one training document."""
    length = int(np.fromfile(data / "chat/train-00000.idx", "<i4", 1, offset=34)[0])  # after the header
    columns = {suffix: np.fromfile(data / f"chat/train-00000.{suffix}", dtype, length)
               for suffix, dtype in (("bin", "<u2"), ("loss", "<f4"), ("type", "u1"), ("kind", "u1"))}
    with IndexedWriter(data / "chat/heldout-00000", "uint16", SIDECARS) as writer:
        writer.write(np.array([length], np.int32), columns)


def write_values(file: Path, dtype: str, value: int) -> None:
    """Replace every value of a file."""
    np.full(len(np.fromfile(file, dtype)), value, dtype).tofile(file)


def test_sound_shards_pass(chats: Path, read_output: Any) -> None:
    assert read_output("verify", str(chats)).splitlines() == [f"{chats}: sound"]


def test_duplicates_are_counted(tokenizers: dict[str, Path], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "same"}\n{"text": "other"}\n'
                                      '{"text": "same"}\n{"text": "same"}\n')
    pack_sources(tokenizers["solar-open"], [PackSource("a", tmp_path / "a.jsonl")], tmp_path / "out",
                 PackSettings(heldout_share=0))
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "train: 2 of 4 documents repeat an earlier one, token by token"]


@pytest.mark.each(("damage", "message"), [
    (lambda d: set_token(d, 3, 384), "ids reach from 2 to 384, must lie in 0..383"),
    (lambda d: set_token(d, -1, 100), "1 documents do not end with id 2"),
    (copy_training_to_heldout, "1 documents are in both splits"),
    (lambda d: write_values(d / "chat/train-00000.loss", "<f4", 3),
     "train-00000.loss: holds values other than 0.0, 1.0"),
    (lambda d: write_values(d / "chat/train-00000.type", "u1", 9),
     "train-00000.type: holds values other than 0, 1, 2"),
    (lambda d: (d / "chat/train-00000.type").write_bytes(b"\1"), "train-00000.type: has 1 bytes"),
    (lambda d: (d / "chat/train-00000.bin").write_bytes(b""), "train-00000.bin: has 0 bytes, the index says"),
])
def test_damage_with_right_hashes_is_found(chats: Path, tmp_path: Path, damage: Callable[[Path], Any],
                                           message: str) -> None:
    data = tmp_path / "copy"
    shutil.copytree(chats, data)
    damage(data)
    rehash(data)
    assert any(message in problem for problem in verify_shards(data)[0])


def test_wrong_counts_and_hashes_are_found(chats: Path, tmp_path: Path, get_refusal: Any) -> None:
    data = tmp_path / "copy"
    shutil.copytree(chats, data)
    raw = json.loads((data / "manifest.json").read_text())
    raw["content"]["sources"][0]["splits"]["train"]["shards"][0]["num_tokens"] += 1
    raw["content"]["dtype"] = "int32"
    (data / "manifest.json").write_text(format_json(raw | {"sha256": ""}))
    (data / "tokenizer/tokenizer.json").write_text("{}")
    err = get_refusal("verify", str(data))
    num_tokens = read_manifest(chats).content["sources"][0]["splits"]["train"]["shards"][0]["num_tokens"]
    assert f"num_tokens is {num_tokens}, the manifest says {num_tokens + 1}" in err
    assert "ids are uint16, the manifest says int32" in err
    assert "tokenizer/tokenizer.json: has 2 bytes" in err


def test_routes_are_checked_against_shape(chats: Path, tmp_path: Path) -> None:
    data, shape = shutil.copytree(chats, tmp_path / "data"), RouteShape(2, 2, 4)
    raw = json.loads((data / "manifest.json").read_text())
    (source,) = raw["content"]["sources"]
    source |= {"sidecars": [*source["sidecars"], "routes"], "routes": shape.record()}
    for file in (data / "chat").glob("*.bin"):
        rows = shape.build_unrecorded(file.stat().st_size // 2)
        rows[::2] = [3, 1]
        rows.tofile(file.with_suffix(".routes"))
        raw["files"][f"chat/{file.stem}.routes"] = None
    (data / "manifest.json").write_text(json.dumps(raw))
    rehash(data)
    assert verify_shards(data)[0] == []
    routes = data / "chat/train-00000.routes"
    content = bytearray(routes.read_bytes())
    content[2 * shape.bytes_per_token] = 4  # token 2, layer 0: only experts 0 to 3 exist
    for damage, message in (
            (bytes(content), r"from token 0 on, sends token 2 in layer 0 .* to \[4, 1\]; exp"),
            (bytes(content[:-1]), r"has \d+ bytes, \d+ tokens need \d+")):
        routes.write_bytes(damage)
        rehash(data)
        assert re.search(rf"train-00000\.routes: {message}", "\n".join(verify_shards(data)[0]))
    source["routes"]["top_k"] = 5
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"content": raw["content"]}))
    rehash(data)
    assert "source 'chat': routes = " in "\n".join(verify_shards(data)[0])


def test_unreadable_tokenizer_gives_one_sentence(chats: Path, tmp_path: Path, get_refusal: Any) -> None:
    shutil.copytree(chats, tmp_path / "out")
    (tmp_path / "out/tokenizer/tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": [5]}')
    assert "tokenizer.json: cannot be read as a tokenizer (TypeError" in get_refusal(
        "stats", str(tmp_path / "out"))


def test_statistics_equal_transformers(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chats / "tokenizer")
    conversations = [[{"role": "user", "content": "Go on?"}, {"role": "assistant", "content": answer}]
                     for answer in ANSWERS]
    rendered = [[*tokenizer.apply_chat_template(c, tokenize=True, return_dict=False), tokenizer.eos_token_id]
                for c in conversations]
    statistics = compute_statistics(chats)
    chat = statistics["sources"]["chat"]
    assert (chat["num_documents"], chat["num_tokens"]) == (40, sum(map(len, rendered)))
    assert chat["longest_tokens"] == max(map(len, rendered))
    # each chat has two turns
    assert chat["special_tokens"] == {"<|endoftext|>": 40, "<|begin|>": 80, "<|end|>": 80, "<|content|>": 80}
    num_learned = sum(len(tokenizer.encode(answer)) + 1 for answer in ANSWERS)
    assert chat["num_response_tokens"] == num_learned
    assert chat["num_prompt_tokens"] == chat["num_tokens"] - num_learned
    for limit, count in chat["documents_up_to_tokens"].items():
        assert count == sum(limit / 2 < len(ids) <= limit for ids in rendered)
    used = {id_ for ids in rendered for id_ in ids}
    assert statistics["num_unused_ordinary_ids"] == sum(id_ not in used for id_ in range(64, 384))
    assert main(["stats", str(chats)]) == 0
    assert "chat: 40 documents" in capsys.readouterr().out
    assert main(["stats", str(chats), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"]["chat"]["num_tokens"] == chat["num_tokens"]


def test_samples_mark_learned_tokens(chats: Path, get_refusal: Any) -> None:
    lines = sample_documents(chats, "chat", "train", 100, 1000, seed=0)
    headings, texts = lines[::3], lines[1::3]
    assert headings[0].startswith("== chat/train, document 0, ")
    begin = "<|begin|>user<|content|>Go on?<|end|><|begin|>assistant<|content|>"
    assert set(texts) < {f"{begin}⟦{a}<|end|>⟧<|endoftext|>" for a in ANSWERS}
    assert len(set(texts)) == len(texts) > 20
    few = sample_documents(chats, None, "train", 2, 5, seed=1)
    assert len(few) == 6 and all("tokens, the first 5" in h for h in few[::3])
    assert few == sample_documents(chats, None, "train", 2, 5, seed=1)
    assert "has no such source (sources: chat)" in get_refusal("sample", str(chats), "--source", "none")
    for wrong in (["--count", "-1"], ["--max-tokens", "0"]):
        assert f"{wrong[0]} {wrong[1]}: must be at least 1" in get_refusal("sample", str(chats), *wrong)


def test_samples_name_both_sides_of_a_preference(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}\n')
    pack_sources(tokenizers["k-exaone"], [PackSource("p", tmp_path / "p.jsonl")], tmp_path / "out",
                 PackSettings(0, RecordReading("preference")))
    samples = sample_documents(tmp_path / "out", None, "train", 9, 100, seed=0)
    assert "document 0, chosen" in samples[0] and "⟦Blue.<|endofturn|>⟧" in samples[1]
    assert "document 1, rejected" in samples[3] and "⟦Green.<|endofturn|>⟧" in samples[4]
