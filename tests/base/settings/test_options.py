"""Options from settings classes: parsing, help, problems and dry runs."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from data_prep import cli as data_cli
from megatron_sov import cli
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.commands import PROGRAMS, build_full_parser, import_commands
from megatron_sov.base.settings import (
    NO_FLAG, AtLeastOne, Flag, Fraction, ProblemCode, SettingsError, SettingsProblem, add_options, options,
    read_options)
from megatron_sov.base.settings.options import count_cores, iter_core_quotas
from megatron_sov.commands.rl.options import RlGenerateOptions
from tokenizer import cli as tokenizer_cli


@dataclass(frozen=True)
class ReaderOptions:
    """Settings inside settings."""

    max_bytes: AtLeastOne = 1_000
    """Longest record."""
    slow: bool = True
    """Leave no time."""

    def problems(self) -> list[SettingsProblem]:
        """Return the broken rules."""
        odd = self.max_bytes % 2
        return [SettingsProblem(ProblemCode.RULE, "max_bytes", "must be even", self.max_bytes)] if odd else []


@dataclass(frozen=True)
class CountOptions:
    """Options of a command."""

    source: Annotated[Path, Flag("FILE")]
    """Text to count, 100 % of it."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder that is written."""
    heldout_share: Annotated[Fraction, Flag("--heldout", "SHARE")] = 0.02
    """Part that is kept."""
    limit: int | None = None
    """First items alone (default: all)."""
    mode: Literal["plain", "fast"] = "plain"
    """How it is done."""
    width: Literal[8, 16] = 8
    """Bits."""
    inputs: Annotated[tuple[Path, ...], Flag("--input", many=True)] = ()
    """More of them."""
    tags: Annotated[tuple[str, ...], Flag("--tag", "KEY=VALUE", group="tags")] = ()
    """Says what it is; may be repeated."""
    overwrite: bool = False
    """Replace what is there."""
    reader: ReaderOptions = field(default_factory=ReaderOptions)
    made: Annotated[object, NO_FLAG] = None

    def problems(self) -> list[SettingsProblem]:
        """Return the broken rules."""
        if self.limit and self.overwrite:
            return [SettingsProblem(ProblemCode.RULE, "limit", "goes without --overwrite", self.limit)]
        return []


def parser() -> argparse.ArgumentParser:
    """Return a parser with them."""
    count_parser = Parser(prog="count")
    add_options(count_parser, CountOptions)
    return count_parser


def parse(line: str) -> CountOptions:
    """Parse a command line."""
    return read_options(CountOptions, parser().parse_args(line.split()))


def test_read_options_converts_typed_values() -> None:
    assert parse("f --output d") == CountOptions(Path("f"), Path("d"))
    parsed = parse("f --output d --heldout 0.5 --limit 2e3 --mode fast --width 16 --input a b --input c "
                  "--tag x=1 --tag y --overwrite --max-bytes 1_002 --no-slow --limit 0")
    assert parsed == CountOptions(Path("f"), Path("d"), 0.5, 0, "fast", 16, (Path("a"), Path("b"), Path("c")),
                                 ("x=1", "y"), True, ReaderOptions(1002, False))
    assert parse("f --output d --limit 2e3").limit == 2_000


def test_read_options_keeps_non_utf8_file_names() -> None:
    parsed = parse("\udcff --output d/\udcfe --input a\udcfd b --tag k=\udcfc")
    assert (parsed.source, parsed.output, parsed.inputs, parsed.tags) == (
        Path("\udcff"), Path("d/\udcfe"), (Path("a\udcfd"), Path("b")), ("k=\udcfc",))


def test_help_is_the_field_docstring() -> None:
    output = " ".join(parser().format_help().split())
    for text in ("FILE Text to count, 100 % of it", "--output DIR Folder that is written",
                 "--heldout SHARE Part that is kept (default 0.02)", "--limit N First items",
                 "--mode {plain,fast} How it is done (default plain)", "tags: --tag KEY=VALUE Says what",
                 "--input PATH [PATH ...]", "--overwrite Replace what is there", "--max-bytes N Long",
                 "est record (default 1000)", "--no-slow Leave no time"):
        assert text in output
    assert "made" not in output and "count [-h] --output DIR" in output


@pytest.mark.each(("typed", "code", "key", "message"), [
    ("--heldout 1", "bound", "--heldout", "--heldout 1: must be below 1"),
    ("--heldout x", "type", "--heldout", '--heldout "x": must be a number'),
    ("--limit null", "type", "--limit",
     '--limit "null": must be a whole number; leave it out for the default'),
    ("--limit 1.5", "type", "--limit", "--limit 1.5: must be a whole number"),
    ("--limit=", "type", "--limit", '--limit "": must be a whole number'),
    ("--mode fasd", "choice", "--mode", "--mode \"fasd\": must be 'plain' or 'fast'; did you mean 'fast'?"),
    ("--width 9", "choice", "--width", '--width "9": must be 8 or 16; leave it out for the default'),
    ("--input a --input=", "type", "--input", "--input: is empty, where a file or folder is to be named"),
    ("--max-bytes 0", "bound", "--max-bytes", "--max-bytes 0: must be at least 1"),
    ("--max-bytes 3", "rule", "--max-bytes", "--max-bytes 3: must be even"),
    ("--limit 3 --overwrite", "rule", "--limit", "--limit 3: goes without --overwrite"),
])
def test_problems_name_the_typed_option(typed: str, code: str, key: str, message: str) -> None:
    with pytest.raises(SettingsError) as e:
        parse(f"f --output d {typed}")
    assert (e.value.codes, str(e.value)) == ([(code, key)], message)


