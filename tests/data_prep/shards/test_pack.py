"""`sov-data pack` and `inspect`: shards from files, the same for any number of workers."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from transformers import AutoTokenizer

from data_prep.cli import main
from data_prep.shards.pack import PackSettings, PackSource, parse_sources
from data_prep.shards.pack_run import pack_sources
from data_prep.shards.token_artifact import iter_shards, open_split
from megatron_sov.base.artifacts import FileRecord, manifest_sha256, read_manifest
from megatron_sov.base.documents import RecordReading, files
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.chat.marks import KIND_ANSWER, KIND_NONE
from megatron_sov.work.progress.journal import work_folder
from tests.waiting import wait_until


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
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", str(corpus / "web.jsonl"),
                 "--input", f"mine={corpus / 'notes'}", "--output", str(output), "--heldout", "0.1",
                 "--workers", "1"]) == 0
    return output


def test_every_document_is_packed_once(packed: Path, corpus: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed / "tokenizer")
    found = [tokenizer.decode(ids[:-1]) for split in ("train", "heldout")  # without the end of the document
             for ids in open_split(packed / f"web/{split}-00000").documents()]
    texts = [json.loads(line)["text"] for line in (corpus / "web.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(texts)
    in_train = [tokenizer.decode(ids[:-1]) for ids in open_split(packed / "web/train-00000").documents()]
    assert in_train == [text for text in texts if text in set(in_train)]  # the order of the file is kept


def test_megatron_reads_shards_with_counts_of_manifest(packed: Path, tokenizers: dict[str, Path],
                                                       corpus: Path) -> None:
    content = read_manifest(packed, "tokens").content
    assert (content["tokenizer_sha256"]
            == hashlib.sha256((packed / "tokenizer/tokenizer.json").read_bytes()).hexdigest())
    assert ((content["vocab_size"], content["eos_id"], content["dtype"], content["bos_id"])
            == (384, 2, "uint16", None))
    assert [s["name"] for s in content["sources"]] == ["web", "mine"]
    for source in content["sources"]:
        assert source["format"] == "text"
        for split in source["splits"].values():
            [record] = split["shards"]
            theirs = IndexedDataset(str(packed / record["prefix"]))
            assert len(theirs) == record["num_documents"] > 0
            assert sum(len(theirs[i]) for i in range(len(theirs))) == record["num_tokens"]
            # A document ends with eos, and has no other special token (an id below 64).
            assert all(theirs[i][-1] == 2 and (theirs[i][:-1] >= 64).all() for i in range(len(theirs)))
    web = content["sources"][0]["splits"]
    num_bytes = sum(len(json.loads(line)["text"].encode())
                    for line in (corpus / "web.jsonl").read_text().splitlines())
    assert web["train"]["num_bytes"] + web["heldout"]["num_bytes"] == num_bytes
    assert 5 <= web["heldout"]["num_documents"] <= 40  # about 10 % of 200
    [made_from] = read_manifest(packed).inputs
    assert made_from["kind"] == "tokenizer"
    assert made_from["manifest_sha256"] == manifest_sha256(tokenizers["solar-open"])


@pytest.mark.deep
def test_bytes_do_not_depend_on_workers_units_or_compression(packed: Path, corpus: Path,
                                                             tokenizers: dict[str, Path], tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.plan_units, "__defaults__", (500,))
    monkeypatch.setattr(files.iter_spans, "__defaults__", (500,))
    web = (corpus / "web.jsonl").read_bytes()
    (tmp_path / "gz.jsonl.gz").write_bytes(gzip.compress(web[:4000]) + gzip.compress(web[4000:]))
    (tmp_path / "zst.jsonl.zst").write_bytes(zstandard.compress(web[:4000]) + zstandard.compress(web[4000:]))
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in web.splitlines()]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=30)
    sources = [PackSource("web", corpus / "web.jsonl"), PackSource("mine", corpus / "notes"),
               PackSource("gz", tmp_path / "gz.jsonl.gz"), PackSource("zst", tmp_path / "zst.jsonl.zst"),
               PackSource("rows", tmp_path / "rows.parquet")]
    pack_sources(tokenizers["solar-open"], sources, tmp_path / "two", PackSettings(heldout_share=0.1),
                 workers=2)
    ours, theirs = read_manifest(tmp_path / "two").files, read_manifest(packed).files
    for name, record in theirs.items():
        assert ours[name] == record
        if name.startswith("web/"):
            assert {ours[name.replace("web", other)] for other in ("gz", "zst", "rows")} == {record}


def test_chats_have_sidecars(corpus: Path, tokenizers: dict[str, Path], tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "chats"
    pack_sources(tokenizers["k-exaone"], [PackSource("chat", corpus / "chat.jsonl")], output,
                 PackSettings(reading=RecordReading("chat")))
    assert "warning: " not in capsys.readouterr().err, "prompts are equal in training and generation"
    [source] = read_manifest(output).content["sources"]
    assert source["format"] == "chat" and source["sidecars"] == ["loss", "type", "kind"]
    for split in ("train", "heldout"):
        prefix = output / f"chat/{split}-00000"
        tokens = open_split(prefix).tokens
        loss, types = np.fromfile(f"{prefix}.loss", "<f4"), np.fromfile(f"{prefix}.type", np.uint8)
        assert len(loss) == len(types) == len(tokens)
        assert ((loss == 1) == (types == 2)).all() and ((loss == 0) == (types == 1)).all()
        kinds = np.fromfile(f"{prefix}.kind", np.uint8)
        assert np.array_equal(kinds, np.where(types == 2, KIND_ANSWER, KIND_NONE))
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    first = next(open_split(output / "chat/train-00000").documents())
    is_learned = np.fromfile(output / "chat/train-00000.loss", "<f4", len(first)) == 1
    assert tokenizer.decode(first[is_learned]).startswith("It is ")


def test_preference_pairs_stay_in_one_split_and_shard(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"How much is {i // 2} + 1?", "chosen": f"It is {i // 2 + 1}.",
             "rejected": f"No idea {i}."}
            for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = PackSettings(0.2, RecordReading("preference"), shard_tokens=300)
    pack_sources(tokenizers["solar-open"], [PackSource("pairs", tmp_path / "pairs.jsonl")], tmp_path / "out",
                 settings)
    [source] = read_manifest(tmp_path / "out").content["sources"]
    assert source["group_documents"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    prompts: dict[str, set[str]] = {}
    found = []
    for shard in iter_shards(tmp_path / "out", {"sources": [source]}):
        texts = [tokenizer.decode(d) for d in shard.open().documents()]
        assert len(texts) % 2 == 0
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            prompt = re.findall(r"How much is \d+ \+ 1\?", chosen + rejected)
            assert prompt[0] == prompt[1] and "It is" in chosen and "No idea" in rejected
            prompts.setdefault(prompt[0], set()).add(shard.split)
            found.append(rejected)
    assert len(set(found)) == 60 and all(len(splits) == 1 for splits in prompts.values())
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_prompts_keep_reward_fields(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "answer": i + 1} for i in range(30)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack_sources(tokenizers["solar-open"], [PackSource("asked", tmp_path / "asked.jsonl")], tmp_path / "out",
                 PackSettings(0.2, RecordReading("prompt"), shard_tokens=200))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    answers = []
    for shard in iter_shards(tmp_path / "out", read_manifest(tmp_path / "out").content):
        lines = [json.loads(line) for line in Path(f"{shard.prefix}.extra.jsonl").read_text().splitlines()]
        for ids, line in zip(shard.open().documents(), lines, strict=True):
            assert f"{line['answer'] - 1} + 1?" in tokenizer.decode(ids) and ids[-1] != 2
            answers.append(line["answer"])
    assert sorted(answers) == list(range(1, 31))
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_sources_are_named_after_files_and_folders(corpus: Path) -> None:
    sources = parse_sources([str(corpus / "web.jsonl"), f"{corpus}/notes/", f"x.1={corpus}",
                             "my texts.jsonl"])
    assert [s.name for s in sources] == ["web", "notes", "x.1", "my-texts.jsonl"]
    for arguments, rule in ((["a.txt", "b/a.txt=x"], "cannot name a source"),
                            (["a=x", "a=y"], "is given already"), (["tokenizer=x"], "cannot name a source"),
                            (["../=x"], "cannot name a source"), (["web="], "names no file or folder"),
                            ([""], "names no file or folder")):
        with pytest.raises(UserError, match=rule):
            parse_sources(arguments)


def test_the_output_of_a_pipeline_is_packed_from_its_text_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "corpus"}')
    with pytest.raises(UserError, match="is the output of `sov-data run`") as raised:
        parse_sources([f"web={tmp_path}"])
    assert raised.value.fix == Fix(words={str(tmp_path): f"{tmp_path}/text"})


def test_wrong_input_gives_one_sentence_and_no_output(corpus: Path, tokenizers: dict[str, Path],
                                                      tmp_path: Path, get_refusal: Any) -> None:
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
        "--heldout 1: must be below 1": [str(corpus / "web.jsonl"), "--heldout", "1"],
        "--workers 0: must be at least 1": [str(corpus / "web.jsonl"), "--workers", "0"],
        "--shard-tokens 0: must be at least 1": [str(corpus / "web.jsonl"), "--shard-tokens", "0"],
        "--max-document-bytes 0: must be at least 1": [str(corpus / "web.jsonl"),
                                                      "--max-document-bytes", "0"],
        "has no string field 'body'": [str(corpus / "web.jsonl"), "--text-field", "body"],
    }
    for sentence, arguments in mistakes.items():
        assert sentence in get_refusal(*base, "--input", *arguments)
    assert not (tmp_path / "new").exists()
    # encoded units are reused by the next attempt
    assert {p.name for p in tmp_path.iterdir()} == {"data", ".new.work"}
    assert main([*base, "--input", str(corpus / "web.jsonl")]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"data", "new"}


def test_a_file_without_a_good_record_leaves_no_work(corpus: Path, tokenizers: dict[str, Path],
                                                     tmp_path: Path) -> None:
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", str(corpus / "chat.jsonl"),
                 "--output", str(tmp_path / "new")]) == 2
    assert list(tmp_path.glob(".new*")) == []


def test_tiny_source_keeps_a_training_document(tokenizers: dict[str, Path], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """A source with a single document must not fail a run that has packed other sources for hours."""
    (tmp_path / "one.jsonl").write_text('{"text": "almost surely held out", "part": "c"}')
    rows = [{"text": f"number {i}", "part": "a" if i < 3 else "b"} for i in range(4)]
    (tmp_path / "parts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--output", str(tmp_path / "new"),
               "--input", str(tmp_path / "one.jsonl"), str(tmp_path / "parts.jsonl"), "--bucket-by", "part",
               "--workers", "1"]
    assert main([*command, "--heldout", "0.999999"]) == 0
    stderr = capsys.readouterr().err
    assert stderr.count("one of them is kept for training") == 3 and "parts-b: every document" in stderr
    content = read_manifest(tmp_path / "new", "tokens").content
    assert {s["name"]: [s["splits"][split]["num_documents"] for split in ("train", "heldout")]
            for s in content["sources"]} == {"one-c": [1, 0], "parts-a": [1, 2], "parts-b": [1, 0]}
    assert len(content["heldout"]["kept"]) == 3


UNIT_BYTES = 25_000
STOPS = f"""
import sys, time
from data_prep.shards import pack_run
from data_prep.cli import main
from megatron_sov.base.documents import files

