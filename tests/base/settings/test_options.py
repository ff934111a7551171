"""Options of a command from a class of settings: what is taken, what help says, and what is refused."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    NO_FLAG, AtLeastOne, Flag, Fraction, ProblemCode, SettingsError, SettingsProblem, add_options,
    read_options)
from megatron_sov.base.settings.options import core_quotas, num_cores


@dataclass(frozen=True)
class ReaderOptions:
    """Settings inside settings."""

    max_bytes: AtLeastOne = 1_000
    """Longest record."""
    slow: bool = True
    """Leave no time."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit."""
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
        """Return what does not fit together."""
        if self.limit and self.overwrite:
            return [SettingsProblem(ProblemCode.RULE, "limit", "goes without --overwrite", self.limit)]
        return []


def parser() -> argparse.ArgumentParser:
    """Return a parser with them."""
    made = Parser(prog="count")
    add_options(made, CountOptions)
    return made


def parse(line: str) -> CountOptions:
    """Return what a line gives."""
    return read_options(CountOptions, parser().parse_args(line.split()))


def test_what_is_typed_is_what_the_fields_hold() -> None:
    assert parse("f --output d") == CountOptions(Path("f"), Path("d"))
    given = parse("f --output d --heldout 0.5 --limit 2e3 --mode fast --width 16 --input a b --input c "
                  "--tag x=1 --tag y --overwrite --max-bytes 1_002 --no-slow --limit 0")
    assert given == CountOptions(Path("f"), Path("d"), 0.5, 0, "fast", 16, (Path("a"), Path("b"), Path("c")),
                                 ("x=1", "y"), True, ReaderOptions(1002, False))
    assert parse("f --output d --limit 2e3").limit == 2_000


def test_names_of_files_that_are_no_utf_8_are_taken_as_they_are() -> None:
    given = parse("\udcff --output d/\udcfe --input a\udcfd b --tag k=\udcfc")
    assert (given.source, given.output, given.inputs, given.tags) == (
        Path("\udcff"), Path("d/\udcfe"), (Path("a\udcfd"), Path("b")), ("k=\udcfc",))


def test_help_is_the_string_under_the_field() -> None:
    said = " ".join(parser().format_help().split())
    for text in ("FILE Text to count, 100 % of it", "--output DIR Folder that is written",
                 "--heldout SHARE Part that is kept (default 0.02)", "--limit N First items",
                 "--mode {plain,fast} How it is done (default plain)", "tags: --tag KEY=VALUE Says what",
                 "--input PATH [PATH ...]", "--overwrite Replace what is there", "--max-bytes N Long",
                 "est record (default 1000)", "--no-slow Leave no time"):
        assert text in said
    assert "made" not in said and "count [-h] --output DIR" in said


@pytest.mark.parametrize(("typed", "code", "key", "sentence"), [
    ("--heldout 1", "bound", "--heldout", "--heldout 1: must be below 1"),
    ("--heldout x", "type", "--heldout", '--heldout "x": must be a number'),
    ("--limit null", "type", "--limit", '--limit "null": must be a whole number'),
    ("--limit 1.5", "type", "--limit", "--limit 1.5: must be a whole number"),
    ("--limit=", "type", "--limit", '--limit "": must be a whole number'),
    ("--mode fasd", "choice", "--mode", "--mode \"fasd\": must be 'plain' or 'fast'; did you mean 'fast'?"),
    ("--width 9", "choice", "--width", '--width "9": must be 8 or 16'),
    ("--input a --input=", "type", "--input", "--input: is empty, where a file or folder is to be named"),
    ("--max-bytes 0", "bound", "--max-bytes", "--max-bytes 0: must be at least 1"),
    ("--max-bytes 3", "rule", "--max-bytes", "--max-bytes 3: must be even"),
    ("--limit 3 --overwrite", "rule", "--limit", "--limit 3: goes without --overwrite"),
])
def test_what_is_wrong_is_told_under_the_name_that_was_typed(typed: str, code: str, key: str,
                                                             sentence: str) -> None:
    with pytest.raises(SettingsError) as e:
        parse(f"f --output d {typed}")
    assert (e.value.codes, str(e.value)) == ([(code, key)], sentence)


def test_all_that_is_wrong_is_told_at_once_and_in_order() -> None:
    with pytest.raises(SettingsError) as e:
        parse("f --output d --max-bytes 0 --limit x --heldout 7")
    assert [key for _, key in e.value.codes] == ["--heldout", "--limit", "--max-bytes"]
    assert str(e.value).startswith("command line: 3 problems\n")


def test_what_must_be_there_is_asked_for() -> None:
    with pytest.raises(UserError, match="required: FILE, --output"):
        parse("")


def test_cores_are_bounded_by_the_quotas_of_control_groups(tmp_path: Path) -> None:
    """One tree of all controllers, one for each, and a container, whose own group is the root."""
    one, each, inside = (tmp_path / name for name in ("one", "each", "inside"))
    for file, text in (("one/cpu.max", "max 100000"), ("one/jobs/cpu.max", "250000 100000"),
                       ("one/jobs/7/cpu.max", "max 100000"), ("inside/cpu.max", "50000 100000"),
                       ("each/cpu/box/cpu.cfs_quota_us", "-1"), ("each/cpu/box/cpu.cfs_period_us", "100000"),
                       ("each/cpu/cpu.cfs_quota_us", "300000"), ("each/cpu/cpu.cfs_period_us", "100000")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{text}\n")
    assert list(core_quotas("0::/jobs/7\n", one)) == [2.5]
    assert list(core_quotas("5:pids:/x\n4:cpu,cpuacct:/box\n", each)) == [3.0]
    assert list(core_quotas("0::/not/seen/here\n", inside)) == [0.5]
    assert list(core_quotas("0::/\n", tmp_path)) == [] and num_cores() >= 1
