"""`generate` with media and `eval media`: command lines that are refused, before a model is looked at."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_sov import cli

ROW = '{"content": [{"type": "text", "text": "Draw one."}], "answer": "one"}'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROW)
    Path("bad.jsonl").write_text("{}")
    Path("a.png").write_bytes(b"no picture")
    return tmp_path


@pytest.mark.parametrize(("line", "said"), [
    ("generate run --image none.png", "none.png: is no file"),
    ("generate run --prompt a --out-image drawn", "needs --image-decoder CODEC"),
    ("generate run --prompt a --out-audio said", "needs --vocoder CODEC"),
    ("generate run --image a.png --speculative 1", "--speculative: does not go with media"),
    ("generate run --image a.png --prompts rows.jsonl", "--prompts: does not go with media"),
    ("generate run --image a.png --engine vllm", "does not keep blocks of media whole"),
    ("generate run --image a.png --max-audio-tokens -1", "--max-audio-tokens -1"),
    ("generate run --image a.png --temperature -1", "--temperature -1"),
    ("generate run --image a.png", "run: does not exist"),
    ("eval media . --data smell-text=rows.jsonl --media-root . --files f", "must have the form PAIR=FILE"),
    ("eval media . --data text-image=none.jsonl --media-root . --files f", "cannot be read"),
    ("eval media . --data text-image=bad.jsonl --media-root . --files f", "bad.jsonl:1: is no row"),
    ("eval media . --data text-image=rows.jsonl --media-root . --files f", "needs --image-judge"),
    ("eval media . --data text-image=rows.jsonl --media-root . --files f --image-judge 'a b'",
     "needs --image-decoder CODEC"),
    ("eval media . --data audio-text=rows.jsonl --media-root . --files f --audio-judge none.py:seen",
     "none.py"),
])
def test_a_bad_command_line_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str], line: str,
                                            said: str) -> None:
    assert cli.main(shlex.split(line)) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert sorted(p.name for p in here.iterdir()) == ["a.png", "bad.jsonl", "rows.jsonl"]