files.plan_units.__defaults__ = ({UNIT_BYTES},)
encode_units = pack_run.encode_units
def stops_after_one(*arguments):
    for record in encode_units(*arguments):
        yield record
        time.sleep(600)
pack_run.encode_units = stops_after_one
main(sys.argv[1:])
"""
"""Program that runs `sov-data ARGUMENTS` and blocks after the first unit; its workers finish their units."""


def start_packing(tokenizer: Path, text: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", STOPS, "pack", "--tokenizer", str(tokenizer), "--input",
               str(text), "--output", str(output), "--workers", str(workers)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[3], stderr=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL)


def complete_units(output: Path) -> dict[Path, int]:
    """Return folder -> modification time of each complete unit of a running command."""
    return {p.parent: p.stat().st_mtime_ns for p in work_folder(output).glob("*/*/record.json")
            if ".tmp-" not in p.parent.name}


@pytest.mark.deep
def test_killed_pack_leaves_no_worker_and_resumes(tokenizers: dict[str, Path], tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str],
                                                  ends: Callable[[int], bool],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.plan_units, "__defaults__", (UNIT_BYTES,))
    output, text = tmp_path / "out", tmp_path / "long.txt"
    text.write_text("".join(f"{i} words in a long file\n\n" for i in range(80_000)))
    num_units = len(list(files.plan_units([text])))
    with start_packing(tokenizers["solar-open"], text, output, 2) as process:
        wait_until(lambda: complete_units(output), lambda: process.poll() is not None)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert workers and all(ends(worker.pid) for worker in workers)
    assert not output.exists()
    units = complete_units(output)
    pack_sources(tokenizers["solar-open"], [PackSource("long", text)], output)
    assert 1 <= len(units) < num_units
    assert f"{len(units)} of {num_units} units were complete from before" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.txt", "out"]
    pack_sources(tokenizers["solar-open"], [PackSource("long", text)], tmp_path / "undisturbed")
    assert read_manifest(output).files == read_manifest(tmp_path / "undisturbed").files


BAD_LINES = {
    '{"id": 1, "text": "cut off': ("json", 2), '["list"]': ("json", 3), '{"id": 2}': ("fields", 4),
    '{"id": 3, "text": 5}': ("fields", 5),
    '{"id": 4, "text": " \\n"}': ("empty", 6), '{"id": 5, "text": "' + "x" * 600 + '"}': ("too_long", 7),
    '{"id": 6, "text": "\\udc00"}': ("utf8", 8), '{"id": "first", "text": "again"}': ("duplicate_id", 9)}


def test_quarantine_lists_bad_records_and_keeps_good_ones(tokenizers: dict[str, Path], tmp_path: Path,
                                                          capsys: Any, read_output: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = ['{"id": "first", "text": "one"}', '{"id": "last", "text": "two"}']
    (folder / "a.jsonl").write_bytes("\n".join([good[0], *BAD_LINES, good[1], ""]).encode()
                                     + b'{"text": "\xb0\xa1"}\n')
    (folder / "b.txt").write_bytes(b"three \xff")
    (folder / "c.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "four"}\n' + os.urandom(60000).hex().encode())[:-2000])
    (folder / "d.jsonl.zst").write_bytes(
        zstandard.compress(os.urandom(300_000).hex().encode() + b'\n{"text": "five"}\n')[:-20])
    (folder / "e.parquet").write_bytes(b"PAR1 no more")
    parquet.write_table(pyarrow.table({"body": ["six"]}), folder / "f.parquet")
    parquet.write_table(pyarrow.table({"text": ["seven", None]}), folder / "g.parquet")
    base = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", f"all={folder}", "--output",
            str(tmp_path / "out"), "--max-document-bytes", "500", "--heldout", "0"]
    assert main(base) == 2
    assert f"error: {folder}/a.jsonl:2: is not valid JSON" in capsys.readouterr().err
    stdout = read_output(*base, "--on-bad", "quarantine")
    rows = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    found = [(Path(r["file"]).name, r["line"], r["code"]) for r in rows]
    assert found == [*(("a.jsonl", line, code) for code, line in BAD_LINES.values()), ("a.jsonl", 11, "utf8"),
                     ("b.txt", None, "utf8"), ("c.jsonl.gz", None, "truncated"),
                     ("d.jsonl.zst", None, "truncated"), ("e.parquet", None, "parquet"),
                     ("f.parquet", None, "fields"), ("g.parquet", 2, "fields")]
    assert all(len(r["content"]) <= 300 and r["reason"] for r in rows)
    assert rows[0]["content"].startswith('{"id": 1')
    [source] = read_manifest(tmp_path / "out").content["sources"]
    assert sum(source["num_bad"].values()) == len(rows) and source["num_read"] == len(rows) + 4
    assert f"all: {len(rows) + 4} records read: 4 written, {len(rows)} set aside (" in stdout
    assert f"bad records: {tmp_path / 'out/quarantine.jsonl'}\n" in stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    texts = [tokenizer.decode(d[:-1]) for d in open_split(tmp_path / "out/all/train-00000").documents()]
    assert texts == ["one", "two", "four", "seven"]


def test_a_repeated_id_is_answered_by_the_line_that_sets_it_aside(tokenizers: dict[str, Path], tmp_path: Path,
                                                                  get_refusal: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n')
    typed = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", f"{tmp_path}/a.jsonl",
             "--output", f"{tmp_path}/out"]
    assert get_refusal(*typed).endswith(f"write\n  sov-data {' '.join(typed)} --on-bad quarantine\n")


def test_chat_rejected_by_template_is_named(tokenizers: dict[str, Path], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tmp_path / "strict"
    shutil.copytree(tokenizers["solar-open"], tokenizer)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    refusal = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    config["chat_template"] = (f"{refusal}{config['chat_template']}"
                               "{% if add_generation_prompt %}<think>{% endif %}")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    manifest = json.loads((tokenizer / "manifest.json").read_text())
    manifest["files"]["tokenizer_config.json"] = vars(FileRecord.of(tokenizer / "tokenizer_config.json"))
    (tokenizer / "manifest.json").write_text(json.dumps(manifest | {"sha256": ""}))
    lines = [{"messages": [{"role": role, "content": f"{i}"}, {"role": "assistant", "content": "yes"}]}
             for i, role in enumerate(["user", "user", "system", "user"])]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError,
                       match=r"chat\.jsonl:3: is refused by the chat template of .*\(user first\)"):
        pack_sources(tokenizer, [PackSource("chat", tmp_path / "chat.jsonl")], tmp_path / "out",
                     PackSettings(reading=RecordReading("chat")))
    assert "prompts differ between training and inference" in capsys.readouterr().err


def test_single_text_is_cut_into_documents(tokenizers: dict[str, Path], tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"{i} 번째 문장입니다.\n\n" for i in range(800))
    (tmp_path / "Korean.txt").write_text(text)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
    shards = {}
    for name, file, share in (("cut", "Korean.txt", 0.02), ("whole", "Korean.txt", 0.0),
                              ("record", "one.jsonl", 0.02)):
        pack_sources(tokenizers["solar-open"], [PackSource("ko", tmp_path / file)], tmp_path / name,
                     PackSettings(heldout_share=share))
        [source] = read_manifest(tmp_path / name).content["sources"]
        shards[name] = [source["splits"][split]["num_documents"] for split in ("train", "heldout")]
    captured = capsys.readouterr()
    assert shards == {"cut": [5, 1], "whole": [1, 0], "record": [1, 0]}
    assert captured.out.count("is one text; cut at blank lines into documents of at most 4,000 bytes") == 1


def test_lines_become_documents_and_single_document_warns(tokenizers: dict[str, Path], tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"Line {i}\u2028 goes on." for i in range(60)]
    (tmp_path / "a.txt").write_text("\r\n".join([*lines[:30], "", "  \n"]) + "\n".join([*lines[30:], ""]))
    (tmp_path / "one.txt").write_text("A short text.\n")
    command = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--workers", "1", "--heldout", "0.1"]
    assert main([*command, "--input", str(tmp_path / "a.txt"), "--lines", "--output",
                 str(tmp_path / "out")]) == 0
    splits = read_manifest(tmp_path / "out").content["sources"][0]["splits"]
    assert sum(split["num_documents"] for split in splits.values()) == 60
    assert splits["heldout"]["num_documents"] >= 1
    capsys.readouterr()
    assert main([*command, "--input", str(tmp_path / "one.txt"), "--output", str(tmp_path / "few")]) == 0
    warned = capsys.readouterr().err
    assert re.search(r"one: has too few documents, so nothing is held out .* Pass --lines", warned)
    assert main([*command, "--input", str(tmp_path / "a.txt"), "--lines", "--format", "chat", "--output",
                 str(tmp_path / "x")]) == 2
    assert "--lines: is for text, and the format is chat" in capsys.readouterr().err
