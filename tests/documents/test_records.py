"""One record as a document: what each kind needs, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.documents import (
    Reading,
    list_files,
    read_documents,
)
from megatron_sov.documents.messages import Message, Messages
from megatron_sov.errors import UserError


def read(path: Path) -> list[str]:
    return [d.text for d in read_documents(list_files(path))]


@pytest.mark.parametrize(("line", "rule"), [
    ("{bad", "is not valid JSON"),
    ("[1]", "is a JSON list"),
    ('{"txt": "a"}', "no string field 'text'"),
    ('{"text": 3}', "no string field 'text'"),
    ('{"text": "\\ud800"}', "surrogate"),
    ('{"messages": []}', "non-empty list"),
    ('{"messages": [{"role": "<|end|>", "content": "a"}]}', "must be one of system, user"),
    ('{"messages": [{"role": "user", "content": null}]}', "must be a string"),
    ('{"messages": [{"role": "user", "content": "a"}], "num_prompt_messages": 1}', "at least 1, and not all"),
    ('{"messages": [{"role": "user", "content": "a"}], "num_prompt_messages": true}', "has 'True' in"),
    (b'{"text": "\xb0\xa1"}', "is not UTF-8"),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str | bytes, rule: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + raw + b"\n")
    with pytest.raises(UserError, match=rule) as e:
        read(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl:2" in str(e.value)


PREFERENCES = [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, (Message("user", "p"),), (Message("assistant", "c"),),
     (Message("assistant", "r"),)),
    ({"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}],
      "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
     (Message("user", "p"),), (Message("assistant", "c"),), (Message("assistant", "r"),)),
]


@pytest.mark.parametrize(("record", "prompt", "chosen", "rejected"), PREFERENCES,
                         ids=["strings", "shared beginning"])
def test_preferences_have_a_prompt_and_two_continuations(tmp_path: Path, record: dict[str, object],
                                                         prompt: Messages, chosen: Messages,
                                                         rejected: Messages) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    [found] = read_documents([tmp_path / "a.jsonl"], Reading("preference"))
    assert (found.kind, found.messages, found.chosen, found.rejected) == (
        "preference", prompt, chosen, rejected)


@pytest.mark.parametrize(("record", "rule"), [
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "nothing to prefer"),
    ({"chosen": "c", "rejected": "r"}, "has no prompt"),
    ({"prompt": "p", "chosen": [{"role": "user", "content": "c"}], "rejected": "r"},
     "'chosen' holds no message of the assist"),
    ({"prompt": "p"}, "is a prompt, but --format is preference"),
    ({"text": "t"}, "is plain text, but --format is preference"),
])
def test_malformed_preferences_are_refused(tmp_path: Path, record: dict[str, object], rule: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=rule):
        list(read_documents([tmp_path / "a.jsonl"], Reading("preference")))


def test_a_prompt_keeps_its_other_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "answer": {"value": 4},
                                                  "level": "쉬움"}))
    [found] = read_documents([tmp_path / "a.jsonl"], Reading("prompt"))
    assert found.kind == "prompt" and found.messages == (Message("user", "2 + 2?"),)
    assert json.loads(found.extra) == {"answer": {"value": 4}, "level": "쉬움"}
