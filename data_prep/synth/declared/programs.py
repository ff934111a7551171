"""Programs in replies: run in the sandbox for the one line that they print."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache

from data_prep.synth.generator import NoReply
from megatron_sov.judge.rewards.program_text import parse_python, program_in
from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import Sandbox

MODULES = frozenset((
    "__future__", "abc", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "heapq", "itertools", "json", "math", "numbers", "operator", "re",
    "statistics", "string", "textwrap", "typing", "unicodedata"))
"""What a program may import: no door to files, processes, networks, clocks or chance."""
REFUSED_NAMES = frozenset((
    "open", "input", "exec", "eval", "compile", "breakpoint", "exit", "quit", "globals", "locals", "vars",
    "help", "__import__", "__builtins__", "__loader__", "print_exc", "now", "today", "utcnow"))
MAX_ANSWER_CHARS = 200


def run_programs(replies: Sequence[str]) -> list[str]:
    """Return what the programs in replies print as their only line, of those that end well in the sandbox.

    Raises:
        NoReply: the machine could not run one: the item is made again.
    """
    printed = (run_program(program_in(reply)) for reply in replies if not getattr(reply, "cut", False))
    return [line for line in printed if line]


def run_program(source: str) -> str:
    """Return what one program prints as its only line; "": it prints something else or does not end well."""
    if not computes_alone(source):
        return ""
    outcome = _sandbox().run(Program(source), Limits(wall_s=30, cpu_s=10))
    if outcome.status == "infrastructure":
        raise NoReply(f"the sandbox: {outcome.reason}")
    printed = outcome.stdout.strip()
    is_short = "\n" not in printed and len(printed) <= MAX_ANSWER_CHARS
    return printed if outcome.status == "ok" and is_short else ""


def computes_alone(source: str) -> bool:
    """Return whether a program reaches for nothing but modules that compute.

    That is for clean data: what keeps a program in is the sandbox.
    """
    tree = parse_python(source)
    if tree is None:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["" if node.level else node.module or ""]
        else:
            modules = []
        if not all(name.partition(".")[0] in MODULES for name in modules):
            return False
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        # an attribute with two underscores leads to the inside of objects
        if name in REFUSED_NAMES or (isinstance(node, ast.Attribute) and name.startswith("__")):
            return False
    return True


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox()