def test_all_option_problems_are_reported_in_order() -> None:
    with pytest.raises(SettingsError) as e:
        parse("f --output d --max-bytes 0 --limit x --heldout 7")
    assert [key for _, key in e.value.codes] == ["--heldout", "--limit", "--max-bytes"]
    assert str(e.value).startswith("command line: 3 problems\n")


def test_missing_required_option_is_reported() -> None:
    with pytest.raises(UserError, match="required: FILE, --output"):
        parse("")


def test_core_count_respects_cgroup_quotas(tmp_path: Path) -> None:
    """One tree of all controllers, one for each, and a container, whose own group is the root."""
    one, each, inside = (tmp_path / name for name in ("one", "each", "inside"))
    for file, text in (("one/cpu.max", "max 100000"), ("one/jobs/cpu.max", "250000 100000"),
                       ("one/jobs/7/cpu.max", "max 100000"), ("inside/cpu.max", "50000 100000"),
                       ("each/cpu/box/cpu.cfs_quota_us", "-1"), ("each/cpu/box/cpu.cfs_period_us", "100000"),
                       ("each/cpu/cpu.cfs_quota_us", "300000"), ("each/cpu/cpu.cfs_period_us", "100000")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{text}\n")
    assert list(iter_core_quotas("0::/jobs/7\n", one)) == [2.5]
    assert list(iter_core_quotas("5:pids:/x\n4:cpu,cpuacct:/box\n", each)) == [3.0]
    assert list(iter_core_quotas("0::/not/seen/here\n", inside)) == [0.5]
    assert list(iter_core_quotas("0::/\n", tmp_path)) == [] and count_cores() >= 1


TRAINED = {"pretrain", "extend", "sft", "prefer", "distill", "rl train", "rl run"}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return name -> parser of every command of our programs."""
    return {parser.prog: parser for program in PROGRAMS
            for parser in import_commands(build_full_parser(program))}


def test_every_writing_command_has_dry_run() -> None:
    without = []
    for name, parser in commands().items():
        cls = parser.get_default("options_class")
        writes = cls is not None and any(option.is_written for option in options._iter_options(cls))
        trains = name.removeprefix("megatron-sov ") in TRAINED
        if (writes or trains) and "--dry-run" not in parser._option_string_actions:
            without.append(name)
    assert without == []


def write_groups(folder: Path) -> list[str]:
    """Write a file of judged responses and return the command line that turns it into chats."""
    row = {"prompt": "1+1?", "responses": [{"content": "2", "reward": 1.0}, {"content": "3", "reward": 0.0}]}
    (folder / "judged.jsonl").write_text(json.dumps(row) + "\n")
    return ["groups", "--input", str(folder / "judged.jsonl"), "--output", str(folder / "out")]


def test_dry_run_lists_inputs_and_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write_groups(tmp_path)
    assert data_cli.main([*words, "--keep-unfinished", "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["reads", f"{tmp_path}/judged.jsonl:", "100", "bytes"] in lines
    assert ["writes", f"{tmp_path}/out:", "new"] in lines and ["with", "--keep-unfinished"] in lines
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_like_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*write_groups(tmp_path), "--dry-run"]
    assert data_cli.main(words[:-1]) == 0
    assert data_cli.main([*words, "--overwrite"]) == 0
    assert f"writes   {tmp_path}/out: exists, and would be replaced\n" in capsys.readouterr().out
    assert data_cli.main(words) == 2
    assert "out: already exists" in capsys.readouterr().err
    assert "exists: the command continues it" in options.format_dry_run((), [tmp_path], (), overwrite=False)
    words = ["eval", "lm", str(tmp_path), "--tasks", "a", "--output", str(tmp_path / "a.json"), "--dry-run"]
    assert cli.main(words) == 2
    assert f"{tmp_path}: " in capsys.readouterr().err


def test_dry_run_reports_a_missing_input(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenizer_cli.main(["media", "gone", "--image-tokens", "4", "--output", "out", "--dry-run"]) == 2
    assert "gone: does not exist" in capsys.readouterr().err
    # a command whose checks need torch
    assert cli.main(["codec", "import", "mimi", "gone", "out", "--dry-run"]) == 2
    assert 'FILE_OR_DIR = "gone" does not exist' in capsys.readouterr().err


def test_dry_run_accepts_an_input_that_another_job_creates(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, RlGenerateOptions)
    typed = parser.parse_args(["--from", str(tmp_path), "--prompts", str(tmp_path), "--store",
                               str(tmp_path / "store"), "--run", str(tmp_path / "new"), "--dry-run"])
    plan = options._describe_paths(read_options(RlGenerateOptions, typed), typed)
    assert f"{tmp_path}/new: does not exist yet\n" in plan


def test_dry_run_checks_options_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_cli.main(["adopt", "x", "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out"),
                          "--heldout", "2", "--dry-run"]) == 2
    assert "--heldout 2: must be below 1" in capsys.readouterr().err
