"""Categories of risk: what is asked for, how it is answered, what is never given."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_sov.base.errors import UserError, list_problems, nearest
from megatron_sov.base.settings import Located, read_located, read_text

TAXONOMY = Path(__file__).parents[2] / "taxonomies/safety.yaml"
"""The 38 categories that come with the program."""
Strategy = Literal["redirect", "safe-complete"]
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


@dataclass(frozen=True)
class Category:
    """One category of risk."""

    id: str
    """Part of the samples' ids."""
    name: str
    """As prompts name it."""
    strategy: Strategy
    """redirect: decline and show a way that helps; safe-complete: help with what is safe."""
    withhold: str
    """What no answer may give."""
    examples: tuple[str, ...]
    """Requests of the category."""
    twin: str
    """A harmless request that sounds alike."""


def read_taxonomy(file: Path = TAXONOMY) -> list[Category]:
    """Return the categories of a file.

    Raises:
        UserError: it cannot be read, or breaks a rule; all problems are told with their lines.
    """
    located = read_located(read_text(file))
    problems = [(problem.line, problem.sentence) for problem in located.problems]
    found: list[Category] = []
    value = located.value
    listed = value.get("categories") if isinstance(value, dict) else None
    if not problems and (not isinstance(listed, list) or not listed):
        problems.append((1, "needs a list `categories`, as the packaged taxonomies/safety.yaml has"))
    for place, given in enumerate(listed if isinstance(listed, list) else ()):
        category = _category(given, located, place, problems)
        if category and any(category.id == other.id for other in found):
            problems.append((located.line(("categories", place)), f"id {category.id!r} stands there twice"))
        elif category:
            found.append(category)
    if problems:
        raise UserError(list_problems(str(file), [f"line {line}: {said}" for line, said in problems]))
    return found


def _category(given: Any, located: Located, place: int, problems: list[tuple[int, str]]) -> Category | None:
    """Return a category; None, and a problem more, where it breaks a rule."""
    names = [field.name for field in fields(Category)]
    line = located.line(("categories", place))
    if not isinstance(given, dict):
        problems.append((line, f"must be a category with {', '.join(names)}"))
        return None
    before = len(problems)
    problems += [(located.line(("categories", place, name)), f"{name!r} is no field of a category"
                  f"{nearest(str(name), names)}") for name in given if name not in names]
    for name in names:
        value = given.get(name)
        if name == "examples":
            is_right = isinstance(value, list) and bool(value) and all(
                isinstance(one, str) and one.strip() for one in value)
            wanted = "a list of requests"
        else:
            is_right, wanted = isinstance(value, str) and bool(value.strip()), "a text"
        if not is_right:
            problems.append((located.line(("categories", place, name)),
                             f"{name} = {value!r} must be {wanted}"))
    if len(problems) == before and given["strategy"] not in get_args(Strategy):
        problems.append((line, f"strategy = {given['strategy']!r} must be {' or '.join(get_args(Strategy))}"))
    if len(problems) == before and not _ID.fullmatch(given["id"]):
        problems.append((line, f"id = {given['id']!r} must be up to 40 small letters, digits and -"))
    if len(problems) > before:
        return None
    return Category(**{**given, "examples": tuple(given["examples"])})
