"""`--dry-run` of commands that write, told from their options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from data_prep import cli as data_cli
from megatron_sov import cli
from megatron_sov.base.command_line import fill_commands
from megatron_sov.base.settings import options
from megatron_sov.commands.operate.completion import PROGRAMS, parser_with_all
from tokenizer import cli as tokenizer_cli

TRAINED = {"pretrain", "extend", "sft", "prefer", "distill", "rl train", "rl run"}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return name -> parser of every command of our programs."""
    return {parser.prog: parser for program in PROGRAMS for parser in fill_commands(parser_with_all(program))}


def test_every_command_that_writes_or_trains_has_it() -> None:
    without = []
    for name, parser in commands().items():
        cls = parser.get_default("options_class")
        writes = cls is not None and any(given.is_written for given in options._fields(cls))
        trains = name.removeprefix("megatron-sov ") in TRAINED
        if (writes or trains) and "--dry-run" not in parser._option_string_actions:
            without.append(name)
    assert without == []


def test_it_tells_what_is_read_and_written_and_does_nothing(tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    shards, tokenizer, output = tmp_path / "shards", tmp_path / "tokenizer", tmp_path / "out"
    shards.mkdir()
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    words = ["adopt", str(shards), "--tokenizer", str(tokenizer), "--output", str(output), "--heldout", "0.1"]
    assert data_cli.main([*words, "--dry-run"]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["reads", f"{tokenizer}:", "a", "folder", "of", "1", "files,", "2", "bytes"] in told
    assert ["writes", f"{output}:", "new"] in told and ["--heldout", "0.1"] in told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("more", "fate"), [
    ((), "is there: the command goes on with it where it can, else refuses it"),
    (("--overwrite",), "is there, and would be replaced")])
def test_an_output_that_is_there_stays(more: tuple[str, ...], fate: str, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "to-hf", str(tmp_path), str(tmp_path), "--dry-run", *more]
    assert cli.main(words) == 0
    assert f"writes   {tmp_path}: {fate}\n" in capsys.readouterr().out


def test_all_that_is_to_be_read_and_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tokenizer_cli.main(["media", "gone", "--image-tokens", "4", "--output", "out", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert 'TOKENIZER = "gone" does not exist' in said


def test_options_are_checked_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_cli.main(["adopt", "x", "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out"),
                          "--heldout", "2", "--dry-run"]) == 2
    assert "--heldout 2: must be below 1" in capsys.readouterr().err
