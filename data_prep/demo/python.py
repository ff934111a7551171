"""Text that comes with every Python: sources, docstrings, documentation topics,
and questions made from docstrings."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("numpy", "networkx", "sympy", "jinja2", "pydantic", "torch/nn", "torch/optim", "torch/utils",
            "torch/distributions")
"""Installed packages (or folders of them) whose docstrings are read where they are present."""
SKIPPED_FOLDERS = frozenset([
    "test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "lib2to3", "_vendor", "licenses", "turtledemo",
])
"""Tests, other people's packages, and folders that are tables rather than text."""
_ROLE = re.compile(r":[a-zA-Z:+-]+:`[~!]?([^`<]+?)(?:\s*<[^>`]*>)?`")
_NOISE_LINE = re.compile(r"^\s*(\.\. [\w:-]+::.*|\.\. _.*|([=\-~^\"*#+`_.])\2{2,}|<[^>]*>.*"
                         r"|.*!\[.*|\[!?\[.*)$", re.MULTILINE)
_ANSWER_CHARS = (40, 600)
QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}` in Python.",
    "Can you tell me what `{}` does?",
    "I found `{}` in some code. What is it?",
    "Describe `{}` briefly.",
)


@dataclass(frozen=True)
class Docstring:
    """One documented thing."""

    module: str
    """Dotted module."""
    name: str
    """Qualified name inside the module; empty for the module itself."""
    text: str
    """The docstring without its indentation."""


def order_key(identity: str) -> bytes:
    """Return a key that shuffles identities the same way everywhere."""
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def stdlib_files() -> list[tuple[str, Path]]:
    """Return (path inside the library, file) of the running Python's own sources, sorted;
    tests are left out."""
    return _python_files(Path(sysconfig.get_path("stdlib")), "")


def package_files() -> list[tuple[str, Path]]:
    """Return the same for `PACKAGES`, those that are installed."""
    site = Path(sysconfig.get_path("purelib"))
    return [entry for package in PACKAGES for entry in _python_files(site / package, package + "/")]


def _python_files(folder: Path, prefix: str) -> list[tuple[str, Path]]:
    return [(prefix + p.relative_to(folder).as_posix(), p) for p in _files(folder) if p.suffix == ".py"]


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted, without going into `SKIPPED_FOLDERS`."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(place, name) for name in names]
    return sorted(found)


def read_source(file: Path) -> str:
    """Return a source file's text, or "" where it is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def docstrings(name: str, source: str) -> list[Docstring]:
    """Return the docstrings of a source file in order; nothing where it does not parse."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python refuses
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [Docstring(module, inner, text) for inner, text in _walk(tree, "")]


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and (text := ast.get_docstring(node))):
        yield name, text
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _walk(child, f"{name}.{child.name}" if name else child.name)


def clean(text: str) -> str:
    """Return documentation without markup noise: roles, directives, underlines,
    badges and interactive sessions."""
    text = _ROLE.sub(r"\1", text).replace("``", "`")
    text = _NOISE_LINE.sub("", text).replace("::\n", ":\n")
    paragraphs = [p.rstrip() for p in re.split(r"\n(?:[ \t]*\n)+", text.expandtabs())]
    return "\n\n".join(p for p in paragraphs if p.strip() and not p.lstrip().startswith(">>>"))


def documentation(found: list[Docstring]) -> dict[str, str]:
    """Return one text per module: its docstrings, each under its name."""
    parts: dict[str, list[str]] = {}
    for d in found:
        if text := clean(d.text):
            parts.setdefault(d.module, []).append(f"{d.module}.{d.name}\n\n{text}" if d.name
                                                  else f"{d.module}\n\n{text}")
    return {module: "\n\n".join(texts) for module, texts in parts.items()}


def topics() -> dict[str, str]:
    """Return Python's language reference by topic, as `help()` shows it."""
    from pydoc_data.topics import topics as texts

    return {f"topic {name}": clean(text) for name, text in sorted(texts.items())}


def readmes() -> dict[str, str]:
    """Return the documentation files (.rst, .md and descriptions) that lie beside installed packages."""
    site = Path(sysconfig.get_path("purelib"))
    files = [p for p in _files(site)
             if p.suffix in (".rst", ".md") or (p.name == "METADATA" and p.parent.suffix == ".dist-info")]
    texts = {p.relative_to(site).as_posix(): read_source(p) for p in files}
    # what precedes the first blank line of METADATA are mail-like headers
    return {name: clean(text.partition("\n\n")[2] if name.endswith("METADATA") else text)
            for name, text in texts.items()}


def question_and_answer(found: Docstring) -> tuple[str, str] | None:
    """Return a question about a public name and the first paragraph of its docstring,
    or None where it makes no answer."""
    name = f"{found.module}.{found.name}" if found.name else found.module
    if any(part.startswith("_") for part in name.split(".")):
        return None
    answer = " ".join(clean(found.text).partition("\n\n")[0].split())
    if (not _ANSWER_CHARS[0] <= len(answer) <= _ANSWER_CHARS[1] or not answer.endswith(".")
            or not answer[0].isupper()):
        return None
    return QUESTIONS[order_key(name)[0] % len(QUESTIONS)].format(name), answer
