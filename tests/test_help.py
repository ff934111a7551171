"""Help for newcomers: every command's help and examples, words of other programs, settings by their last
name, and terminals without UTF-8."""

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.base.command_line import Command
from megatron_sov.base.hints import words
from megatron_sov.base.settings import ActionGroup
from megatron_sov.model.config import find_settings, setting_names
from tests.pages_typed import ENTRIES, parse

ROOT = Path(__file__).parents[1]
ALL = [pytest.param(program, name, command, id=f"{program} {name}") for program, module in ENTRIES.items()
       for name, command in importlib.import_module(module).COMMANDS.items()]


@pytest.mark.each(("program", "name", "command"), ALL)
def test_command_help_ends_with_two_valid_examples_and_its_page(
        program: str, name: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = importlib.import_module(ENTRIES[program]).main([*name.split(), "--help"])
    except SystemExit as e:
        code = e.code
    assert code == 0
    printed = capsys.readouterr().out
    assert "--help" in read_help_entries(printed)
    *_, first, second, page = printed.rstrip().splitlines()
    assert [first, second] == [f"  {program} {line}" for line in command.examples]
    assert page == f"page: docs/{command.page}" and (ROOT / "docs" / command.page).is_file()
    for line in command.examples:
        assert line.startswith(name)
        parse(f"{program} {line}")


ACTIONS = [(program, name, action) for program, module in ENTRIES.items()
           for name, command in importlib.import_module(module).COMMANDS.items()
           if isinstance(group := command.load(), ActionGroup) for action in group.actions]


@pytest.mark.each(("program", "name", "action"), ACTIONS)
def test_the_help_of_an_action_describes_each_option_once(
        program: str, name: str, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        importlib.import_module(ENTRIES[program]).main([*name.split(), action, "--help"])
    assert "--help" in read_help_entries(capsys.readouterr().out)


def read_help_entries(printed: str) -> dict[str, str]:
    """Return option or argument -> description from the sections before the examples.

    Raises AssertionError for an entry without description or a repeated option.
    """
    entries: dict[str, str] = {}
    for section in re.split(r"\n\n(?=\S)", printed.partition("\nexamples:\n")[0])[2:]:
        _, _, listed = section.rstrip().partition(":\n")
        if not listed.startswith(" "):
            continue  # a paragraph
        for entry in re.split(r"\n(?=  ?\S)", listed):
            match = re.fullmatch(r"  ?(\S.*?)(?:  +|\n +)(\S.*)", entry, re.DOTALL)
            assert match, f"{entry!r} has no description"
            for name in re.findall(r"(?:^|, )(--?[\w-]+|\{?[A-Z][\w|./\[\]]*)", match[1]):
                assert name not in entries, f"{name} is listed twice"
                entries[name] = match[2]
    return entries


@pytest.mark.each(("listed", "problem"), [
    ("  --run DIR", "has no description"),
    ("  --run DIR  Run folder\n  --run DIR  Run folder", "--run is listed twice"),
    ("  -r, --run DIR  Run\n                folder\n  --runs DIR\n                Folders", "")])
def test_help_with_an_undescribed_or_repeated_option_is_detected(listed: str, problem: str) -> None:
    printed = f"usage: p\n\ntrain\n\noptions:\n{listed}\n\nexamples:\n  p\n"
    if not problem:
        assert list(read_help_entries(printed)) == ["-r", "--run", "--runs"]
        return
    with pytest.raises(AssertionError, match=problem):
        read_help_entries(printed)


def test_help_groups_commands_in_the_order_of_use(read_output: Any) -> None:
    headings = re.findall(r"^(\S.*):$", read_output("--help"), re.MULTILINE)
    assert [heading.partition(" (")[0] for heading in headings] == [
        "options", "data", "train", "post-train", "evaluate", "serve and publish", "operate"]


@pytest.mark.parametrize("program", ["sov-data", "sov-tokenizer"])
def test_other_programs_group_their_commands(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(ENTRIES[program])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    output = capsys.readouterr().out
    for name, command in module.COMMANDS.items():
        assert re.search(rf"^{command.group}:$", output, re.MULTILINE)
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", output, re.MULTILINE)


@pytest.mark.each(("program", "word", "text"), [
    pytest.param(program, row.split()[0], text, id=f"{program} {row.split()[0]}")
    for program, rows in words.load_table()["commands"].items() for row, text in rows.items()])
def test_words_of_other_programs_lead_to_valid_commands(program: str, word: str, text: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    first, *group = program.split()
    text = text.replace("{python}", shlex.quote(sys.executable)).replace("{word}", word)
    with contextlib.suppress(SystemExit):
        assert importlib.import_module(ENTRIES[first]).main([*group, word, "--anything"]) == 2
    message, _, proposed = capsys.readouterr().err.partition("; write\n")
    assert message.startswith(f"error: {program} {word}: does not exist; ")
    assert [part for part in re.split("`[^`]+`", text) if part.strip().rstrip(":") not in message] == []
    commands = re.findall("`([^`]+)`", text)
    for line in commands:
        if line.split()[0] not in ENTRIES:
            continue  # a program of a library
        assert _begin(line) in message
        if len(line.split()) > 3:
            parse(line)
    # for a command, in contrast to a program option, the message has one line without unknown words
    first = next((_begin(line) for line in commands if " " in _begin(line)), "")
    lines = [line.strip() for line in proposed.partition("\nthis line still has a fault")[0].splitlines()]
    if "{first}" in text:  # several commands
        assert [line.split()[0] for line in lines] == [line.split()[0] for line in commands[0].split(" && ")]
        return
    assert len(lines) == 1 if first else len(lines) <= 1
    for line in lines:
        assert line.startswith(first) and "--anything" not in line
        if line.split()[0] in ENTRIES and "--list" not in line:
            assert "--anything: nothing takes this" in message
            parse(line)


def _begin(line: str) -> str:
    """Return the words of a command before its first option or value."""
    return re.split(r" (?=-|[A-Z])", line)[0]


def test_no_word_of_the_table_is_a_command() -> None:
    """A row for an existing command would never be used."""
    for program, rows in words.load_table()["commands"].items():
        first, *group = program.split()
        commands = {name.split()[len(group)] for name in importlib.import_module(ENTRIES[first]).COMMANDS
                    if name.split()[:len(group)] == group and len(name.split()) > len(group)}
        assert not commands & {word for row in rows for word in row.split()}, program


def test_an_unknown_command_does_not_repeat_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyzzy"]) == 2
    assert capsys.readouterr().err == ("error: megatron-sov xyzzy: does not exist (`megatron-sov --help` "
                                       "lists what there is)\n")


@pytest.mark.each("stage", ["pretrain", "eval-lm", "tokenizer", "chain"])
def test_help_after_a_submit_stage_prints_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(["submit", stage, "--help"]) == 0
    except SystemExit as e:
        assert e.code == 0
    output = capsys.readouterr().out
    assert "--cluster PROFILE" in output
    assert {"pretrain": "--data [NAME=]DIR", "eval-lm": "--tasks A,B", "tokenizer": "`sov-tokenizer --help`",
            "chain": "solar-open-102b"}[stage] in output


@pytest.mark.each(("words", "expected"), [
    ("pretrain tiny-qwen3 --data x --run y --learning-rate=1e-3", "--set optim.lr=1e-3"),
    ("prefer tiny-qwen3 --from x --data y --run z --beta 0.1", "--set preference.beta=0.1"),
    ("rl run tiny-qwen3 --beta 0.1", "--set policy.kl_coeff=0.1"),
    ("pretrain tiny-qwen3 --data x --run y --dta z", "did you mean '--data'?"),
    ("recipes tiny-qwen3 --set lr=1e-3", "--set optim.lr=1e-3"),
    ("recipes tiny-qwen3 --set train.max_steps=9", "--set train.steps=9"),
    ("recipes tiny-qwen3 --set gradient_accumulation_steps=4", "--set train.global_batch_size=4"),
    ("recipes tiny-qwen3 --set bf16=true", "--set train.precision=bf16"),
    ("recipes tiny-qwen3 --set train.stesp=1", "did you mean 'train.steps'?"),
])
def test_a_setting_is_found_by_its_common_name(words: str, expected: str, get_refusal: Any) -> None:
    assert expected in get_refusal(*words.split())


def test_names_of_other_programs_map_to_existing_settings() -> None:
    names = {*setting_names(), "data.phases.0.seq_len"}
    assert {setting.partition("=")[0] for setting in words.load_table()["settings"]} <= names
    assert {str(value).partition("=")[0] for rows in words.load_table()["values"].values()
            for value in rows.values() if "." in str(value)} <= names
    assert find_settings("beta", ("distillation",))[0] == "distillation.beta"
    assert find_settings("nothing_like_this") == []


@pytest.mark.parametrize(("module", "words"), [
    ("megatron_sov.cli", ["예제"]), ("data_prep.cli", ["sample", "예제"]),
    ("tokenizer.cli", ["train", "--ต้น"]), ("megatron_sov.cli", ["recipes", "--help"])])
def test_a_terminal_without_utf_8_gets_no_traceback(module: str, words: list[str]) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, cwd=ROOT, check=False,
        env={**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
             "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)})
    assert completed.returncode == (0 if "--help" in words else 2)
    assert b"Traceback" not in completed.stderr and b"UnicodeEncodeError" not in completed.stderr


def test_actions_show_only_their_own_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "to-hf", "--help"])
    assert capsys.readouterr().out.endswith(
        "\nexamples:\n  megatron-sov convert to-hf runs/sft hf\npage: docs/convert.md\n")
