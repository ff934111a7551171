"""Compares installed libraries with the function signatures in `contract.json`, without importing them."""

import ast
import importlib.util
import json
from pathlib import Path

CONTRACT = Path(__file__).with_name("contract.json")
"""Library -> version, and file -> qualified name -> arguments; written by `tests/te_double/contract.py`."""


def find_first_difference(package: str) -> tuple[str, str]:
    """Return a library's version in `contract.json`, and the first signature that differs from the installed
    library; "": no difference, or the library is not installed.

    Raises:
        OSError, SyntaxError, ValueError, RecursionError: the library's sources cannot be read.
    """
    library = json.loads(CONTRACT.read_text(encoding="utf-8"))[package]
    version = library["version"]
    spec = importlib.util.find_spec(package.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        return version, ""
    # several distributions can install folders for the same namespace package
    roots = [Path(location).parent for location in spec.submodule_search_locations]
    for file, expected in library["files"].items():
        path = next((root / file for root in roots if (root / file).is_file()), None)
        if path is None:
            return version, f"{file} is gone"
        installed = read_signatures(path)
        for name, arguments in expected.items():
            if name not in installed:
                return version, f"{name} of {file} is gone"
            if installed[name] != arguments:
                return version, f"{name} of {file} takes ({installed[name]}), not ({arguments})"
    return version, ""


def read_signatures(file: Path) -> dict[str, str]:
    """Parse a source file: qualified name -> arguments without annotations; a class maps to ""."""
    signatures: dict[str, str] = {}
    queue: list[tuple[str, ast.stmt | ast.ExceptHandler]] = [
        ("", statement) for statement in ast.parse(file.read_bytes()).body]
    while queue:
        prefix, node = queue.pop(0)
        if isinstance(node, ast.FunctionDef):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            signatures.setdefault(prefix + node.name, ast.unparse(node.args))
        elif isinstance(node, ast.ClassDef):
            signatures.setdefault(prefix + node.name, "")
            queue += [(f"{prefix}{node.name}.", child) for child in node.body]
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
            queue += [(prefix, child) for child in ast.iter_child_nodes(node)
                      if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    return signatures
