"""What a newcomer types first: help of every command in this process, its examples, words of other programs,
settings by their last name, and terminals without UTF-8."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sov import cli
from megatron_sov.base.command_line import Command
from megatron_sov.commands import COMMANDS, WORDS
from megatron_sov.model.config import find_settings, setting_names
from megatron_sov.model.config.run import COMMON
from tests.pages_typed import ENTRIES, parse

ROOT = Path(__file__).parents[1]
ALL = [pytest.param(program, name, command, id=f"{program} {name}") for program, module in ENTRIES.items()
       for name, command in importlib.import_module(module).COMMANDS.items()]


@pytest.mark.parametrize(("program", "name", "command"), ALL)
def test_the_help_of_a_command_ends_with_two_examples_that_parse_and_its_page(
        program: str, name: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = importlib.import_module(ENTRIES[program]).main([*name.split(), "--help"])
    except SystemExit as e:
        code = e.code
    assert code == 0
    *_, first, second, page = capsys.readouterr().out.rstrip().splitlines()
    assert [first, second] == [f"  {program} {line}" for line in command.examples]
    assert page == f"page: docs/{command.page}" and (ROOT / "docs" / command.page).is_file()
    for line in command.examples:
        assert line.startswith(name)
        parse(f"{program} {line}")


def test_the_help_groups_commands_in_the_order_of_a_models_life(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    headings = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.MULTILINE)
    assert [heading.partition(" (")[0] for heading in headings] == [
        "options", "data", "train", "post-train", "evaluate", "serve and publish", "operate"]


@pytest.mark.parametrize("program", ["sov-data", "sov-tokenizer"])
def test_the_other_programs_group_theirs_too(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(ENTRIES[program])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    said = capsys.readouterr().out
    for name, command in module.COMMANDS.items():
        assert re.search(rf"^{command.group}:$", said, re.MULTILINE)
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", said, re.MULTILINE)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_trade_leads_to_a_command_that_parses(
        word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word not in COMMANDS
    assert cli.main([word, "--anything"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: command '{word}': does not exist; {WORDS[word]}\n"
    for line in re.findall("`([^`]+)`", said):
        if len(line.split()) > 3:
            parse(line)
        else:
            assert cli.named(line.split()[1:])[0] in COMMANDS, line


def test_an_unknown_command_does_not_repeat_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyzzy"]) == 2
    assert capsys.readouterr().err == ("error: command 'xyzzy': does not exist (`megatron-sov --help` lists "
                                       "all)\n")


@pytest.mark.parametrize("stage", ["pretrain", "eval-lm", "tokenizer", "chain"])
def test_help_behind_a_stage_of_submit_is_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(["submit", stage, "--help"]) == 0
    except SystemExit as e:
        assert e.code == 0
    said = capsys.readouterr().out
    assert "--cluster PROFILE" in said
    assert {"pretrain": "--data [NAME=]DIR", "eval-lm": "--tasks A,B", "tokenizer": "`sov-tokenizer --help`",
            "chain": "solar-open-102b"}[stage] in said


@pytest.mark.parametrize(("words", "meant"), [
    ("pretrain tiny-qwen3 --data x --run y --steps 10", "write --set train.steps=10 "),
    ("pretrain tiny-qwen3 --data x --run y --learning-rate=1e-3", "write --set optim.lr=1e-3 "),
    ("prefer tiny-qwen3 --from x --data y --run z --beta 0.1", "write --set preference.beta=0.1 "),
    ("distill tiny-qwen3 --beta 0.1", "write --set distillation.beta=0.1 "),
    ("pretrain tiny-qwen3 --data x --run y --dta z", "did you mean '--data'?"),
    ("recipes tiny-qwen3 --set lr=1e-3", "lr: no such setting; did you mean 'optim.lr'?"),
    ("recipes tiny-qwen3 --set train.lr=1e-3", "did you mean 'optim.lr'?"),
    ("recipes tiny-qwen3 --set max_steps=9", "max_steps: no such setting; did you mean 'train.steps'?"),
    ("recipes tiny-qwen3 --set train.max_steps=9", "did you mean 'train.steps'?"),
    ("recipes tiny-qwen3 --set num_train_epochs=2", "did you mean 'train.epochs'?"),
    ("recipes tiny-qwen3 --set train.num_train_epochs=2", "did you mean 'train.epochs'?"),
    ("recipes tiny-qwen3 --set gradient_accumulation_steps=4", "did you mean 'train.global_batch_size'?"),
    ("recipes tiny-qwen3 --set per_device_train_batch_size=1", "did you mean 'train.micro_batch_size'?"),
    ("recipes tiny-qwen3 --set bf16=true", "did you mean 'train.precision'?"),
    ("recipes tiny-qwen3 --set report_to=wandb",
     "did you mean 'obs.wandb' or 'obs.tensorboard'?"),
    ("recipes tiny-qwen3 --set save_total_limit=2", "did you mean 'train.keep_checkpoints'?"),
    ("pretrain tiny-qwen3 --data x --run y --gradient-accumulation-steps 4",
     "write --set train.global_batch_size=4 "),
    ("recipes tiny-qwen3 --set train.stesp=1", "did you mean 'train.steps'?"),
    ("recipes tiny-qwen3 --set train.steps=ten", 'train.steps = "ten" must be a whole number'),
])
def test_a_setting_is_found_by_what_people_call_it(words: str, meant: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    assert meant in capsys.readouterr().err


def test_names_of_other_programs_lead_to_settings_that_exist() -> None:
    names = {*setting_names(), "data.phases.0.seq_len"}
    assert [meant for word in COMMON for meant in find_settings(word) if meant not in names] == []
    assert find_settings("beta", ("distillation",))[0] == "distillation.beta"
    assert find_settings("nothing_like_this") == []


@pytest.mark.parametrize(("module", "words"), [
    ("megatron_sov.cli", ["예제"]), ("data_prep.cli", ["sample", "예제"]),
    ("tokenizer.cli", ["train", "--ต้น"]), ("megatron_sov.cli", ["recipes", "--help"])])
def test_a_terminal_without_utf_8_gets_no_traceback(module: str, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, cwd=ROOT, check=False,
        env={**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
             "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)})
    assert done.returncode == (0 if "--help" in words else 2)
    assert b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr


def test_text_of_any_language_is_printed_in_ascii_with_escapes() -> None:
    """What `sov-data sample` and `rl store show` print, by the door that all three programs go through."""
    program = ("from megatron_sov.base.command_line import exit_code\n"
               "exit_code(lambda: print('\\ud55c\\uae00 \\u0e44\\u0e17\\u0e22') or 0)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\\ud55c\\uae00 \\u0e44\\u0e17\\u0e22\n"


def test_actions_show_the_examples_that_are_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "to-hf", "--help"])
    assert capsys.readouterr().out.endswith(
        "\nexamples:\n  megatron-sov convert to-hf runs/sft hf\npage: docs/convert.md\n")
