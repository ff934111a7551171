"""A concept has the same option in all programs: parsers agree with the table of CONTRIBUTING.md."""

import argparse
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_sov import cli
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints import words
from megatron_sov.base.hints.commands import PROGRAMS, build_full_parser

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| `(--[\w-]+)` \| ((?:`--[\w-]+` ?)+) \|$", TEXT, re.MULTILINE)

APART = ({"--chat", "--apply-chat-template"}, {"--model", "--judge-model"})
"""Pairs of options that may share a help text: `eval lm` has lm-eval's option, and a judge's model is not the
model that writes."""


def iter_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from iter_parsers(child)


@cache
def list_options() -> dict[str, set[str]]:
    """Return option -> commands with that option."""
    commands: dict[str, set[str]] = {}
    for program in PROGRAMS:
        for parser in iter_parsers(build_full_parser(program)):
            for option in parser._option_string_actions:
                commands.setdefault(option, set()).add(parser.prog.replace(" [RECIPE]", ""))
    return commands


@pytest.mark.each(("concept", "option", "others"), [pytest.param(*row, id=row[1]) for row in ROWS])
def test_a_concept_has_one_option(concept: str, option: str, others: str) -> None:
    assert option in list_options(), concept
    assert {other: commands for other in re.findall(r"--[\w-]+", others)
            if (commands := list_options().get(other))} == {}


def test_all_rows_of_the_table_are_read() -> None:
    assert len(ROWS) >= 14
    options = [option for _, option, _ in ROWS]
    assert len(set(options)) == len(options)
    assert not set(options) & set(re.findall(r"--[\w-]+", " ".join(others for _, _, others in ROWS)))


def test_a_help_text_belongs_to_one_option() -> None:
    """The same sentence under two names would be two names of one thing."""
    options_of_text: dict[str, set[str]] = {}
    for program in PROGRAMS:
        for parser in iter_parsers(build_full_parser(program)):
            for action in parser._actions:
                if len((action.help or "").split()) > 4 and action.option_strings:
                    options_of_text.setdefault(str(action.help), set()).add(action.option_strings[-1])
    assert {text: names for text, names in options_of_text.items()
            if len(names) > 1 and names not in APART} == {}


@pytest.mark.each(("command", "old", "new"), [
    (command, old, new) for command, rows in words.load_table()["renamed"].items()
    for old, new in rows.items()])
def test_an_option_of_the_release_before_is_taken_with_a_note(command: str, old: str, new: str,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    options = list_options()
    commands = options[new] - options.get(old, set()) if command == "*" else {command}
    assert commands and all(one in options[new] and one not in options.get(old, set()) for one in commands)
    parser = argparse.ArgumentParser(prog=sorted(commands)[0])
    parser.add_argument(new)
    for typed, expected in (([old, "x"], [new, "x"]), ([f"{old}=x"], [f"{new}=x"])):
        assert words.translate_options(parser, typed) == expected
        assert capsys.readouterr().err == (f"warning: {old} is called {new} now; the old name goes with the "
                                           "next release\n")
    assert not re.search(rf"{old}(?![\w-])", parser.format_help())


def test_the_old_name_reaches_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: --out is called --output now") and "none" in error


def test_a_removed_option_name_is_not_reused() -> None:
    parser = argparse.ArgumentParser(prog="megatron-sov eval ppl")
    parser.add_argument("--max-tokens")
    assert words.translate_options(parser, ["--max-tokens", "5"]) == ["--max-tokens", "5"]
    parser = argparse.ArgumentParser(prog="megatron-sov generate")
    parser.add_argument("--max-new-tokens")
    with pytest.raises(UserError, match=r"is --max-new-tokens here; write\n.* --max-new-tokens 5"):
        words.translate_options(parser, ["--max-tokens", "5"])
