"""Read records of all layouts and file formats, and skip descriptions of datasets."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import ipc, parquet

from megatron_sov.base.documents import (
    BadRecord, Document, RecordReading, list_files, read_documents, read_span)
from megatron_sov.base.documents.files import format_skipped, iter_spans
from megatron_sov.base.documents.messages import Message
from megatron_sov.base.documents.reading import CountedSpan, iter_json_items
from megatron_sov.base.documents.records import decode_utf8
from megatron_sov.base.errors import UserError

ROWS = [{"text": f"line {i}\u2028 \x85 \x1c 한국어"} for i in range(5)]
QUESTION, ANSWER = [{"role": "user", "content": "2 + 2?"}], [{"role": "assistant", "content": "4"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {name[0]: {"type": "string"}}}}} for name in ("add", "find")]


def write_arrow(rows: list[dict[str, Any]], is_file: bool = False) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with (ipc.new_file if is_file else ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": write_json_lines, "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "bom.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(), "lines.json": write_json_lines,
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "a.json.zst": lambda rows: zstandard.compress(json.dumps(rows).encode()),
    "a.jsonl.gz": lambda rows: gzip.compress(write_json_lines(rows)), "a.parquet": write_parquet,
    "stream.arrow": write_arrow, "file.arrow": lambda rows: write_arrow(rows, True), "a.feather": write_arrow,
}
CALL_MESSAGES = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": "1"}}},
    {"type": "function", "function": {"name": "find", "arguments": {"f": "x"}}}]},
    {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, *ANSWER]
# layout -> (document kind, record)
RECORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", ROWS[0]), "messages": ("chat", {"messages": [*QUESTION, *ANSWER]}),
    "tools": ("chat", {"messages": CALL_MESSAGES, "tools": TOOLS,
                       "chat_template_kwargs": {"enable_thinking": True}}),
    "sharegpt": ("chat", {"conversations": [{"from": "human", "value": "2?"},
                                            {"from": "gpt", "value": "2"}]}),
    "prompt and completion": ("chat", {"prompt": "2 + 2?", "completion": "4"}),
    "messages of both": ("chat", {"prompt": QUESTION, "completion": ANSWER}),
    "pair of strings": ("preference", {"prompt": "2?", "chosen": "2", "rejected": "3"}),
    "pair of messages": ("preference", {"prompt": QUESTION, "chosen": ANSWER, "rejected": QUESTION + ANSWER}),
    "pair that begins alike": ("preference", {"chosen": QUESTION + ANSWER, "rejected": [
        *QUESTION, {"role": "assistant", "content": "5"}]}),
    "prompt": ("prompt", {"prompt": QUESTION, "answer": "4"}),
}


@pytest.mark.each("kind", RECORDS)
def test_records_are_equal_in_all_formats(tmp_path: Path, kind: str) -> None:
    form, row = RECORDS[kind]
    records = {}
    for name, format_rows in WRITERS.items():
        (tmp_path / name).write_bytes(format_rows([row, row]))
        documents = read_documents([tmp_path / name], RecordReading(form))
        # all fields but the position in the file
        records[name] = [{**vars(document), "where": "", "line": 0} for document in documents]
    assert all(rows == records["a.jsonl"] and len(rows) == 2 for rows in records.values())


def build_call_record(arguments: Any, tools: list[dict[str, Any]], **message_fields: Any) -> dict[str, Any]:
    """Return a chat record with a call of the function `get`; `message_fields` go to the calling message."""
    call = {"type": "function", "function": {"name": "get", "arguments": arguments}}
    call_message = {"role": "assistant", "content": "", "tool_calls": [call], **message_fields}
    return {"messages": [*QUESTION, call_message, {"role": "tool", "content": "r"}, *ANSWER], "tools": tools}


def build_tool(**properties: Any) -> dict[str, Any]:
    """Return the declaration of the function `get` with these properties of its parameters."""
    return {"type": "function", "function": {"name": "get", "parameters": {"properties": properties}}}


UNIT = build_tool(unit={"anyOf": [{"type": "string"}, {"type": "null"}], "default": None})
STRICT = {"type": "function", "function": {"name": "get", "strict": None}}
NULLS: dict[str, dict[str, Any]] = {
    "argument and default": build_call_record({"unit": None}, [UNIT]),
    "one argument of two": build_call_record({"city": "Seoul", "unit": None}, [UNIT]),
    "deep": build_call_record({"a": {"b": [{"c": None}, {"c": None}]}}, [UNIT]),
    "list": build_call_record({"a": [{"b": None}]}, [UNIT]),
    "JSON text": build_call_record('{"unit": null, "n": 1}', [UNIT]),
    "constant": build_call_record({"x": "y"}, [build_tool(unit={"const": None, "default": None})]),
    "strict": build_call_record({"x": "y"}, [STRICT]),
}


@pytest.mark.each("name", NULLS)
def test_written_nulls_stay(tmp_path: Path, name: str) -> None:
    row = NULLS[name]
    function = row["messages"][1]["tool_calls"][0]["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    for file_name, format_rows in WRITERS.items():
        (tmp_path / file_name).write_bytes(format_rows([row, row]))
        for document in read_documents([tmp_path / file_name], RecordReading("chat")):
            assert document.messages[1].tool_calls[0]["function"]["arguments"] == arguments, file_name
            assert list(document.tools) == row["tools"], file_name


@pytest.mark.parametrize("renames", [(), (("messages", ("dialog",)), ("tools", ("functions",)))])
def test_table_padding_nulls_are_removed(tmp_path: Path, renames: Any) -> None:
    """Tables fill missing fields with nulls, which are removed; nulls in JSON lines or JSON text stay."""
    city, unit = build_tool(city={"type": "string"}), build_tool(unit={"type": "string", "default": "K"})
    rows = [build_call_record({"city": "Seoul"}, [city], reasoning_content="hm"),
            build_call_record({"unit": "C", "flat": ["x"]}, [unit])]
    records = rows
    if renames:
        records = [{"dialog": row["messages"], "functions": row["tools"]} for row in rows]
    for file_name, format_rows in WRITERS.items():
        (tmp_path / file_name).write_bytes(format_rows(records))
        items = list(read_documents([tmp_path / file_name], RecordReading("chat", renames=renames)))
        assert [list(d.tools) for d in items] == [row["tools"] for row in rows], file_name
        assert [d.messages[1].tool_calls[0]["function"]["arguments"] for d in items] == [
            {"city": "Seoul"}, {"unit": "C", "flat": ["x"]}], file_name


def test_reward_columns_keep_nulls(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": QUESTION, "tests": [{"a": 1, "b": None}]},
                                  {"prompt": QUESTION, "tests": [{"a": None, "b": 2}]}]
    for file_name, write in WRITERS.items():
        (tmp_path / file_name).write_bytes(write(rows))
        items = read_documents([tmp_path / file_name], RecordReading("prompt"))
        assert [json.loads(d.extra)["tests"] for d in items] == [row["tests"] for row in rows], file_name


def test_only_completion_is_trained_on(tmp_path: Path) -> None:
    earlier = [*QUESTION, *ANSWER, {"role": "user", "content": "and 3 + 3?"}]
    rows = [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "2 + 2?", "response": "4"},
            {"prompt": QUESTION, "completion": ANSWER}, {"prompt": earlier, "completion": [
                {"role": "assistant", "content": "6"}]}]
    (tmp_path / "a.jsonl").write_bytes(write_json_lines(rows))
    *short, long = read_documents([tmp_path / "a.jsonl"], RecordReading("chat"))
    assert all(d.messages == (Message("user", "2 + 2?", is_learned=False), Message("assistant", "4"))
               and d.num_prompt == 1 for d in short)
    assert [m.is_learned for m in long.messages] == [False, False, False, True] and long.num_prompt == 3
    [auto, *_] = read_documents([tmp_path / "a.jsonl"])
    assert auto.kind == "chat"


@pytest.mark.each(("row", "kind", "messages"), [
    ({"prompt": "p", "completion": "c"}, "text", "is a chat.*--format chat"),
    ({"prompt": "p", "completion": "c"}, "preference", "is a chat.*--format chat"),
    ({"prompt": "p", "answer": "4"}, "chat", "no response is learned then; a chat has 'messages', or"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "messages": QUESTION}, "prompt", "--format preference"),
    ({"prompt": "p", "completion": "c", "label": False}, "chat", "`sov-data pairs`"),
    ({"prompt": "p", "completion": QUESTION}, "chat", "no message of the assistant"),
    ({"prompt": "p", "completion": 4}, "chat", "must be a string, or a non-empty list"),
    ({"prompt": [], "completion": "c"}, "chat", "'prompt' must be a string, or a non-empty list"),
    ({"prompt": 5}, "prompt", "'prompt' must be a string, or a non-empty list"),
    ({"prompt": ["p"], "completion": "c"}, "chat", "has role 'p'"),
    ({"prompt": "p", "completion": None}, "chat", "is a prompt"),
])
def test_suggestions_keep_answers(tmp_path: Path, row: dict[str, Any], kind: str, messages: str) -> None:
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(WRITERS[name]([row]))
        with pytest.raises((UserError, BadRecord)) as e:
            list(read_documents([tmp_path / name], RecordReading(kind)))
        if name == "a.jsonl":
            assert e.type is UserError and e.match(messages)


def write_files(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


CARD = b"---\nlicense: mit\n---\n# A dataset card\n"
HUB = {"README.md": CARD, "LICENSE": b"MIT", "LICENSE.txt": b"MIT", ".gitattributes": b"*.parquet",
       "dataset_infos.json": b"{}", "README_ko.md": CARD, "CITATION.cff": b"cff",
       "requirements.txt": b"numpy"}


@pytest.mark.each("data", [
    {"data/train-0.parquet": write_parquet(ROWS)}, {"train.jsonl.gz": gzip.compress(write_json_lines(ROWS))},
    {"train.json": json.dumps(ROWS).encode()}, {"train.json": write_json_lines(ROWS)},
    {"data-0.arrow": write_arrow(ROWS), "state.json": b'{"a": 1}', "dataset_info.json": b'{\n"b": 2}',
     "cache-12.arrow": write_arrow(ROWS)},
    {"train/data-0.arrow": write_arrow(ROWS), "dataset_dict.json": b'{"splits": ["train"]}',
     "note.json": b"[1]"},
])
def test_dataset_descriptions_are_skipped(tmp_path: Path, data: dict[str, bytes]) -> None:
    messages: list[str] = []
    files = list_files(write_files(tmp_path, **HUB, **data), messages.append)
    assert [d.text for d in read_documents(files)] == [row["text"] for row in ROWS]
    [sentence] = messages
    assert "passed over" in sentence and "plain text" not in sentence


def test_text_folder_keeps_readme_and_reports_skipped_files(tmp_path: Path) -> None:
    messages: list[str] = []
    write_files(tmp_path, **{"README.md": b"# A", "b.txt": b"text", "c.png": b"",
                      "d.json": json.dumps(ROWS).encode()})
    assert [file.name for file in list_files(tmp_path, messages.append)] == ["README.md", "b.txt"]
    assert messages == [f"{tmp_path}: passed over 2 files (c.png, d.json)"]
    for name in ("c.png", "d.json"):
        (tmp_path / name).unlink()
    assert list_files(tmp_path, messages.append) and len(messages) == 1
    write_files(tmp_path, **{".env": b"", ".git/config": b"", "c\x1b[2J.png": b""})
    list_files(tmp_path, messages.append)
    assert messages[1:] == [f"{tmp_path}: passed over 1 file (c\\x1b[2J.png) and 2 hidden (.env, .git)"]


def test_many_skipped_files_are_counted_by_ending() -> None:
    names = [f"{i}.e{j}" for j in range(12) for i in range(12 - j)]
    assert format_skipped(names, [f".{i}" for i in range(6)]) == (
        "passed over 78 files (12 .e0, 11 .e1, 10 .e2, 9 .e3, 8 .e4, 7 .e5, 6 .e6, 5 .e7, 10 others) and "
        "6 hidden (.0, .1, .2, .3, ...)")


def test_mixed_text_and_splits_are_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    write_files(tmp_path, **{f"data/{split}-0.parquet": write_parquet(ROWS) for split in ("train", "test")},
                **{"docs/guide.md": b"text"})
    assert len(list_files(tmp_path, messages.append)) == 3
    assert "1 files of plain text (docs/guide.md)" in messages[0] and "splits train, test" in messages[0]


def test_missing_hub_dataset_suggests_download(cwd: Path) -> None:
    with pytest.raises(UserError, match="hf download HuggingFaceH4/ultrachat_200k --repo-type dataset"):
        list_files(Path("HuggingFaceH4/ultrachat_200k"))
    for nothing in (cwd / "nowhere", Path("judged/pairs.jsonl"), Path("corpus/a.json.gz")):
        with pytest.raises(UserError) as e:
            list_files(nothing)
        assert "hf download" not in str(e.value)


@pytest.mark.each("name", ["a.txt", "data", "a.data", "a.txt.gz"])
@pytest.mark.each("content", [json.dumps(ROWS), json.dumps({"messages": QUESTION}, indent=2),
                                     '\n [\n {"a": 1}, {"b": 2}]', '{"a\\"b": 1}\n{"a": 2}'])
def test_json_in_text_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(UserError, match="is JSON and not plain text"):
        list(read_documents([tmp_path / name]))


@pytest.mark.each("content", ["{curly} text", "[1] A note.", '{ "quoted" text }', "[[wiki]] text", "{}"])
def test_text_with_brackets_is_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert [d.text for d in read_documents([tmp_path / "a.txt"])] == [content]


@pytest.mark.each(("content", "messages", "num_good"), [
    ('[{"text": "a"}', "a ',' or the list's ']' must stand", 1),
    ('[{"text": "a"} {"text": "b"}]', "a ',' or the list's ']' must stand", 1),
    ('[{"text": "a"}, {"text": }]', "is not valid JSON", 1),
    ('[{"text": "a"}, {"text": "b', "is not valid JSON", 1),
    ('[{"text": "a"},]', "is not valid JSON", 1),
    ('[{"text": "a"}] []', "more after the end", 1),
    ('[{"text": "a"}, 3, {"text": "b"}]', "is a JSON int", 2),
    ('[{"text": "a"}, ' + "[" * 200_000, "is not valid JSON", 1),
    ('{"text": "a",\n"b": 1}', "is not valid JSON", 0),
    ("", "", 0), ("3", "is a JSON int", 0),
])
def test_damaged_json_list_names_record(tmp_path: Path, content: str, messages: str, num_good: int) -> None:
    (tmp_path / "a.json").write_text(content)
    items = [item for span in iter_spans(tmp_path / "a.json")
             for item in read_span(span, RecordReading("text"))]
    bad = [item for item in items if isinstance(item, BadRecord)]
    assert sum(isinstance(item, Document) for item in items) == num_good
    assert (bad and messages in bad[0].reason) if messages else not items


def test_truncated_arrow_stream_is_detected(tmp_path: Path) -> None:
    batch, sink = pyarrow.RecordBatch.from_pylist(ROWS), io.BytesIO()
    writer = ipc.new_stream(sink, batch.schema)
    writer.write_batch(batch)
    (tmp_path / "cut.arrow").write_bytes(sink.getvalue())
    writer.close()
    (tmp_path / "whole.arrow").write_bytes(sink.getvalue())
    assert len(list(read_documents([tmp_path / "whole.arrow"]))) == len(ROWS)
    with pytest.raises(UserError, match="the end of the stream is missing"):
        list(read_documents([tmp_path / "cut.arrow"]))


def test_duplicate_columns_are_refused(tmp_path: Path) -> None:
    texts = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(texts, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has two columns 'text'"):
        list(read_documents([tmp_path / "a.parquet"]))


@pytest.mark.each("step", [1, 2, 3, 7, 1000])
def test_json_items_do_not_depend_on_block_size(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.base.documents.reading._BLOCK_BYTES", step)
    expected = [{"a": "한\\n\"]}", "b": [1.5e-3, True, None, "\U0001f600"]}, [], 12.25, "x" * 50, {"c": {}}]
    raw = io.BytesIO(json.dumps(expected, indent=1).encode())
    assert list(iter_json_items(lambda size: raw.read(min(size, step)), 1000)) == expected


def test_overlong_json_item_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.base.documents.reading._BLOCK_BYTES", 100)
    raw = io.BytesIO(json.dumps(["a" * 100_000]).encode())
    [bad] = iter_json_items(raw.read, 1000)
    assert isinstance(bad, BadRecord) and bad.code == "too_long" and raw.tell() < 10_000


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.each(("scores", "tied"), [
    ({"chosen_score": 7, "rejected_score": 7}, "'chosen_score' = 7"),
    ({"score_chosen": 8.5, "score_rejected": 8.5}, "'score_chosen' = 8.5"),
    ({"chosen-rating": 4, "rejected-rating": 4.0}, "'chosen-rating' = 4"),
    ({"chosen_avg_rating": 0.1 + 0.2, "rejected_avg_rating": 0.3}, "'chosen_avg_rating' = 0.3"),
    ({"chosen_reward": 0, "rejected_reward": 0, "chosen_score": 1, "rejected_score": 1},
     "'chosen_score' = 1"),
    ({"chosen_reward": 0, "rejected_reward": 0, "chosen_score": 2,
      "rejected_score": 1}, ""),
    ({"chosen_score": 8, "rejected_score": 7}, ""), ({"chosen_score": 7, "rejected_score": 8}, ""),
    ({"chosen_score": None, "rejected_score": None}, ""), ({"chosen_score": 7}, ""),
    ({"chosen_score": "7", "rejected_score": "7"}, ""), ({"score": 7, "rejected_score": 7}, ""),
    ({"chosen_tokens": 7, "rejected_tokens": 7}, "")])
def test_pair_with_tied_scores_is_refused(tmp_path: Path, scores: dict[str, Any], tied: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(write_json_lines([PAIR, {**PAIR, **scores},
                                                         {**PAIR, "rejected": "a"}]))
    items = [item for span in iter_spans(tmp_path / "a.jsonl")
             for item in CountedSpan(span, RecordReading("preference"))]
    bad = [item for item in items if isinstance(item, BadRecord)]
    assert len(items) == 3 and [item.code for item in bad] == ["no_preference"] * (1 + bool(tied))
    assert tied in bad[0].reason


@pytest.mark.each(("begin", "words"), [
    (b"%PDF-1.7\xff", "is a PDF"), (b"PK\x03\x04\xff", "ZIP file"), (b"\x1f\x8b\xff", "ending .gz"),
    (b"\x28\xb5\x2f\xfd\xff", "ending .zst"), (b"PAR1\xff", ".parquet"), (b"\xff\xfea\0", "iconv -f UTF-16"),
    (b"\xfe\xff\0a", "iconv -f UTF-16"), (b"\xb0\xa1", "iconv -f CP949"), (b"caf\xe9", "iconv -f CP1252")])
def test_binary_file_is_identified_by_first_bytes(begin: bytes, words: str) -> None:
    with pytest.raises(BadRecord, match=words):
        decode_utf8(begin)
    with pytest.raises(BadRecord, match="iconv -f CP1252"):
        decode_utf8(b"\xff\xfe", start_bytes=7)
