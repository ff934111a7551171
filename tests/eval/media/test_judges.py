"""Judges: a function of somebody's file, or a program; what they give is checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.eval.media import judge_of

FILES, LABELS = [Path("one.png"), Path("two.png")], [("a", "b"), ()]


def test_a_function_of_a_file_judges(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def seen(files, labels):\n"
                    "    return [f'{file.stem} of {len(of)}' for file, of in zip(files, labels)]\n")
    assert judge_of(f"{code}:seen")(FILES, LABELS) == ["one of 2", "two of 0"]


def test_a_program_judges_line_by_line(tmp_path: Path) -> None:
    code = tmp_path / "program"
    code.write_text("import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n"
                    "    print(json.dumps(row['file'] + ''.join(row['labels'])))\n")
    assert judge_of(f"{sys.executable} {code}")(FILES, LABELS) == ["one.pngab", "two.png"]


@pytest.mark.parametrize(("code", "said"), [
    ("def seen(files, labels):\n    return ['a']\n", "gave .* for 2 files"),
    ("def seen(files, labels):\n    return [1, 2]\n", "gave .* for 2 files"),
    ("seen = 3\n", "a judge is a function")])
def test_a_judge_that_is_none_is_refused(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=said):
        judge_of(f"{tmp_path / 'mine.py'}:seen")(FILES, LABELS)


@pytest.mark.parametrize(("command", "said"), [
    ("", "name code of your own"), ("'", "is no command"), ("/nowhere/judge", "/nowhere/judge"),
    ("false", "ended with code 1"), ("echo nothing", "prints a JSON string")])
def test_a_program_that_fails_is_named(command: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        judge_of(command)(FILES, LABELS)


def test_a_program_may_say_any_character(tmp_path: Path) -> None:
    code = tmp_path / "judge.py"
    code.write_text("import json, sys\nfor line in sys.stdin:\n"
                    "    said = json.dumps('a\\u2028b\\x85\\ud55c', ensure_ascii=False)\n"
                    "    sys.stdout.buffer.write((said + '\\n').encode())\n")
    assert judge_of(f"{sys.executable} {code}")(FILES, LABELS) == ["a\u2028b\x85\ud55c"] * 2
