"""One concept has one option in all programs: the table of CONTRIBUTING.md against the parsers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_sov.base.command_line import PROGRAMS, parser_with_all

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| `(--[\w-]+)` \| ((?:`--[\w-]+` ?)+) \|$", TEXT, re.MULTILINE)

APART = ({"--chat", "--apply-chat-template"}, {"--model", "--judge-model"})
"""Options with one help text: `eval lm` has lm-eval's word, and a judge's model is not the writer's."""


def _below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _below(child)


@cache
def _options() -> dict[str, set[str]]:
    """Return option -> the commands that have it."""
    found: dict[str, set[str]] = {}
    for program in PROGRAMS:
        for parser in _below(parser_with_all(program)):
            for option in parser._option_string_actions:
                found.setdefault(option, set()).add(parser.prog.replace(" [RECIPE]", ""))
    return found


@pytest.mark.parametrize(("concept", "option", "others"), [pytest.param(*row, id=row[1]) for row in ROWS])
def test_a_concept_has_one_option(concept: str, option: str, others: str) -> None:
    assert option in _options(), concept
    assert {other: commands for other in re.findall(r"--[\w-]+", others)
            if (commands := _options().get(other))} == {}


def test_the_table_is_read_whole() -> None:
    assert len(ROWS) >= 14
    options = [option for _, option, _ in ROWS]
    assert len(set(options)) == len(options)
    assert not set(options) & set(re.findall(r"--[\w-]+", " ".join(others for _, _, others in ROWS)))


def test_one_help_text_is_of_one_option() -> None:
    """The same sentence under two names would be two names of one thing."""
    found: dict[str, set[str]] = {}
    for program in PROGRAMS:
        for parser in _below(parser_with_all(program)):
            for action in parser._actions:
                if len((action.help or "").split()) > 4 and action.option_strings:
                    found.setdefault(str(action.help), set()).add(action.option_strings[-1])
    assert {text: names for text, names in found.items() if len(names) > 1 and names not in APART} == {}
