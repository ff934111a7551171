"""Every `UserError` in the source names a thing and gives a rule or a fix. Tests of single mistakes can
then assert code, key or value instead of words."""

import ast
import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("megatron_sov", "data_prep", "tokenizer", "layout_proof")
VALUE = "\0"
"""Stands for what is filled in."""
NAMED = re.compile(rf"{VALUE}|--\w|[`'\"]\w|\w\.\w|\w ?=|^/?\w+:|/\w|\b[A-Z]{{2,}}\b")
"""A value, an option, a quoted name, a setting or file, a label in front, a name in capitals."""
RULE = re.compile(
    r";|\b(must|needs?|cannot|no|not|none|nothing|nobody|neither|only|alone|without|both|missing|empty|"
    r"refuse[sd]?|name[sd]?|before|after|otherwise|says|knows|takes|ended|than|as|has the|numbered|by|"
    r"at most)\b|--help|--\w[\w-]* skip")
DEBRIS = re.compile(r"^\s|\s$|(?<!\.\.)\.$|[,;:]$|[^\n] {2}|\s[,;:](?!\S)|;;|,,| \(\)")


def build_text(node: ast.expr) -> str:
    """Return a message with `VALUE` for each part that is only known when it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(build_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return build_text(node.left) + build_text(node.right)
    return VALUE


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each `UserError` that a source makes."""
    for found in re.finditer(r"(?<!class )\bUserError\(", source):
        rest = source[found.start():]
        for end in itertools.islice(re.finditer(r"\)", rest), 60):  # the first at which the call is whole
            with contextlib.suppress(SyntaxError):
                call = ast.parse(rest[:end.end()], mode="eval").body
                assert isinstance(call, ast.Call)
                yield source.count("\n", 0, found.start()) + 1, build_text(call.args[0]) if call.args else ""
                break


def wrong_with(text: str) -> str:
    """Return the problem of a message, or ""."""
    if DEBRIS.search(text):
        return "has debris"
    if not NAMED.search(text):
        return "names nothing"
    # an inserted reason comes last: its text is checked at its own place
    return "" if RULE.search(text) or re.search(rf"{VALUE}\W*$", text) else "says no rule and no way out"


def test_every_message_follows_the_rules() -> None:
    found = [(path, line, text) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
             for line, text in messages(path.read_text(encoding="utf-8"))]
    assert len(found) > 1000
    assert [f"{path.relative_to(ROOT)}:{line}: {wrong}: {text!r}" for path, line, text in found
            if (wrong := wrong_with(text))] == []


@pytest.mark.each(("call", "wrong"), [
    ('UserError(f"{path}: has no rows; write some")', ""), ('UserError(f"{path}: {reason}")', ""),
    ('UserError(reason)', ""), ('UserError("--top-k: must be 1 or more" + near)', ""),
    ('UserError()', "names nothing"), ('UserError("that must not be")', "names nothing"),
    *((f'UserError(f"{{path}}: {end}")', "has debris") for end in ("has no rows; ", "has no rows.",
                                                                   "has  no rows", "has no rows ()")),
    ('UserError(f"{path}: read {count} rows of it")', "says no rule and no way out")])
def test_a_malformed_message_is_detected(call: str, wrong: str) -> None:
    ((_, text),) = messages(f"raise {call}")
    assert wrong_with(text) == wrong
