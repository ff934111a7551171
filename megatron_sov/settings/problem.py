"""What is wrong with a setting, as data, and the one place where it becomes a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from megatron_sov.errors import UserError, list_problems

UNSET: Any = object()
"""Stands for a value where a problem has none."""
MAX_VALUE_CHARS = 80
MAX_PROBLEMS = 20


class Code(StrEnum):
    """Kinds of problems; tests and scripts ask for these and not for sentences."""

    FORM = "form"
    """A change without key and =."""
    JSON = "json"
    """A value that begins like JSON and is none."""
    TWICE = "twice"
    """A key that is set a second time."""
    UNKNOWN = "unknown"
    """A key that does not exist."""
    MISSING = "missing"
    """A key without a default that is not set."""
    TYPE = "type"
    """A value of another type."""
    CHOICE = "choice"
    """A word that is none of those that are taken."""
    BOUND = "bound"
    """A value outside its bounds."""
    RULE = "rule"
    """A value that does not fit another setting, or the model."""
    FILE = "file"
    """A file that cannot be read, or is no YAML."""


@dataclass(frozen=True)
class Problem:
    """One mistake in settings."""

    code: Code
    key: str
    """The setting with dots, e.g. data.phases.0.seq_len; "": the file or the option as a whole."""
    rule: str
    """What is broken, as the sentence goes on behind the key and its value: "must be at least 1"."""
    value: Any = UNSET
    way_out: str = ""
    """What to do, where the rule does not say it."""
    line: int = 0
    """Of the file, from 1; 0: none is known."""
    other: str = ""
    """The setting of the same class that the rule compares with: the rule's sentence ends with it."""
    other_value: Any = UNSET
    """Its value, where it matters."""

    def __str__(self) -> str:
        """Return line and sentence: ``line 3: lr = -1 must be above 0; set it``."""
        return (f"line {self.line}: " if self.line else "") + self.sentence

    @property
    def sentence(self) -> str:
        """The problem without its line."""
        key = ".".join(map(cut, self.key.split(".")))  # a stranger's file may hold any
        if self.key.startswith("-") and self.value is not UNSET:
            begin = f"{key} {show(self.value)}: "
        elif self.value is UNSET:
            begin = f"{key}: " if key else ""
        else:
            begin = f"{key} = {show(self.value)} " if key else f"{show(self.value)} "
        if self.other:
            shown = "" if self.other_value is UNSET else f" = {show(self.other_value)}"
            return f"{begin}{self.rule} {self.other}{shown}" + (f"; {self.way_out}" if self.way_out else "")
        return begin + self.rule + (f"; {self.way_out}" if self.way_out else "")

    def below(self, prefix: str) -> Problem:
        """Return the problem of a setting that stands inside another; an option's name stays."""
        return self if self.key.startswith("-") else replace(
            self, key=f"{prefix}.{self.key}" if self.key else prefix)


def as_problem(said: Problem | str) -> Problem:
    """Return what a class of a user's own may say in a sentence as a problem."""
    return said if isinstance(said, Problem) else Problem(Code.RULE, "", said)


def find_broken(settings: Any, prefix: str, *rules: tuple[bool, str, str] | tuple[bool, str, str, str]
                ) -> list[Problem]:
    """Return a problem for each rule that does not hold.

    Args:
        settings: that the keys belong to.
        prefix: what stands before the keys, e.g. "optim"; "": nothing.
        rules: whether it holds, the key (with dots), the rule, and what to do where the rule does not say it.
    """
    found = [Problem(Code.RULE, key, rule, _value(settings, key), "".join(way_out))
             for holds, key, rule, *way_out in rules if not holds]
    return [problem.below(prefix) for problem in found] if prefix else found


def name_options(problems: Sequence[Problem], **options: str) -> list[Problem]:
    """Return problems of settings that a command's options say, with these in place of the keys.

    Args:
        problems: with the fields as keys.
        options: field -> option, where that is not the field's name with hyphens.
    """
    def option(key: str) -> str:
        return options.get(key, f"--{key.replace('_', '-')}")

    return [replace(problem, key=option(problem.key), other=problem.other and option(problem.other))
            for problem in problems]


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings[int(part)] if part.isdecimal() else getattr(settings, part)
    return settings


class SettingsError(UserError):
    """Settings that cannot be taken, with all that is wrong."""

    def __init__(self, where: str, problems: Sequence[Problem]) -> None:
        """Keep the problems.

        Args:
            where: the file, the option or the class of settings that the message begins with; "": the
                command line.
            problems: at least one.
        """
        self.where, self.problems = where, tuple(problems)
        if len(problems) == 1:
            line = f", line {problems[0].line}" if problems[0].line else ""
            super().__init__((f"{where}{line}: " if where else "") + problems[0].sentence)
            return
        shown = [str(problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
        super().__init__(list_problems(where or "command line", shown))

    @property
    def codes(self) -> list[tuple[str, str]]:
        """Return code and key of each problem."""
        return [(str(problem.code), problem.key) for problem in self.problems]


def show(value: Any) -> str:
    """Return a value as users write it, in JSON, cut where it is long; control characters are escaped."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that cannot be shown"
    return cut(text)


def cut(text: str) -> str:
    """Return a text of a stranger's as a message may hold it: no control characters, not long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_VALUE_CHARS + 1])
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS - 3] + "..."
