"""What is wrong with a setting, as data, and the one place where it becomes a sentence."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from megatron_sov.base.errors import Fix, UserError, list_problems, nearest

UNSET: Any = object()
"""Stands for a value where a problem has none."""
MAX_VALUE_CHARS = 80
MAX_PROBLEMS = 20


class ProblemCode(StrEnum):
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
    INERT = "inert"
    """A value that another setting leaves without effect."""
    FILE = "file"
    """A file that cannot be read, or is no YAML."""


@dataclass(frozen=True)
class SettingsProblem:
    """One mistake in settings."""

    code: ProblemCode
    key: str
    """The setting with dots, e.g. data.phases.0.seq_len; "": the file or the option as a whole."""
    rule: str
    """What is broken, as the sentence goes on behind the key and its value: "must be at least 1"."""
    value: Any = UNSET
    way_out: str = ""
    """What to do, where the rule does not say it."""
    line: int = 0
    """Of the file, from 1; 0: none is known."""
    fix: str | Fix = ""
    """Setting, `key=value`, with which the rule holds; or another change of the command line."""
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
        # each part is cut alone, so that the end of a long key is still there
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

    def below(self, prefix: str) -> SettingsProblem:
        """Return the problem of a setting that stands inside another; an option's name stays."""
        if self.key.startswith("-"):
            return self
        return replace(self, key=f"{prefix}.{self.key}" if self.key else prefix)


def as_problem(said: SettingsProblem | str) -> SettingsProblem:
    """Return what a class of a user's own may say in a sentence as a problem."""
    return said if isinstance(said, SettingsProblem) else SettingsProblem(ProblemCode.RULE, "", said)


def find_broken(settings: Any, prefix: str, *rules: tuple[bool, str, str] | tuple[bool, str, str, str]
                ) -> list[SettingsProblem]:
    """Return a problem for each rule that does not hold.

    Args:
        settings: that the keys belong to.
        prefix: what stands before the keys, e.g. "optim"; "": nothing.
        rules: whether it holds, the key (with dots), the rule, and what to do where the rule does not say it.
    """
    found = [SettingsProblem(ProblemCode.RULE, key, rule, _value(settings, key), "".join(way_out))
             for holds, key, rule, *way_out in rules if not holds]
    return [problem.below(prefix) for problem in found] if prefix else found


def name_options(problems: Sequence[SettingsProblem], **options: str) -> list[SettingsProblem]:
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

    def __init__(self, where: str, problems: Sequence[SettingsProblem]) -> None:
        """Keep the problems.

        Args:
            where: the file, the option or the class of settings that the message begins with; "": the
                command line.
            problems: at least one.
        """
        self.where, self.problems = where, tuple(problems)
        fix = _join_fixes([problem.fix for problem in problems])
        if len(problems) == 1:
            line = f", line {problems[0].line}" if problems[0].line else ""
            super().__init__((f"{where}{line}: " if where else "") + problems[0].sentence, fix)
            return
        shown = [str(problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"and {len(problems) - MAX_PROBLEMS} more")
        super().__init__(list_problems(where or "command line", shown), fix)

    @property
    def codes(self) -> list[tuple[str, str]]:
        return [(str(problem.code), problem.key) for problem in self.problems]


def _join_fixes(fixes: Sequence[str | Fix]) -> Fix | None:
    found = [Fix(options=("--set", fix)) if isinstance(fix, str) else fix for fix in fixes if fix]
    if not found:
        return None
    return Fix(options=tuple(word for fix in found for word in fix.options),
               left_out=tuple(word for fix in found for word in fix.left_out),
               words={old: new for fix in found for old, new in fix.words.items()},
               before=tuple(line for fix in found for line in fix.before))


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
    # cut before it is escaped: a text of gigabytes is never walked through
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_VALUE_CHARS + 1])
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS - 3] + "..."


# Bounds of settings as types.  Each works alone, and with more of `annotated_types` around it:
# `Annotated[NotNegativeInt, Le(MAX_STEPS)]`.

