"""docs/data_journey.md: every command on it runs, in order, and what it shows is what comes out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_prep.cli import main

PAGE = (Path(__file__).parents[4] / "docs/data_journey.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_what_the_page_shows_is_what_comes_out(own_corpus: Path, token_shards: Path,
                                               monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(own_corpus.parent)
    Path("tokenizer").symlink_to(token_shards.parent / "tokenizer")
    shown, = blocks("text")
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 6
    printed = {}
    for command in commands:
        assert main(command[1:]) == 0, command
        printed[" ".join(command)] = capsys.readouterr().out
    assert shown in printed.values()
    assert all("no document found" not in text for text in printed.values())
