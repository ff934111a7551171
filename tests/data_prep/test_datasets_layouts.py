"""Rows in every layout of TRL's and LLaMA-Factory's documentation, stored by `datasets`: they are encoded
like the chat template in transformers, or rejected with the command that reads them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data_prep.responses.groups import GroupTally, iter_groups
from data_prep.shards.encode import Encoder
from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from megatron_sov.base.documents import RecordReading, list_files, read_documents
from megatron_sov.base.documents.layouts import LAYOUTS, parse_renames
from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.prompts import read_prompts

datasets = pytest.importorskip("datasets", reason="the extra `eval` is not installed")
Rows = list[dict[str, Any]]
Rendered = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Messages and tools, the arguments of a chat template."""
STORED = ("lines.jsonl", "list.json", "a.parquet", "disk", "hub")
"""Files and folders in which `store` saves the same rows."""
IMAGE = b"\x89PNG\r\n"


def say(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def tool(name: str, argument: str) -> dict[str, Any]:
    """Describe a function, as transformers' `get_json_schema` does."""
    return {"type": "function", "function": {"name": name, "description": f"It can {name}.", "parameters": {
        "type": "object", "properties": {argument: {"type": "string", "description": "what"}}}}}


def use_tool(name: str, argument: str) -> list[dict[str, Any]]:
    """Return a chat in which the assistant calls a function."""
    return [say("user", "Do it."), {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": name, "arguments": {argument: "it"}}}]},
        {"role": "tool", "name": name, "content": "done"}, say("assistant", "Yes.")]


def qa(question: str, answer: str, *before: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages `before`, then a question and its answer."""
    return [*before, say("user", question), say("assistant", answer)]


SYSTEM, LIGHT, FIND = say("system", "Be short."), tool("light", "room"), tool("find", "thing")
PAIRS = [qa("Sky?", "blue"), qa("Sky?", "green"), qa("Grass?", "green"), qa("Grass?", "red")]
"""The chats of two preference pairs: chosen, rejected, chosen, rejected."""
CHATS: dict[str, tuple[Rows, list[Rendered]]] = {
    "trl messages": ([{"messages": qa("Sky?", "blue")}, {"messages": qa("a", "b", SYSTEM)}],
                     [(qa("Sky?", "blue"), None), (qa("a", "b", SYSTEM), None)]),
    "trl messages and tools": (
        # `datasets` gives each call and tool the fields of the others, as nulls
        [{"messages": use_tool("light", "room"), "tools": [LIGHT, FIND]},
         {"messages": use_tool("find", "thing"), "tools": [FIND]}],
        [(use_tool("light", "room"), [LIGHT, FIND]), (use_tool("find", "thing"), [FIND])]),
    "trl prompt and completion": ([{"prompt": "Sky?", "completion": "blue"}], [(qa("Sky?", "blue"), None)]),
    "trl conversational prompt and completion": (
        [{"prompt": [SYSTEM, say("user", "Sky?")], "completion": [say("assistant", "blue")]}],
        [(qa("Sky?", "blue", SYSTEM), None)]),
    "alpaca": ([{"instruction": "Sky?", "input": "", "output": "blue"},
                {"instruction": "Add.", "input": "1 2", "output": "3"}],
               [(qa("Sky?", "blue"), None), (qa("Add.\n1 2", "3"), None)]),
    "alpaca with history": (
        [{"instruction": "c", "input": "", "output": "d", "system": "Be short.", "history": [["a", "b"]]},
         {"instruction": "e", "input": "", "output": "f", "system": "", "history": []}],
        [([SYSTEM, *qa("a", "b"), *qa("c", "d")], None), (qa("e", "f"), None)]),
    "sharegpt": ([{"conversations": [turn("human", "a"), turn("gpt", "b")], "system": "Be short.",
                   "tools": "[]"},
                  {"conversations": [turn("human", "Do it."), turn("function_call", json.dumps(
                      {"name": "find", "arguments": {"thing": "it"}})), turn("observation", "done"),
                      turn("gpt", "Yes.")], "system": "", "tools": json.dumps([FIND])}],
                 [(qa("a", "b", SYSTEM), None),
                  ([{k: v for k, v in m.items() if k != "name"} for m in use_tool("find", "thing")],
                   [FIND])]),
    "dolly": ([{"instruction": "Add.", "context": "1 2", "response": "3", "category": "closed_qa"},
               {"instruction": "Sky?", "context": "", "response": "blue", "category": "open_qa"}],
              [(qa("Add.\n1 2", "3"), None), (qa("Sky?", "blue"), None)]),
    "question and answer": ([{"question": "Sky?", "answer": "blue"}], [(qa("Sky?", "blue"), None)]),
    "openai with a system column": ([{"messages": qa("a", "b"), "system": "Be short."}],
                                    [(qa("a", "b", SYSTEM), None)]),
}
"""Layout -> rows, and the chat that each row means."""
TWO = (("Sky?", "blue", "green"), ("Grass?", "green", "red"))
"""Question, chosen answer and rejected answer of PAIRS."""
PREFERENCES: dict[str, Rows] = {
    "trl": [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in TWO],
    "trl conversational": [{"prompt": [say("user", q)], "chosen": [say("assistant", c)],
                            "rejected": [say("assistant", r)]} for q, c, r in TWO],
    "trl conversational without prompt": [{"chosen": qa(q, c), "rejected": qa(q, r), "score_chosen": 1.0}
                                          for q, c, r in TWO],
    "a prompt that both sides repeat": [{"prompt": q, "messages": qa(q, c), "chosen": qa(q, c),
                                         "rejected": qa(q, r)} for q, c, r in TWO],
    "messages that both sides repeat": [{"prompt": [say("user", q)], "chosen": qa(q, c), "rejected": qa(q, r)}
                                        for q, c, r in TWO],
    "alpaca": [{"instruction": q, "input": "", "chosen": c, "rejected": r} for q, c, r in TWO],
    "question": [{"question": q, "chosen": c, "rejected": r} for q, c, r in TWO],
    "sharegpt": [{"conversations": [turn("human", q)], "chosen": turn("gpt", c), "rejected": turn("gpt", r)}
                 for q, c, r in TWO],
}
"""Layout -> rows that mean PAIRS."""
JUDGED: dict[str, Rows] = {
    "trl": [{"prompt": q, "completion": c, "label": c == "blue"} for q, c, _ in TWO],
    "trl conversational": [{"prompt": [say("user", q)], "completion": [say("assistant", c)],
                            "label": c == "blue"} for q, c, _ in TWO],
    "alpaca": [{"instruction": q, "input": "", "output": c, "kto_tag": c == "blue"} for q, c, _ in TWO],
    "sharegpt": [{"conversations": [turn("human", q), turn("gpt", c)], "kto_tag": c == "blue"}
                 for q, c, _ in TWO],
}
"""Layout -> rows with the label true for the answer blue, and false for green."""
REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "text": ({"text": "a"}, dict.fromkeys(("chat", "preference", "prompt"), "--format text")),
    "chat": ({"messages": qa("a", "b")}, dict.fromkeys(("text", "preference", "prompt"), "--format chat")),
    "alpaca": (CHATS["alpaca"][0][0], dict.fromkeys(("text", "preference"), "--format chat")),
    "prompt with its answer": ({"prompt": qa("a", "b")}, {"prompt": "ends with an answer of the assistant"}),
    "pair": (PREFERENCES["trl"][0], dict.fromkeys(("text", "chat", "prompt"), "--format preference")),
    "sharegpt pair": (PREFERENCES["sharegpt"][0], dict.fromkeys(("text", "chat", "prompt"),
                                                                "--format preference")),
    "pair of strings": ({"chosen": "The sky is blue.", "rejected": "The sky is green."},
                        {"preference": "has no prompt: give 'prompt'"}),
    "prompt": ({"prompt": "Sky?"}, dict.fromkeys(("text", "chat", "preference"), "--format prompt")),
    "judged": (JUDGED["trl"][0], dict.fromkeys(("text", "chat", "preference"), "`sov-data pairs`")),
    "judged sharegpt": (JUDGED["sharegpt"][0], dict.fromkeys(("text", "chat", "preference"),
                                                             "`sov-data pairs`")),
    "steps": ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
              dict.fromkeys(("text", "chat", "preference"), "train reward models of steps")),
    "pictures": ({"messages": qa("What?", "A cat"), "images": [{"bytes": IMAGE, "path": None}]},
                 {"chat": "encode-media"}),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image", "text": None},
                                                         {"type": "text", "text": "What?"}]}]},
              {"chat": "encode-media"}),
    "picture of a prompt": ({"prompt": "What?", "image": {"bytes": IMAGE, "path": None}},
                            {"prompt": "encode-media"}),
    "pictures of a pair": ({**PREFERENCES["trl"][0], "images": [{"bytes": IMAGE, "path": None}]},
                           {"preference": "encode-media"}),
    "llava": ({"conversations": [turn("human", "<image>\na"), turn("gpt", "b")], "image": "a.jpg"},
              {"chat": "encode-media"}),
}
"""Kind of row -> a row, and format to which it does not belong -> part of the error."""


def store(rows: Rows, folder: Path) -> None:
    """Save rows in each format of `datasets` (`STORED`, a.csv), and as a folder of the Hugging Face Hub."""
    data = datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    data.save_to_disk(folder / "disk")
    data.to_parquet(folder / "a.parquet")
    data.to_json(folder / "lines.jsonl")
    data.to_json(folder / "list.json", lines=False)
    data.to_csv(folder / "a.csv")
    (folder / "hub/data").mkdir(parents=True)
    (folder / "a.parquet").rename(folder / "hub/data/train-00000-of-00001.parquet")
    (folder / "a.parquet").symlink_to(folder / "hub/data/train-00000-of-00001.parquet")
    (folder / "hub/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n"
                                          "  - split: train\n    path: data/train-*\n---\n# A card\n")


@pytest.fixture(scope="module")
def folder(tokenizers: dict[str, Path]) -> Path:
    return tokenizers["k-exaone"]


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder)


def pack_ids(encoder: Encoder, path: Path, kind: str) -> list[list[int]]:
    """Return the ids of each sequence that packing a path writes."""
    sequences: list[list[int]] = []
    for document in read_documents(list_files(path), RecordReading(kind)):
        batch = encoder.encode_batch([document])
        begin = 0
        for length in batch.lengths_tokens.tolist():
            sequences.append(batch.ids[begin:begin + length].tolist())
            begin += length
    return sequences


def render_with_transformers(folder: Path, conversations: list[Rendered], *,
                             is_prompt: bool = False) -> list[list[int]]:
    """Return the ids of conversations by transformers: with the eos that ends a document, or of a prompt with
    the generation prompt."""
    loaded = AutoTokenizer.from_pretrained(folder)
    sequences = []
    for messages, tools in conversations:
        ids = loaded.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False,
                                         add_generation_prompt=is_prompt)
        if not is_prompt and ids[-1] != loaded.eos_token_id:
            ids.append(loaded.eos_token_id)
        sequences.append(ids)
    return sequences


def read_chats(path: Path) -> list[Rendered]:
    """Return the messages and tools of the chats at a path."""
    return [([m.to_dict() for m in d.messages], list(d.tools) or None)
            for d in read_documents(list_files(path), RecordReading("chat"))]


def remove_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: remove_nulls(part) for name, part in value.items() if part is not None}
    return [remove_nulls(part) for part in value] if isinstance(value, list) else value


@pytest.mark.each("name", CHATS)
def test_chats_equal_the_output_of_the_template(tmp_path: Path, folder: Path, encoder: Encoder,
                                                name: str) -> None:
    rows, conversations = CHATS[name]
    store(rows, tmp_path)
    chats = {stored: read_chats(tmp_path / stored) for stored in STORED}
    for stored in ("lines.jsonl", "list.json"):  # `to_json` writes the table's nulls, which JSON keeps
        chats[stored] = [(remove_nulls(messages), remove_nulls(tools)) for messages, tools in chats[stored]]
    assert chats == dict.fromkeys(STORED, conversations)
    if not any(tools for _, tools in conversations):  # this template has no tools
        expected = render_with_transformers(folder, conversations)
        assert {stored: pack_ids(encoder, tmp_path / stored, "chat") for stored in STORED} == dict.fromkeys(
            STORED, expected)


@pytest.mark.each("name", PREFERENCES)
def test_pairs_are_two_chats_with_one_prompt(tmp_path: Path, folder: Path, encoder: Encoder,
                                             name: str) -> None:
    store(PREFERENCES[name], tmp_path)
    expected = render_with_transformers(folder, [(chat, None) for chat in PAIRS])
    assert {stored: pack_ids(encoder, tmp_path / stored, "preference") for stored in STORED} == dict.fromkeys(
        STORED, expected)


@pytest.mark.each(("kind", "row", "proposed"), [
    ("chat", {"ask_user": "Sky?", "note": "x", "model_output": "blue"},
     "prompt=ask_user,response=model_output"),
    ("chat", {"a": "Sky?", "b": "blue"}, "prompt=a,response=b"),
    ("chat", {"dialog": qa("Sky?", "blue"), "topic": "sky"}, "messages=dialog"),
    ("preference", {"query": "Sky?", "chosen_response": "blue", "rejected_response": "green"},
     "prompt=query,chosen=chosen_response,rejected=rejected_response"),
    ("prompt", {"userRequest": "Sky?", "gold": "blue"}, "prompt=userRequest")])
def test_the_proposed_columns_let_an_unknown_layout_be_read(tmp_path: Path, kind: str, row: dict[str, Any],
                                                            proposed: str) -> None:
    store([row], tmp_path)
    known_names = {"chat": ("prompt", "response"), "prompt": ("prompt",),
                   "preference": ("prompt", "chosen", "rejected")}[kind]
    texts = dict(zip(known_names, ("Sky?", "blue", "green"), strict=False))
    (tmp_path / "known.jsonl").write_text(json.dumps(texts) + "\n")
    expected = [(d.messages, d.chosen, d.rejected) for d in read_documents(
        [tmp_path / "known.jsonl"], RecordReading(kind))]
    command = "" if kind == "prompt" else "sov-data pack "  # `rl` reads prompts too
    for file_name in STORED:
        with pytest.raises(UserError, match=f"name yours with `{command}--columns {proposed}`"):
            list(read_documents(list_files(tmp_path / file_name), RecordReading(kind)))
        documents = list(read_documents(list_files(tmp_path / file_name),
                                        RecordReading(kind, renames=parse_renames([proposed]))))
        conversations = [(d.messages, d.chosen, d.rejected) for d in documents]
        assert list_turns(conversations) == list_turns(expected)


def list_turns(rows: Any) -> list[list[list[tuple[str, str]]]]:
    """Return (role, content) of the turns of each side (messages, chosen, rejected) of each row."""
    return [[[(message.role, message.content) for message in side] for side in row] for row in rows]


def test_columns_join_fields_and_refuse_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"ask": "Add.", "more": "1 2", "say": "3", "n": 4}))

    def read(*columns: str) -> Any:
        reading = RecordReading("chat", renames=parse_renames(columns))
        return [[m.content for m in d.messages] for d in read_documents([tmp_path / "a.jsonl"], reading)]

    assert read("prompt=ask+more,response=say") == read("prompt=ask+more", "response=say") == [
        ["Add.\n1 2", "3"]]
    for columns, message in (("prompt=ask,response=says", "has no field 'says', which --columns names"),
                             ("prompt=ask+n,response=say", "has '4' in field 'n', must be a string"),
                             ("prompt", "'prompt' must be TARGET=FIELD"),
                             ("prompt=", "'prompt=' must be TARGET=FIELD"),
                             ("question=ask", "'question' is not a field of records; choose from prompt"),
                             ("text=ask", "is named by --text-field ask"),
                             ("prompt=ask,prompt=more", "named twice; join fields with")):
        with pytest.raises(UserError, match=re.escape(message)):
            read(columns)


@pytest.mark.each("columns", ["question=prompt,answer=response", "prompt=question,answer=response"])
def test_reversed_columns_are_turned_around(columns: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_renames([columns])
    assert refusal.value.fix
    assert refusal.value.fix.words == {columns: "prompt=question,response=answer"}


def test_the_page_has_a_row_for_each_known_layout() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    for layout in LAYOUTS:
        fields = ", ".join(f"`{name}`" for name in layout.fields)
        assert f"| {layout.name} | {fields} | `{layout.reader}`" in page, layout.name


@pytest.mark.parametrize("prompt", ["Sky?", [say("user", "Sky?")]], ids=["text", "messages"])
def test_prompts_end_where_the_answer_begins(tmp_path: Path, folder: Path, encoder: Encoder,
                                             prompt: Any) -> None:
    store([{"prompt": prompt, "answer": "blue"}], tmp_path)
    expected = render_with_transformers(folder, [([say("user", "Sky?")], None)], is_prompt=True)
    assert {stored: pack_ids(encoder, tmp_path / stored, "prompt") for stored in STORED} == dict.fromkeys(
        STORED, expected)


@pytest.mark.each("name", JUDGED)
def test_judged_responses_become_the_same_groups(tmp_path: Path, name: str) -> None:
    store(JUDGED[name], tmp_path)
    for stored in STORED:
        groups = {group.prompt[0]["content"]: (group.responses, group.rewards)
                  for group in iter_groups([tmp_path / stored], GroupTally())}
        blue, green = [say("assistant", "blue")], [say("assistant", "green")]
        assert groups == {"Sky?": ([blue], [1.0]), "Grass?": ([green], [0.0])}


@pytest.mark.each("name", REFUSED)
def test_other_rows_are_refused_with_the_command_that_reads_them(tmp_path: Path, name: str) -> None:
    row, messages = REFUSED[name]
    has_bytes = b"PNG" in repr(row).encode()  # bytes have no JSON form
    if has_bytes:
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    else:
        store([row], tmp_path)
    for kind, message in messages.items():
        for file_name in ("a.parquet",) if has_bytes else STORED:
            with pytest.raises(UserError, match=message):
                list(read_documents(list_files(tmp_path / file_name), RecordReading(kind)))
        if not has_bytes:
            with pytest.raises(UserError, match=r"is a table \(columns: .*to_parquet or to_json"):
                list(read_documents(list_files(tmp_path / "a.csv"), RecordReading(kind)))


def test_judged_pictures_and_chats_as_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**JUDGED["alpaca"][0], "images": ["a.jpg"]}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: has 'images'.* encode-media"):
        list(iter_groups([tmp_path / "a.jsonl"], GroupTally()))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": qa("a", "b")}))
    with pytest.raises(UserError, match="line 1: ends with an answer of the assistant"):
        read_prompts(tmp_path / "b.jsonl", is_asked=True)


def test_rows_whose_types_differ_keep_them(tmp_path: Path) -> None:
    """With `on_mixed_types="use_json"`, `datasets` stores values whose type varies as JSON strings."""
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
        "type": "object", "properties": {"x": {"type": kind}}}}} for kind in ("integer", ["string", "null"])]
    tools *= 2  # one for each of four chats
    chats = [[say("user", "a"), {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": value}}}]},
        {"role": "tool", "content": "r"}, say("assistant", "ok")] for value in (1, "s", {"y": None}, None)]
    rows = [{"messages": chat, "tools": [tool]} for chat, tool in zip(chats, tools, strict=True)]
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "disk")
    for stored in ("a.parquet", "disk"):
        assert read_chats(tmp_path / stored) == [
            (chat, [tool]) for chat, tool in zip(chats, tools, strict=True)]


def test_ignored_fields_of_messages_are_reported_and_counted(
        tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: Rows = [{"messages": qa(f"q{i}", f"a{i}")} for i in range(1, 9)]
    rows[4]["messages"][1] |= {"refusal": None, "annotations": [{"x": 1}]}
    for i in (5, 6):
        rows[i]["messages"][0] |= {"ts": i, "annotations": []}
    rows[7]["messages"][1] |= {"train": True, "name": "bot"}
    names = {"role": "from", "content": "value"}
    sharegpt_rows = [{"conversations": [{names.get(field, field): value for field, value in message.items()}
                                        for message in row["messages"]]} for row in rows]
    for name, layout_rows in (("chat", rows), ("sharegpt", sharegpt_rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in layout_rows))
        for _ in range(2):  # the second run reuses complete units
            pack_sources(folder, [PackSource(name, tmp_path / f"{name}.jsonl")], tmp_path / "out",
                         PackSettings(reading=RecordReading("chat")), overwrite=True)
            assert (f"{name}: does not read ts (2), annotations (1) (fields of messages, with the number of "
                    "messages)") in capsys.readouterr().out
    prompt = {"prompt": [{"role": "developer", "content": "x"}, {**say("user", "q"), "ts": 1}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    assert len(read_prompts(tmp_path / "prompts.jsonl", is_asked=True)) == 1
    assert "prompts.jsonl: does not read ts (fields of messages)" in capsys.readouterr().err
