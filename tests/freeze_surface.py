"""Write tests/surface.txt: every option of every command and every setting, with type and default.

Usage: python tests/freeze_surface.py

A line more is a promise to users; the commit that adds one says why it is worth it.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("surface.txt")
PACKAGES = ("megatron_sov", "data_prep", "tokenizer", "layout_proof")
SETTINGS = re.compile(r"(Config|Settings|Options|Training|Profile|Parts|Limits|Sampling|Batching)$")
"""How the names of classes of settings end."""


def options(program: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a line for each argument of a program's commands."""
    def below(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    yield from below(child)
            elif not isinstance(action, argparse._HelpAction):
                name = " ".join(action.option_strings) or f"<{action.dest}>"
                choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
                needed = " required" if action.required and action.option_strings else ""
                yield f"{parser.prog} {name}{choices}{needed} = {_shown(_default(action))}"

    yield from below(program)


def _default(action: argparse.Action) -> object:
    """Return the value that holds if an argument is absent."""
    default = getattr(action, "declared", action.default)
    return list(default) if isinstance(default, tuple) and hasattr(action, "declared") else default


def _shown(default: object) -> str:
    """Return a default without machine-specific parts."""
    return re.sub(r"(?<![\w.])/[\w./-]+/(?=[\w.-]+)", ".../", str(default))


def settings() -> Iterator[str]:
    """Yield a line for each field of a settings class, with its default as in the source."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and SETTINGS.search(node.name) and any(
                        # a command's own settings are listed as its options
                        "dataclass" in ast.unparse(d) and not (
                            "kw_only" in ast.unparse(d) and node.name.endswith("Options"))
                        for d in node.decorator_list):
                    yield from _fields(node)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and not ast.unparse(field.target).startswith("_"):
            default = f" = {ast.unparse(field.value)}" if field.value else ""
            yield f"{node.name}.{ast.unparse(field.target)}: {ast.unparse(field.annotation)}{default}"


def surface() -> str:
    """Return the file's text."""
    from layout_proof.cli import build_parser
    from megatron_sov.base.hints.commands import build_full_parser

    programs = (build_parser(), *map(build_full_parser, ("megatron-sov", "sov-data", "sov-tokenizer")))
    lines = [line for program in programs for line in sorted(set(options(program)))]
    return "\n".join([*lines, *sorted(set(settings())), ""])


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: its sub-folders have the names of packages
    FILE.write_text(surface(), encoding="utf-8")
    print(f"{FILE}: {len(surface().splitlines())} lines")
