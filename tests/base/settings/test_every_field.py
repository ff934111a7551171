"""Each field of each class of settings, driven over its bounds and to wrong types from three sources, which
take turns among the cases; `make deep` tries each case from each.  Those of codecs, which need torch, are
tried in their own room."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.cli
from megatron_sov import cli
from megatron_sov.base.command_line import PROGRAMS, fill_commands, parser_with_all
from megatron_sov.base.settings import SettingsError, read_options
from tests.base.settings.every_field import classes_below, find_wrongs


@pytest.mark.deep
@pytest.mark.parametrize("from_all", [False, pytest.param(True, marks=pytest.mark.deep)],
                         ids=["in turns", "all"])
@pytest.mark.parametrize("folder", ["megatron_sov", "data_prep", "tokenizer"])
def test_each_field_is_told_by_its_code_from_every_source(folder: str, from_all: bool) -> None:
    found = list(classes_below(folder, without="codecs"))
    assert len(found) > 3
    assert not [wrong for cls in found for wrong in find_wrongs(cls, from_all=from_all)]


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


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "pretrain": (cli.main, "pretrain tiny-qwen3 --data DIR --run r", "train.steps"),
    "score": (cli.main, "score --reward length --input FILE --output o.jsonl", "max_length"),
    "synth": (data_prep.cli.main, "synth solutions --input FILE --engine http://a:1 --model m --output s",
              "num_draws"),
}
MISTAKES = {
    "{key}": "--set: '{key}' must have the form key=value",
    "{key}=[8": "--set: {key}: [8 begins like JSON and is none",
    "{key}x=1": "{key}x: no such setting; did you mean '{key}'?",
    "{key}=many": '{key} = "many" must be a whole number',
    "{key}=null": "{key} = null must be a whole number; give it a value, or leave it out",
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_told_alike(command: str, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DIR").mkdir()
    Path("FILE").write_text('{"response": "a", "text": "a"}\n')
    main, line, key = COMMANDS[command]
    assert main([*line.split(), "--set", mistake.format(key=key)]) == 2
    said = capsys.readouterr().err
    assert MISTAKES[mistake].format(key=key) in said and len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DIR", "FILE"], "nothing is left behind"
