"""The program's entry: fast help without torch, exit codes, and the help of every command."""

import argparse
import ast
import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.base import command_line
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import ActionGroup, DeclaredCommand
from megatron_sov.runs.launch_environment import get_command_start

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "megatron.core")
ENTRIES = {"megatron-sov": "megatron_sov.cli", "sov-tokenizer": "tokenizer.cli", "sov-data": "data_prep.cli"}


def run_main(module: str, *argv: str, heavy: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Run a command's `main` in a fresh interpreter; it ends with exit code 99 when something
    heavy was imported."""
    program = (
        "import importlib, sys\n"
        "sys.argv[0] = sys.argv.pop(1)\n"
        f"try:\n    code = importlib.import_module({module!r}).main()\n"
        "except SystemExit as e:\n    code = e.code\n"
        f"heavy = [m for m in {heavy!r} if m in sys.modules]\n"
        "print('heavy:', heavy, file=sys.stderr) if heavy else None\n"
        "sys.exit(99 if heavy else code)\n"
    )
    return subprocess.run([sys.executable, "-c", program, module, *argv], capture_output=True, text=True,
                          cwd=ROOT, timeout=600, env={**os.environ, "COLUMNS": "200"})


@pytest.mark.each("words", [[], ["--help"]])
@pytest.mark.each("module", ENTRIES.values())
def test_a_program_without_a_command_imports_no_library(module: str, words: list[str]) -> None:
    result = run_main(module, *words, heavy=(*HEAVY, "numpy", "pydantic", "pyarrow", "yaml", "jinja2"))
    assert result.returncode == (0 if words else 2), result.stderr
    assert "heavy" not in result.stderr


@pytest.mark.essential
@pytest.mark.parametrize("program", ENTRIES)
def test_every_command_explains_itself_without_a_heavy_library(program: str) -> None:
    """One interpreter imports the options of all commands, since an
    import stays for the following commands."""
    module = importlib.import_module(ENTRIES[program])
    heavy: tuple[str, ...] = (*HEAVY, "pydantic", "pyarrow", "scipy", "pandas", "sklearn")
    if program == "megatron-sov":  # others have constants of numpy
        heavy += ("numpy",)
    script = (
        f"import sys\nfrom {module.__name__} import main\n"
        f"for command in {list(module.COMMANDS)!r}:\n"
        "    print('@@', command)\n"
        "    try:\n        code = main([*command.split(), '--help'])\n"
        "    except SystemExit as e:\n        code = e.code\n"
        f"    found = [m for m in {heavy!r} if m in sys.modules]\n"
        "    if code or found:\n"
        "        sys.exit(f'{command} --help: exit code {code}, imported {found}')\n")
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
                               timeout=600, env={**os.environ, "COLUMNS": "200"}, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
    outputs = dict(part.split("\n", 1) for part in completed.stdout.split("@@ ")[1:])
    for command, info in module.COMMANDS.items():
        assert f"usage: {program} {command}" in outputs[command]
        assert program != "megatron-sov" or info.help in " ".join(outputs[command].split())


@pytest.mark.each("command", ["convert", "codec", "eval", "tools", "rl store"])
def test_command_list_describes_subcommands(command: str) -> None:
    parser = argparse.ArgumentParser()
    cli.COMMANDS[command].load().add_arguments(parser)
    (actions,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(actions.choices) == set(cli.COMMANDS[command].help.partition(":")[0].split(", "))


@pytest.mark.each("asked", ["--help", "-h", "help"])
def test_help_lists_every_command(asked: str, read_output: Any) -> None:
    printed = read_output(asked)
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in printed
        assert command.help in printed


@pytest.mark.parametrize(("words", "message", "lines"), [
    (["pretrian", "x"], "pretrian: does not exist; did you mean 'pretrain'?",
     ["  megatron-sov pretrain RECIPE --run x"]),
    (["convert", "to-hff"], "convert to-hff: does not exist; did you mean 'to-hf'?", [])])
def test_an_unknown_command_names_the_nearest(words: list[str], message: str, lines: list[str],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: megatron-sov {message}")
    assert printed.err.splitlines()[1:] == lines


@pytest.mark.each("first", sorted({name.split()[0] for name in cli.COMMANDS if " " in name}))
def test_a_command_group_lists_its_subcommands(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert cli.main([first, "--help"]) == 0
    printed = capsys.readouterr().out
    for second, text in cli.list_subcommands(first).items():
        assert re.search(rf"^  {second} +{re.escape(text)}$", printed, re.MULTILINE)


def test_start_time_is_that_of_the_process_or_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    began_s = []

    def run(args: argparse.Namespace) -> int:
        began_s.append(get_command_start())
        return 0

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(command_line.Command, "load", lambda self: module)
    monkeypatch.setattr(cli, "process_started_s", lambda: 1000.0)
    monkeypatch.setattr(cli.time, "time", lambda: 5000.0)
    monkeypatch.setattr(sys, "argv", ["megatron-sov", "doctor"])
    assert cli.main() == cli.main(["doctor"]) == 0
    assert began_s == [1000.0, 5000.0]


REFUSED = (
    "pretrain tiny-solar-opne --data {there} --run r", "pretrain tiny-solar-open --data none --run r",
    "pretrain tiny-solar-open --data {there} --run r --set train.stepz=1",
    "pretrain tiny-solar-open --data {there} --run r --set train.steps=-1",
    "sft tiny-solar-open --data none --from {there} --run r",
    "sft tiny-solar-open --data {there} --from {there} --run r --set train.stepz=1",
    "extend tiny-solar-open --data {there} --from none --run r",
    "extend tiny-solar-open --data {there} --from {there} --run r --set train.stepz=1",
    "generate none --prompt x", "eval ppl none --data {there}",
    "convert to-hf none out", "convert from-hf none out", "convert verify none {there}",
    "convert inspect none")


def test_refusals_that_need_no_torch_come_without_it(tmp_path: Path) -> None:
    """One interpreter for all commands: an import of one would be visible to the following ones."""
    lines = [line.format(there=tmp_path) for line in REFUSED]
    program = (
        "import sys\nfrom megatron_sov.cli import main\n"
        f"for line in {lines!r}:\n"
        "    code = main(line.split())\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    if code != 2 or heavy:\n"
        "        sys.exit(f'{line}: exit code {code}, imported {heavy}')\n"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT,
                               timeout=600, check=False)
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr.count("error: ") == len(lines) and "Traceback" not in completed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.each("line", ["generate Qwen/Qwen3-8B --prompt x", "convert from-hf Qwen/Qwen3-8B out",
                                  "sft tiny-qwen3 --data {there} --from Qwen/Qwen3-8B --run r"])
def test_a_hub_name_is_refused_with_its_download_command(line: str, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.format(there=tmp_path).split()) == ExitCode.USER_ERROR
    assert "run `hf download Qwen/Qwen3-8B --local-dir Qwen3-8B`" in capsys.readouterr().err


def test_importing_the_engine_prepares_megatron() -> None:
    """In an unprepared process megatron compiles its functions: 9 s in the first step on a CPU."""
    tree = ast.parse((ROOT / "megatron_sov/engine/__init__.py").read_text(encoding="utf-8"))
    assert "prepare_without_gpu()" in ast.unparse(tree.body[-1])


def test_every_run_function_exists() -> None:
    """Read from the sources: an import of all modules would take as long as torch."""
    commands = [loaded for command in cli.COMMANDS.values() if isinstance(
        loaded := command.load(), DeclaredCommand)]
    commands += [action for command in cli.COMMANDS.values()
                 if isinstance(group := command.load(), ActionGroup)
                 for action in group.actions.values() if isinstance(action, DeclaredCommand)]
    assert len(commands) > 20
    for declared in commands:
        functions, check = declared.run_function, declared.check
        references = [functions] if isinstance(functions, str) else list(functions.values())
        for reference in [*references, check if isinstance(check, str) else ""]:
            if reference:
                module, _, name = reference.partition(":")
                tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
                assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
