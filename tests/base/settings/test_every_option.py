"""Each option of each command with values that make no sense: one sentence, and never another error."""

from __future__ import annotations

import argparse

import pytest

from megatron_sov.base.command_line import fill_commands
from megatron_sov.base.settings import SettingsError, read_options
from megatron_sov.commands.operate.completion import PROGRAMS, parser_with_all

WORDS = ("", "x", "-1", "0", "1.5", "1e400", "9" * 5000, "nan", "inf", "null", "true", "[8", '{"a": 1}',
         "a\x1b[2J", "\udcff", "\uac00" * 200)


@pytest.mark.deep
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_word_makes_more_than_a_sentence(program: str) -> None:
    tried = 0
    for command in fill_commands(parser_with_all(program)):
        if (cls := command.get_default("options_class")) is None:
            continue
        for action in (a for a in command._actions if getattr(a, "is_setting", False) and a.nargs != 0):
            repeats = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
            for word in WORDS:
                typed = argparse.Namespace(**{action.dest: [word] if repeats else word})
                try:
                    read_options(cls, typed)
                except SettingsError as e:
                    assert str(e).replace("\n", "").isprintable(), (command.prog, word)
                    assert len(str(e)) < 10_000
                tried += 1
    assert tried > 100
