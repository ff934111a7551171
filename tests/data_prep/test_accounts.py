"""`sov-data` commands write each record or set it aside for a reason, and print one line of one form."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.shards.assemble import EncodedSource
from data_prep.shards.pack import _account_source
from data_prep.shards.units import UnitRecord
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.accounting import RecordAccount

LINE = re.compile(r"([\d,]+) (\w+) read: ([\d,]+) (?:written|asked|scored), ([\d,]+) set aside(?: \((.*)\))?")
TEXTS = [
    '{"id": 1, "text": "one good record", "level": "low"}', '{"id": 2, "text": "x", "level": "high"}', "",
    '{"id": 3, "text": "cut off', '{"id": 4, "text": 5}', "   ", '["list"]', '{"id": 5, "text": " "}',
    '{"id": 1, "text": "one good record again", "level": "low"}', '{"id": 6}', "7", "null",
    '{"id": 8, "text": "' + "long " * 300 + '"}', '{"id": 9, "text": "\\udc00"}',
    '{"text": "a record without an id", "level": "low"}']
CHATS = [
    '{"id": 1, "prompt": "Why?", "chosen": "A good answer", "rejected": "A bad answer"}', "",
    '{"id": 1, "prompt": "Why?", "chosen": "A good answer", "rejected": "A bad answer"}',
    '{"id": 2, "prompt": "How?", "chosen": "This way", "rejected": "That way"}', "{", "[]",
    '{"id": 3, "prompt": "Who?", "chosen": "", "rejected": 5}', '{"id": 4, "prompt": "When?"}']


def row(prompt: str, response: Any, reward: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "reward": reward, **more}


CUT = {"finish_reason": "length"}
RESPONSES: list[dict[str, Any]] = [
    row("a", "best", 1), row("a", "middle", 0.7), row("a", "worst", 0), row("a", "none", None),
    row("a", " ", 0.6), row("b", "same", 1), row("b", "reward", 1), row("c", "alone", 1),
    row("d", "cut", 1, **CUT), row("d", "whole", 0.6), row("d", "worst", 0), row("e", "cut", 1, **CUT),
    row("e", "cut too", 0.9, **CUT), row("f", "", None), row("g", "text", 1), row("g", "text", 0),
    row("h", [{"role": "assistant", "content": "list"}], 1), row("h", "no", 0),
    {"prompt": "i", "responses": [{"content": "yes", "reward": 1}, {"content": "no", "reward": 0}]},
    {"prompt": "j", "responses": []}, {"prompt": "k", "responses": [{"content": "one", "reward": 1}]}]


def accounts(told: str) -> list[tuple[int, str, int, dict[str, int]]]:
    """Return records read, their name, records written and reason -> records of each account."""
    found = []
    for num_read, noun, num_written, num_aside, reasons in LINE.findall(told):
        parts = (part.split(" ", 1) for part in re.split(r", (?=\d+ )", reasons) if part)
        aside = {why: int(number) for number, why in parts}
        assert sum(aside.values()) == int(num_aside) and int(num_read) == int(num_written) + int(num_aside)
        found.append((int(num_read), noun, int(num_written), aside))
    return found


@pytest.mark.parametrize(("lines", "more", "num_written", "reasons"), [
    (TEXTS, (), 3, {"json": 4, "fields": 2, "empty": 1, "duplicate_id": 1, "too_long": 1, "utf8": 1}),
    (TEXTS, ("--bucket-by", "level"), 3, None),
    (CHATS, ("--format", "preference"), 2, None),
])
def test_packing_accounts_for_every_line(tokenizers: dict[str, Path], tmp_path: Path, lines: list[str],
                                         more: tuple[str, ...], num_written: int,
                                         reasons: dict[str, int] | None,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    num_read = sum(bool(line.strip()) for line in lines)
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--output", str(tmp_path / "out"),
                 "--input", str(tmp_path / "mixed.jsonl"), "--on-bad", "quarantine", "--workers", "1",
                 "--max-document-bytes", "500", "--heldout", "0.5",
                 *more]) == 0
    ((found, noun, written, aside),) = accounts(capsys.readouterr().out)
    assert (found, noun, written) == (num_read, "records", num_written)
    if reasons is not None:
        assert aside == reasons
    sources = read_manifest(tmp_path / "out").content["sources"]
    assert sum(source["num_read"] for source in sources) == num_read
    stored: Counter[str] = Counter()
    for source in sources:
        documents = sum(s["num_documents"] for s in source["splits"].values()) // source["group_documents"]
        stored += Counter(source["num_bad"])
        bad = sum(source["num_bad"].values())
        assert source["num_read"] == documents + bad
    assert stored == aside


@pytest.mark.parametrize(("command", "more", "responses_of_record", "reasons"), [
    ("groups", (), 1, {"did not end": 3 - 1, "no reward": 2, "no text": 1, "equal rewards": 2,
                       "only response to its prompt": 2}),
    ("groups", ("--keep-unfinished",), 1, {"no reward": 2, "no text": 1, "equal rewards": 2,
                                           "only response to its prompt": 2}),
    ("pairs", (), 2, {"no reward": 2, "no text": 1, "equal rewards": 2, "only response to its prompt": 2,
                      "neither best nor worst": 1, "did not end": 3}),
    ("unpaired", (), 1, {"no reward": 2, "no text": 1, "did not end": 3}),
    ("unpaired", ("--keep-unfinished",), 1, {"no reward": 2, "no text": 1}),
])
def test_every_response_is_written_or_set_aside(tmp_path: Path, command: str, more: tuple[str, ...],
                                                responses_of_record: int, reasons: dict[str, int],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, RESPONSES)))
    num_read = sum(len(record.get("responses", [1])) for record in RESPONSES)
    assert main([command, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"),
                 *more]) == 0
    ((found, noun, written, aside),) = accounts(capsys.readouterr().out)
    rows = (tmp_path / f"out/{command}.jsonl").read_text().splitlines()
    assert (found, noun, written) == (num_read, "responses", responses_of_record * len(rows))
    assert reasons.items() <= aside.items()
    assert read_manifest(tmp_path / "out", "corpus").content["account"]["num_read"] == num_read


def test_decontamination_and_trajectories_account_for_every_record(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = "How many barrels of oil does a refinery with twelve towers fill each morning?"
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": item}) + "\n")
    texts = ["Yes.", f"He asked: {item}", item, "No."]
    (tmp_path / "text.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    assert main(["decontaminate", "--input", str(tmp_path / "text.jsonl"), "--benchmarks",
                 str(tmp_path / "bench.jsonl"), "--output", str(tmp_path / "clean")]) == 0
    assert accounts(capsys.readouterr().out) == [(4, "records", 2, {"text of benchmarks": 2})]
    queries = [("a", ["x", "x", "y"]), ("b", ["x"]), ("c", []), ("d", ["p", "q", "r", "s"])]
    (tmp_path / "queries.jsonl").write_text("\n".join(
        json.dumps({"query": query, "solutions": solutions}) for query, solutions in queries))
    assert main(["trajectories", "--input", str(tmp_path / "queries.jsonl"), "--most", "3", "--output",
                 str(tmp_path / "made")]) == 0
    assert accounts(capsys.readouterr().out) == [
        (4, "queries", 2, {"too few different solutions": 2}),
        (8, "solutions", 5, {"more than --most": 1, "query with too few different solutions": 1,
                             "similar": 1})]


def test_a_record_that_vanishes_stops_the_command() -> None:
    source = EncodedSource("web", "text", Path("web"), [((), UnitRecord("key", 2, 9, (3,), {}, num_read=3))])
    with pytest.raises(RuntimeError, match="does not add up: 3 records read: 2 written, 0 set aside"):
        _account_source(source, {"": 2}, {})
    assert _account_source(source, {"": 2}, {"json": 1}) == RecordAccount(3, 2, {"json": 1})
