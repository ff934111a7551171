"""Whether installed libraries have the functions and methods that this project calls, with the arguments that
it was read against.  Their sources are parsed, and nothing of them is imported."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

CONTRACT = Path(__file__).with_name("contract.json")
"""Library -> its version, and file -> qualified name -> arguments; written by tests/te_double/contract.py."""


def first_difference(package: str) -> tuple[str, str]:
    """Return the version of a library that the contract has, and the first name of which the installed
    library has other arguments; "": there is none, or the library is not installed.

    Raises:
        OSError, SyntaxError, ValueError, RecursionError: its sources cannot be read.
    """
    part = json.loads(CONTRACT.read_text(encoding="utf-8"))[package]
    spec = importlib.util.find_spec(package.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        return part["version"], ""
    # several distributions can install modules into one namespace package, each in a folder of its own
    roots = [Path(location).parent for location in spec.submodule_search_locations]
    for file, wanted in part["files"].items():
        path = next((root / file for root in roots if (root / file).is_file()), None)
        if path is None:
            return part["version"], f"{file} is gone"
        here = signatures(path)
        for name, arguments in wanted.items():
            if name not in here:
                return part["version"], f"{name} of {file} is gone"
            if here[name] != arguments:
                return part["version"], f"{name} of {file} takes ({here[name]}), not ({arguments})"
    return part["version"], ""


def signatures(file: Path) -> dict[str, str]:
    """Return the arguments of each function and method that a source file defines, by its qualified name,
    without annotations; a class is in there with none."""
    found: dict[str, str] = {}
    waiting: list[tuple[str, ast.stmt | ast.ExceptHandler]] = [
        ("", statement) for statement in ast.parse(file.read_bytes()).body]
    while waiting:
        prefix, node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            found.setdefault(prefix + node.name, ast.unparse(node.args))
        elif isinstance(node, ast.ClassDef):
            found.setdefault(prefix + node.name, "")
            waiting += [(f"{prefix}{node.name}.", child) for child in node.body]
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            waiting += [(prefix, child) for child in ast.iter_child_nodes(node)
                        if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    return found
