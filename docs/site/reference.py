"""mkdocs hook: build the API reference, with a page per hall or per folder in large halls.

Sources are parsed, not imported; mkdocstrings shows names with docstrings.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_sov", "tokenizer", "data_prep")
PUBLIC = re.compile(r"^(?:async )?(?:def|class) [A-Za-z]", re.MULTILINE)
"""A public function or class; a pattern, because parsing all sources takes seconds."""
MAX_MODULES = 24
"""Most modules per page; a larger folder has a page for each subfolder."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `reference/NAME.md` for each name in `iter_pages`."""
    for name, modules in iter_pages():
        if modules:
            files.append(File.generated(config, f"reference/{name}.md", content=build_page(name, modules)))
    return files


def iter_pages() -> Iterator[tuple[str, list[Path]]]:
    """Yield (page name, modules), sorted by name."""
    for package in PACKAGES:
        modules = [file for file in list_modules(ROOT / package) if file.parent == ROOT / package]
        if modules:
            yield package, modules
        for hall in sorted(path for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()):
            yield from iter_folder_pages(hall)


def iter_folder_pages(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield a page for a folder's modules; above `MAX_MODULES` also a page for each subfolder."""
    modules = list_modules(folder)
    own_modules = [file for file in modules if file.parent == folder]
    if len(modules) <= MAX_MODULES or own_modules == modules:
        if modules:
            yield get_dotted_name(folder), modules
        return
    if own_modules:
        yield get_dotted_name(folder), own_modules
    for name in sorted({file.relative_to(folder).parts[0] for file in modules if file not in own_modules}):
        yield from iter_folder_pages(folder / name)


def build_page(name: str, modules: list[Path]) -> str:
    """Build a page from the package's docstring and a mkdocstrings block for each module."""
    package = ROOT.joinpath(*name.split("."), "__init__.py")
    docstring = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    blocks = "".join(f"\n::: {get_dotted_name(module)}\n" for module in modules)
    return f"---\nsearch:\n  boost: 0.5\n---\n# {name}\n\n{docstring}\n{blocks}"


def list_modules(folder: Path) -> list[Path]:
    """Return the public modules below a folder that match `PUBLIC`."""
    return [file for file in sorted(folder.rglob("*.py"))
            if (file.name == "__init__.py" or not file.name.startswith("_"))
            and PUBLIC.search(file.read_text(encoding="utf-8"))]


def get_dotted_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
