"""Prompts of rounds: identified by content, ordered by a function, and each used once in an epoch."""

import hashlib
import json
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from megatron_sov.base.documents.layouts import parse_renames
from megatron_sov.base.errors import UserError
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.rollouts.prompts import (
    PromptList, RolloutPrompt, find_unused_rows, read_prompts, read_too_long, write_unused_rows)
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.rows import read_domain


def build_prompts(count: int) -> PromptList:
    return PromptList.from_prompts(RolloutPrompt(f"{i:016x}", {"prompt": str(i)}) for i in range(count))


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_prompts_are_identified_by_content(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", '{"prompt": "1+1", "answer": "2"}', "",
                       '{"messages": [{"role": "user", "content": "hi"}], "tools": []}')
    plain, chat = read_prompts(file)
    reordered, _ = read_prompts(write_lines(tmp_path / "b.jsonl", '{"answer": "2",   "prompt": "1+1"}',
                                      '{"question": "a task"}'))
    assert plain == reordered and plain.id != chat.id and len(plain.id) == 16
    assert (plain.place, chat.place) == ("line 1", "line 3")
    assert [m.content for m in (*plain.conversation().messages, *chat.conversation().messages)] == ["1+1",
                                                                                                    "hi"]


def test_duplicate_prompts_are_used_once_and_broken_lines_named(tmp_path: Path) -> None:
    lines = ('{"prompt": "a"}', '{"prompt": "b"}', '{ "prompt":"a"}', '{"prompt": "c"}')
    prompts = read_prompts(write_lines(tmp_path / "twice.jsonl", *lines))
    assert [(p.record["prompt"], p.place, prompts.repeats.get(p.id, [])) for p in prompts] == [
        ("a", "line 1", ["line 3"]), ("b", "line 2", []), ("c", "line 4", [])]
    with pytest.raises(UserError, match="line 2: holds half"):
        read_prompts(write_lines(tmp_path / "half.jsonl", '{"prompt": "a"}', r'{"prompt": "\ud800"}'))
    with pytest.raises(UserError, match="line 2: is not JSON"):
        read_prompts(write_lines(tmp_path / "broken.jsonl", '{"prompt": "a"}', "{"))
    with pytest.raises(UserError, match=r"JSON object$"):
        read_prompts(write_lines(tmp_path / "empty.jsonl"))


@pytest.mark.each("form", ["parquet", "arrow", "folder", "json"])
def test_tables_and_dataset_folders_use_their_column_names(form: str, tmp_path: Path) -> None:
    """Rows of GSM8K have a question and an answer; table rows have null for missing values."""
    rows = [{"question": "1+1", "solution": "2", "tests": ["assert 1"], "target_tokens": None},
            {"question": "2+2", "solution": "4", "tests": [], "target_tokens": 7},
            {"question": "1+1", "solution": "2", "tests": ["assert 1"], "target_tokens": None}]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:  # as `save_to_disk` writes it
        file = path if form == "arrow" else path / "data-00000-of-00001.arrow"
        file.parent.mkdir(exist_ok=True)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    if form == "folder":
        (path / "state.json").write_text('{"_data_files": []}')
    expected = read_prompts(write_lines(
        tmp_path / "a.jsonl", '{"prompt": "1+1", "answer": "2", "tests": ["assert 1"]}',
        '{"prompt": "2+2", "answer": "4", "tests": [], "target_tokens": 7}'))
    result = read_prompts(path, parse_renames(["prompt=question,answer=solution"], ()))
    assert result == expected and [len(places) for places in result.repeats.values()] == [1]
    assert result[0].conversation().messages[0].content == "1+1"
    with pytest.raises(UserError, match="field 'ask', which --columns"):
        read_prompts(path, parse_renames(["prompt=ask"], ()))


def test_columns_name_a_field_of_an_inner_object(tmp_path: Path) -> None:
    """verl keeps the answer in reward_model.ground_truth."""
    file = tmp_path / "verl.jsonl"
    file.write_text(json.dumps({"prompt": "1 + 1?", "reward_model": {"ground_truth": "2"}}))
    prompts = read_prompts(file, parse_renames(["answer=reward_model.ground_truth"], ()))
    assert [prompt.record["answer"] for prompt in prompts] == ["2"]


def test_values_outside_json_are_named_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "raw": [b"\0", b"\1"]}), tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match=r"(?s)--prompts .*bytes.parquet:1, .*:2: holds a value that "):
        read_prompts(tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match=r"--prompts .*nowhere"):
        read_prompts(tmp_path / "nowhere")
    pq.write_table(pa.table({"prompt": ["a"], "day": pa.array([2**31 - 1], pa.date32())}),
                   tmp_path / "days.parquet")
    with pytest.raises(UserError, match=r"--prompts .*days.parquet:1:"):
        read_prompts(tmp_path / "days.parquet")
    (tmp_path / "no text \udcff.json").write_text('{"prompt": "a", "domain": null}')
    [prompt] = read_prompts(tmp_path / "no text \udcff.json")
    assert prompt.place.endswith("\udcff.json:1") and read_domain(prompt.record) == ""
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"--prompts .*empty.parquet: has no rows"):
        read_prompts(tmp_path / "empty.parquet")


