"""Texts that differ in their line ends only become equal documents in every format."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.cli import main
from data_prep.curate.line_ends import unify_line_ends

_WORDS = """the of and to in is was he for it with as his on be at by had not are but from or have an
they which one you were her all she there would their we him been has when who will river mountain teacher
window garden letter market engine bridge forest winter"""
VOCABULARY = _WORDS.split()


def build_plain_text(seed: int) -> str:
    """Return 12 paragraphs of 3 lines, with \\n as line ends."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(VOCABULARY, k=12)).capitalize() + "." for _ in range(36)]
    return "\n\n".join("\n".join(lines[start:start + 3]) for start in range(0, 36, 3)) + "\n"


LINE_ENDS = {
    "lf": lambda text: text, "crlf": lambda text: text.replace("\n", "\r\n"),
    "twice": lambda text: text.replace("\n", "\r\r\n"),
    "spaces": lambda text: text.replace("\n\n", "\n   \n"),
    "wide": lambda text: text.replace("\n\n", "\n\u3000\u2003\n"),
    "mixed": lambda text: text.replace(".\n\n", ". \r\n\t\r", 3).replace(".\n", ".\xa0\n", 9),
    "page": lambda text: text.replace(".\n\n", ".\n\f"),
    "separators": lambda text: text.replace(".\n", ".\u2028").replace("\u2028\n", "\u2029\n")}
"""Name -> function that changes the line ends of a text."""


@pytest.mark.parametrize("line_ends", LINE_ENDS)
def test_texts_with_other_line_ends_become_equal(line_ends: str) -> None:
    for seed in range(3):
        assert unify_line_ends(LINE_ENDS[line_ends](build_plain_text(seed))) == build_plain_text(seed)


@pytest.mark.parametrize(("text", "unified"), [
    ("  indented\n\tmore", "  indented\n\tmore"), ("a\n\n\n\nb", "a\n\n\n\nb"), ("a  b\t c", "a  b\t c"),
    ("\n\na", "\n\na"), ("a \n", "a\n"), (" \n \n", "\n\n"), ("", ""), ("a\u200b \nb", "a\u200b\nb"),
    ("wait\x85 then", "wait\x85 then"),  # \x85 is an ellipsis of Windows-1252, not a line end
    # "citt\u00e0" read as Latin-1, which the step `encoding` restores if its \xa0 stays
    ("citt\u00c3\xa0 \ne", "citt\u00c3\xa0\ne"),
    ("ไทย \r\n한국어\u3000\r\n日本語", "ไทย\n한국어\n日本語")])
def test_only_line_ends_change(text: str, unified: str) -> None:
    assert unify_line_ends(text) == unified
    assert unify_line_ends(unified) == unified


def test_only_the_line_ends_of_code_change() -> None:
    code = "def f():\r\n    return 'a  '  \r\n\r\n\f\n \t\nif x:\r\tpass"
    assert unify_line_ends(code, is_code=True) == "def f():\n    return 'a  '  \n\n\f\n \t\nif x:\n\tpass"


def test_whitespace_takes_linear_time() -> None:
    assert unify_line_ends("a" + " " * 2_000_000 + "b" + "\r" * 1_000_000).count("\n") == 1_000_000


@pytest.mark.parametrize(("format_", "kind"), [("code", ""), ("jsonl", "math_code")])
def test_a_run_keeps_the_indentation_of_code(tmp_path: Path, format_: str, kind: str) -> None:
    code = "def greet(name):\r\n    text = 'Good morning, '  \r\n\t\r\n    return text + name\r\n"
    (tmp_path / "raw").mkdir()
    if format_ == "code":
        (tmp_path / "raw/a.py").write_bytes(code.encode())
    else:
        (tmp_path / "raw/a.jsonl").write_text(json.dumps({"text": code}))
    source = {"name": "s", "path": ["raw"], "format": format_, "kind": kind}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "sources": [source],
                                                     "steps": [{"exact_dedup": {"partitions": 1}}]}))
    assert main(["run", str(tmp_path / "p.yaml"), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    file, = (tmp_path / "out/text").glob("*/*.parquet")
    assert pq.read_table(file).column("text").to_pylist() == [code.replace("\r\n", "\n")]
