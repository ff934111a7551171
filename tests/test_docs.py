"""The pages tell the truth: commands parse, links lead somewhere, the list of settings is fresh."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from megatron_sov import cli, recipes
from megatron_sov.command_line import Parser
from megatron_sov.config import apply_settings
from megatron_sov.errors import UserError
from megatron_sov.plugins.loading import is_reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
TRAINS = ("pretrain", "extend", "sft", "prefer", "distill", "rl run", "rl train")


def commands_of(text: str) -> list[str]:
    """Return our commands in the fenced blocks of a page, with continued lines joined and prompts
    and folders removed."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks
             for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [line for line in lines if line.split(" ")[0] in ENTRIES]


def parse(line: str) -> argparse.Namespace:
    """Parse a command with the parser that it would meet."""
    program, *argv = shlex.split(line, comments=True)
    if program != "megatron-sov":
        return importlib.import_module(ENTRIES[program]).build_parser().parse_args(argv)
    name, rest = cli.named(argv)
    parser = Parser(prog=f"megatron-sov {name}")
    importlib.import_module(cli.COMMANDS[name].module).add_arguments(parser)
    return parser.parse_args(rest)


COMMANDS = [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES
            for line in commands_of(page.read_text())]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_on_a_page_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line", [c for c in COMMANDS if " --set " in c.values[0]
             and cli.named(c.values[0].split()[1:])[0] in TRAINS])
def test_every_setting_on_a_page_is_one_that_the_recipe_takes(line: str) -> None:
    args = parse(line)
    # tests/test_own_code.py runs those with a recipe of one's own
    if args.recipe is None or is_reference(args.recipe):
        assert args.config is not None or line in commands_of((ROOT / "docs/own_code.md").read_text())
        return
    changed = apply_settings(recipes.get(args.recipe), args.settings)
    assert changed._phase_problems() == []


def test_commands_are_found_and_wrong_ones_fail() -> None:
    text = "megatron-sov outside\n```bash\n$ megatron-sov doctor \\\n  --json  # why\nls\n"
    text += ".venv/bin/megatron-sov doctor --jsno\n```\n"
    good, bad = commands_of(text)
    assert parse(good).json is True
    with pytest.raises(UserError, match="--jsno"):
        parse(bad)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = [[len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()] for table in tables]
    assert [table.splitlines()[0] for table, counts in zip(tables, cells, strict=True)
            if len(set(counts)) > 1] == []


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\(([a-z0-9_]+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert listed == {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_the_readme_lists_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in cli.COMMANDS if f"`megatron-sov {name}`" not in readme] == []
    for program in ("sov-data", "sov-tokenizer"):
        told = " ".join(re.findall(rf"^\| (`{program} .*?) \|", readme, re.MULTILINE))
        commands = importlib.import_module(ENTRIES[program]).COMMANDS
        assert [name for name in commands if not re.search(rf"[` ]{name}`", told)] == []


def test_the_readme_shows_every_room() -> None:
    tree = (ROOT / "README.md").read_text().partition("## The rooms")[2]
    rooms = [f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / "megatron_sov").iterdir()
             if not p.name.startswith("_") and (p.suffix == ".py" or (p / "__init__.py").is_file())]
    assert [room for room in rooms if f" {room}" not in tree] == []


@pytest.mark.parametrize("name", ["config", "recipes"])
def test_pages_that_are_written_from_the_code_are_fresh(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"generate_{name}", ROOT / f"docs/generate_{name}.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = (ROOT / f"docs/{name}.md").read_text()
    assert written == generator.page(), f"docs/{name}.md is stale: run `make docs`"