def test_suspicious_files_of_a_folder_are_reported(tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / f"data/{split}/rows.jsonl").write_text(json.dumps({"prompt": split}))
    (tmp_path / "data/model.bin").write_bytes(b"1")
    assert len(read_prompts(tmp_path / "data")) == 2
    errors = capsys.readouterr().err
    assert "--prompts" in errors and "model.bin" in errors and "splits" in errors
    assert "as one source" in errors


def test_excluded_prompts_are_listed_and_shared_through_the_store(tmp_path: Path) -> None:
    prompts = read_prompts(write_lines(tmp_path / "p.jsonl", *(f'{{"prompt": "{c}"}}' for c in "abac")))
    too_long = {prompts[2].id: 1212}
    unused = find_unused_rows(prompts, too_long, 1024)
    assert unused.account.describe() == ("4 prompts read: 2 asked, 2 set aside (1 longer than "
                                        "rollout.max_prompt_tokens = 1,024, 1 same as another one)")
    assert [row["why"] for row in unused.rows] == [
        "is the same as line 1", "has 1,212 tokens, more than rollout.max_prompt_tokens = 1,024"]
    assert read_too_long(tmp_path) == set()
    for _ in range(2):  # another job sets the same aside
        write_unused_rows(tmp_path, unused)
    assert read_too_long(tmp_path) == set(too_long)
    assert json.loads((tmp_path / "set_aside.json").read_text())["prompts"][1]["place"] == "line 4"
    nothing_unused = find_unused_rows(PromptList.from_prompts(prompts[:2]), {}, 1024)
    with pytest.raises(UserError, match=r"set_aside.json: other prompts"):
        write_unused_rows(tmp_path, nothing_unused)
    assert nothing_unused.account.describe() == "2 prompts read: 2 asked, 0 set aside"
    with pytest.raises(RuntimeError, match="4 prompts read: 1"):
        find_unused_rows(prompts[1:2], {}, 1024)


def test_prompts_are_read_on_demand_and_sent_to_other_processes() -> None:
    prompts = build_prompts(7)
    selected = prompts[1:6].exclude([prompts[3].id])
    assert selected.ids == [prompts[i].id for i in (1, 2, 4, 5)] == pickle.loads(pickle.dumps(selected)).ids
    assert pickle.loads(pickle.dumps(selected)) == selected == [prompts[i] for i in (1, 2, 4, 5)]
    assert selected.read_record(prompts[4].id) == {"prompt": "4"}
    for reordered in (prompts[0].id, prompts[3].id, "f" * 16):
        with pytest.raises(KeyError):
            selected.read_record(reordered)


def test_unusable_prompts_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt": "a"}', '{"task": "a"}', '{"prompt": 3}',
                     '{"prompt": "a", "messages": []}')
    with pytest.raises(UserError, match=r"(?s)3 bad rows.*line 2: has no 'prompt'.*line 3: .*"
                                        r"line 4: has 'prompt' and 'messages'"):
        read_prompts(path, is_asked=True)
    assert len(read_prompts(path)) == 4  # as tasks of an environment


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_every_prompt_once_in_an_epoch_and_never_twice_in_a_round(count: int, round_size: int,
                                                                  seed: int) -> None:
    prompts, rollout = build_prompts(count), RolloutConfig(prompts_per_round=round_size, seed=seed)
    if round_size > count:
        with pytest.raises(UserError, match=f"there are {count} prompts"):
            select_round_prompts(prompts, rollout, 1)
        return
    num_epochs = 5
    num_rounds = math.ceil(num_epochs * count / round_size)
    rounds = [select_round_prompts(prompts, rollout, n + 1) for n in range(num_rounds)]
    assert all(len({p.id for p in round_prompts}) == round_size for round_prompts in rounds)
    prompt_ids = [p.id for round_prompts in rounds for p in round_prompts][:num_epochs * count]
    for epoch in range(num_epochs):
        assert Counter(prompt_ids[epoch * count:(epoch + 1) * count]) == Counter(p.id for p in prompts)


def test_ids_are_the_records_own_hash(tmp_path: Path) -> None:
    record = {"prompt": "물", "n": 1.5}
    (round_prompts,) = read_prompts(write_lines(tmp_path / "p.jsonl", json.dumps(record)))
    canonical = '{"n":1.5,"prompt":"물"}'
    assert round_prompts.id == hashlib.sha256(canonical.encode()).hexdigest()[:16]


@pytest.mark.each("name", ["prompt", "messages", "dialog"])
def test_nulls_with_which_a_table_fills_messages_go(tmp_path: Path, name: str) -> None:
    def chat(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "get", "arguments": arguments}}]}, {"role": "tool", "content": "r"}]

    rows = [{name: chat({"city": "Seoul", "day": None}), "tests": {"a": 1, "b": None}},
            {name: chat({"unit": "C", "day": None}), "tests": {"a": None, "b": 2}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    renames = parse_renames([f"prompt={name}"], ()) if name == "dialog" else ()
    result = read_prompts(tmp_path / "a.parquet", renames, is_asked=True)
    calls = [prompt.conversation().messages[1].tool_calls[0]["function"]["arguments"] for prompt in result]
    assert calls == [{"city": "Seoul", "day": None}, {"unit": "C", "day": None}]
    assert [prompt.record["tests"] for prompt in result] == [row["tests"] for row in rows]
