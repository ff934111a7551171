"""`sov-data pack --column` and `--bucket-by`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from data_prep.cli import main
from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents import RecordReading
from megatron_sov.train.data.sources import open_sources


def test_record_numbers_become_token_columns(tokenizers: dict[str, Path], tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{i} + 1?", "chosen": f"It is {i + 1}.", "rejected": "No idea." * (i % 3 + 1),
             "score": [i, -i], "step": i / 2} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    settings = PackSettings(0.2, RecordReading("preference", columns=("score", "step")), shard_tokens=400)
    sources = [PackSource("pairs", tmp_path / "pairs.jsonl"), PackSource("rows", tmp_path / "rows.parquet")]
    pack_sources(tokenizers["solar-open"], sources, tmp_path / "out", settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    [source, same] = open_sources({str(tmp_path / "out"): 1.0}, 10**6, formats=("preference",))
    assert source.columns == same.columns == ("score", "step")
    record_numbers = set()
    for split in ("train", "heldout"):
        documents, others = source.open_split(split), same.open_split(split)
        for i, length in enumerate(documents.lengths):
            number = int(re.findall(r"(\d+) \+ 1\?", tokenizer.decode(documents.tokens(i, 0, length)))[0])
            record_numbers.add(number)
            # of each pair, the chosen response (even i) has the first score, the rejected one the second
            for name, value in (("score", -number if i % 2 else number), ("step", number / 2)):
                assert set(documents.column(name, i, 0, length).tolist()) == {value}
                assert others.column(name, i, 0, length).tolist() == [value] * length
    assert record_numbers == set(range(20))
    assert main(["verify", str(tmp_path / "out")]) == 0
    [damaged, *_] = sorted((tmp_path / "out/pairs").glob("train-*.score"))
    numbers = np.fromfile(damaged, "<f4")
    numbers[7] = np.inf
    numbers.tofile(damaged)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert f"{damaged.name}: token 7 has inf in column 'score', must be a finite" in capsys.readouterr().err


@pytest.mark.each(("format_", "columns", "row", "message"), [
    ("text", ["Score"], {}, "--column: 'Score' cannot name a column (letters a-z and '_', and none of bin"),
    ("text", ["loss", "a", "a"], {}, "'loss' cannot name a column"),
    ("prompt", ["score"], {}, '--column "score": a prompt has no response to which'),
    ("text", ["score"], {}, "asked.jsonl:1: has no field 'score', which --column names (fields: text"),
    ("text", ["score"], {"score": True}, "has 'True' in field 'score', must be a number that float32 holds"),
    ("text", ["score"], {"score": 10**400}, "must be a number that float32 holds"),
    ("text", ["score"], {"score": 1e39}, "has '1e+39' in field 'score'"),
    ("text", ["score"], {"score": [1]}, ""),
    ("preference", ["score"], {"score": [1, 2, 3]}, "must be a number or a list of 2"),
])
def test_wrong_columns_are_rejected(tokenizers: dict[str, Path], tmp_path: Path, format_: str,
                                    columns: list[str], row: dict[str, Any], message: str,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"chosen": "b", "rejected": "c"} | row
    (tmp_path / "asked.jsonl").write_text("".join(
        json.dumps({"text": f"number {i}", "prompt": str(i)} | fields) + "\n" for i in range(9)))
    options = [word for name in columns for word in ("--column", name)]
    code = main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--format", format_, *options,
                 "--input", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "new"),
                 "--heldout", "0", "--workers", "1"])
    assert (code, (tmp_path / "new").exists()) == ((2, False) if message else (0, True))
    assert message in capsys.readouterr().err


def test_bucket_field_makes_sources(tokenizers: dict[str, Path], tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i} + 1?"},
                          {"role": "assistant", "content": f"It is {i + 1}."}],
             "level": ["easy", "hard", 3][i % 3], "score": i} for i in range(60)]
    without = {"messages": rows[0]["messages"]}
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, [*rows, without])))
    command = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--format", "chat", "--bucket-by",
               "level", "--column", "score", "--input", str(tmp_path / "chat.jsonl"), "--heldout", "0.001",
               "--workers", "1", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert ("chat.jsonl:61: has no field 'level', which --bucket-by names (fields: messages); add it"
            in capsys.readouterr().err)
    assert main([*command, "--bucket-by", ""]) == 2
    assert "--bucket-by '': is no field" in capsys.readouterr().err
    assert main([*command, "--on-bad", "quarantine"]) == 0
    sources = open_sources({str(tmp_path / "out"): 1.0}, 10**6)
    assert [s.name for s in sources] == ["chat-3", "chat-easy", "chat-hard"]
    scores_by_source: dict[str, list[int]] = {}
    for source in sources:
        for split in ("train", "heldout"):
            documents = source.open_split(split)
            scores_by_source.setdefault(source.name, []).extend(
                int(documents.column("score", d, 0, 1)[0]) for d in range(len(documents.lengths)))
    assert {name: sorted(scores) for name, scores in scores_by_source.items()} == {
        name: list(range(first, 60, 3))
        for first, name in enumerate(("chat-easy", "chat-hard", "chat-3"))}
    records = read_manifest(tmp_path / "out").content["sources"]
    assert [source["splits"]["heldout"]["num_documents"] for source in records] == [1, 1, 1]
    record = records[1]
    assert record["bucket"] == {"source": "chat", "field": "level", "value": "easy"}
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["mix", str(tmp_path / "out"), "--output", str(tmp_path / "mixed")]) == 0


def test_too_many_buckets_are_rejected(tokenizers: dict[str, Path], tmp_path: Path, get_refusal: Any) -> None:
    rows = [{"text": f"text {i}", "n": i, "kind": "x"} for i in range(65)]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["pack", "--tokenizer", str(tokenizers["solar-open"]), "--workers", "1", "--output",
               str(tmp_path / "out"), "--input"]
    assert "field 'n' has 65 values, --bucket-by makes at most 64 sources" in get_refusal(
        *command, f"web={tmp_path / 'web.jsonl'}", "--bucket-by", "n")
    # bucket b-x of source a, and bucket x of source a-b
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "one", "kind": "b-x"}) + "\n")
    both = [f"a={tmp_path / 'other.jsonl'}", f"a-b={tmp_path / 'web.jsonl'}"]
    assert "two sources would be named 'a-b-x'" in get_refusal(*command, *both, "--bucket-by", "kind")
    assert not (tmp_path / "out").exists()