Breach = tuple[ProblemCode, str, str]
"""Code, rule and way out of a problem; see `SettingsProblem`."""

AtLeastOne = Annotated[int, Ge(1)]
NotNegativeInt = Annotated[int, Ge(0)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
"""A part of a whole, the whole among them."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""A decay or a rate of dropping: never the whole."""


@dataclass(frozen=True)
class Bound:
    """A bound that no library has a name for."""

    broken: Callable[[Any], Breach | None]
    """Returns what a value of the right type breaks."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the type's schema with this bound behind it; pydantic asks for it."""
        from pydantic_core import PydanticCustomError, core_schema

        def ask(value: Any) -> Any:
            if found := self.broken(value):
                code, rule, way_out = found
                # pydantic carries our sentence to `_problem`, which knows the place
                raise PydanticCustomError("asked", "{rule}", {"code": code, "rule": rule, "way_out": way_out})
            return value

        return core_schema.no_info_after_validator_function(ask, handler(source))


@dataclass(frozen=True)
class Relation:
    """A bound that another field of the same class sets; where that has no value, there is none."""

    other: str
    holds: Callable[[Any, Any], bool]
    """Says whether a value goes with the other's."""
    rule: str
    """As the sentence goes on in front of the other's name: "must be at most"."""
    way_out: str = ""
    shows_value: bool = True
    """Whether the other's value is told too."""
    holds_default: bool = False
    """Whether the field's own default, which nobody has set, always goes with the other's value."""

    def broken_by(self, settings: Any, name: str) -> SettingsProblem | None:
        value, other = getattr(settings, name), getattr(settings, self.other)
        is_default = value == type(settings).__dataclass_fields__[name].default
        if value is None or (is_default and self.holds_default) or self.holds(value, other):
            return None
        return SettingsProblem(ProblemCode.RULE, name, self.rule, value, self.way_out, other=self.other,
                               other_value=other if self.shows_value else UNSET)


def at_most(other: str) -> Relation:
    return Relation(other, lambda value, most: most is None or value <= most, "must be at most")


def below(other: str) -> Relation:
    """Return the bound of a number that stays below another field's."""
    return Relation(other, lambda value, end: end is None or value < end, "must be below")


def multiple_of(other: str) -> Relation:
    """Return the bound of a number, or of each of several, that another field's divides."""
    return Relation(other, lambda value, part: not any(
        one % part for one in (value if isinstance(value, tuple) else (value,))), "must be a multiple of")


def other_than(other: str) -> Relation:
    """Return the bound of a text, where it is given, that another field must not be too."""
    return Relation(other, lambda value, taken: not value or value != taken, "must not be that of",
                    "give each its own")


def only_with(other: str) -> Relation:
    """Return the bound of a setting that does nothing where another field is not set."""
    return Relation(other, lambda value, there: bool(there), "is only for", "add that, or leave this out",
                    shows_value=False, holds_default=True)


def not_with(other: str) -> Relation:
    """Return the bound of a setting that has no meaning beside another one."""
    return Relation(other, lambda value, there: not (value and there), "goes without",
                    "leave one of them out", shows_value=False)


def one_of(known: Callable[[], Collection[str]]) -> Bound:
    """Return the bound of a text that is one of those which a table or a file has when it is read."""
    def broken(value: str) -> Breach | None:
        words = sorted(filter(None, known()))
        if value in known():
            return None
        return ProblemCode.CHOICE, f"must be one of {', '.join(words)}", nearest(value,
                                                                                 words).removeprefix("; ")

    return Bound(broken)


def _repeated(values: Collection[Any]) -> Breach | None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    return (ProblemCode.BOUND, f"has {show(twice[0])} twice", "name it once") if twice else None


NotBlank = Annotated[str, Bound(lambda text: None if text.strip() else (ProblemCode.BOUND,
                                                                        "must not be empty", ""))]
ONCE = Bound(_repeated)
"""Of a list that has no item twice."""
RISING = Bound(lambda pair: None if pair[0] <= pair[1] else (
    ProblemCode.BOUND, "must have the lower number first", ""))
"""Of the two ends of a stretch."""
