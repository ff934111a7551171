"""Pages of the API reference: one for each hall, of a large one one for each folder in it.  Sources are read
and not imported, and only what has a docstring of its own stands there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_sov", "tokenizer", "data_prep")
PUBLIC = re.compile(r"^(?:async )?(?:def|class) [A-Za-z]", re.MULTILINE)
LARGE_MODULES = 24
"""A folder with more modules has a page for each folder in it."""


def modules_of(folder: Path) -> list[Path]:
    """Return the public modules below a folder that have something to show."""
    return [file for file in sorted(folder.rglob("*.py"))
            if (file.name == "__init__.py" or not file.name.startswith("_")) and has_public(file)]


def has_public(file: Path) -> bool:
    """Return whether a module has a public function or class; its lines are looked at, for parsing all
    sources takes seconds."""
    return PUBLIC.search(file.read_text(encoding="utf-8")) is not None


def dotted(file: Path) -> str:
    """Return a module's name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def groups() -> Iterator[tuple[str, list[Path]]]:
    """Yield (name of a page, its modules) in the order of the names."""
    for package in PACKAGES:
        direct = [file for file in modules_of(ROOT / package) if file.parent == ROOT / package]
        if direct:
            yield package, direct
        for hall in sorted(path for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()):
            yield from pages_of(hall)


def pages_of(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield the page of a folder's modules; where there are too many, one for each folder below it."""
    modules = modules_of(folder)
    own = [file for file in modules if file.parent == folder]
    if len(modules) <= LARGE_MODULES or own == modules:
        if modules:
            yield dotted(folder), modules
        return
    if own:
        yield dotted(folder), own
    for wing in sorted({folder / file.relative_to(folder).parts[0] for file in modules if file not in own}):
        yield from pages_of(wing)


def page(name: str, modules: list[Path]) -> str:
    """Return a page's Markdown: what the folder says of itself, then each module for mkdocstrings."""
    package = ROOT.joinpath(*name.split("."), "__init__.py")
    about = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    blocks = "".join(f"\n::: {dotted(module)}\n" for module in modules)
    return f"---\nsearch:\n  boost: 0.5\n---\n# {name}\n\n{about}\n{blocks}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, modules in groups():
        if modules:
            files.append(File.generated(config, f"reference/{name}.md", content=page(name, modules)))
    return files
