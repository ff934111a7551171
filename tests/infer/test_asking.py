"""Prompts from the command line and from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.asking import ModelPrompt, ServerOptions, read_prompts


def test_texts_come_first_then_the_lines_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "수도는", "target": "서울"}\n\n{"prompt": "b", "id": 7}\n', encoding="utf-8")
    assert read_prompts(["a"], file) == [ModelPrompt("a"), ModelPrompt("수도는", "서울"), ModelPrompt("b")]
    assert read_prompts(["a"], None) == [ModelPrompt("a")]


@pytest.mark.parametrize(("line", "sentence"), [
    ("{", "is not valid JSON"),
    ("[" * 200_000, "is not valid JSON"),
    ('["a"]', 'must be an object with "prompt"'),
    ('{"text": "a"}', 'must be an object with "prompt"'),
    ('{"prompt": "a", "n": NaN}', "is not valid JSON"), ('{"prompt": "a", "n": 1e999}', "is not valid JSON"),
    (r'{"prompt": "a", "answer": "\ud800"}', "is not valid JSON"),
    ('{"prompt": "a", "target": 1}', 'must be an object with "prompt"'),
])
def test_a_malformed_line_is_named_by_number(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match=f"prompts.jsonl:2: {sentence}"):
        read_prompts([], file)


def test_nothing_to_ask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to continue"):
        read_prompts([], None)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        read_prompts(["a", ""], None)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read \(No such file or directory\)"):
        read_prompts([], tmp_path / "nowhere.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"--prompts .*a\.jsonl: is empty; pass a JSONL file with a prompt"):
        read_prompts([], tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"cannot be read \(no UTF-8 at byte 2\); pass"):
        read_prompts([], tmp_path / "a.jsonl")


def test_characters_that_end_lines_elsewhere_may_stand_in_a_prompt(tmp_path: Path) -> None:
    file, text = tmp_path / "prompts.jsonl", "a\u2028b\u0085c\u2029d"
    file.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + '\r\n{"prompt": "e"}\n',
                    encoding="utf-8", newline="")
    assert read_prompts([], file) == [ModelPrompt(text), ModelPrompt("e")]


def test_an_address_that_is_none_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--engine-url: must be an address"):
        ServerOptions(engine_url=("localhost:8000",)).places(tmp_path)
