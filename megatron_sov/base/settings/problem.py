"""Settings problems as data (code, key, rule, fix), and types and relations that bound settings."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from megatron_sov.base.errors import Fix, UserError, format_problems, suggest_name
from megatron_sov.base.hints.table import load_table

LEFT_OUT = "leave it out for the default"
"""Advice for a value that means "the default" in other programs, such as -1 or auto."""
TOKENS_KEY = "train.tokens="
"""Prefix of a `value_to_write` that replaces the whole setting: train.steps=N becomes train.tokens=N."""
UNSET: Any = object()
"""`SettingsProblem.value` if the problem has no value."""
MAX_VALUE_CHARS = 80
MAX_PROBLEMS = 20


class ProblemCode(StrEnum):
    """Problem kinds; tests and scripts check codes instead of sentences."""

    FORM = "form"
    """A change without key and =."""
    JSON = "json"
    """A value that begins like JSON but does not parse."""
    TWICE = "twice"
    """A key that occurs twice."""
    UNKNOWN = "unknown"
    """An unknown key."""
    MISSING = "missing"
    """A missing key that has no default."""
    TYPE = "type"
    """A value with a wrong type."""
    CHOICE = "choice"
    """A word outside the choices."""
    BOUND = "bound"
    """A value outside its bounds."""
    RULE = "rule"
    """A value that contradicts another setting or the model."""
    INERT = "inert"
    """A value without effect because of another setting."""
    FILE = "file"
    """A file that cannot be read or parsed as YAML."""


@dataclass(frozen=True)
class SettingsProblem:
    """A mistake in settings, with a sentence."""

    code: ProblemCode
    key: str
    """Dotted key, e.g. data.phases.0.seq_len; "": the whole file or option."""
    rule: str
    """The broken rule, as the sentence continues after key and value: "must be at least 1"."""
    value: Any = UNSET
    way_out: str = ""
    """Advice that ends the message; "" if the rule itself says what to write."""
    line: int = 0
    """Line in the file, from 1; 0: unknown."""
    value_to_write: str = ""
    """Replacement for the wrong value, as typed by a user."""
    fix: str | Fix = ""
    """`key=value` that satisfies the rule, or another change to the command line."""
    other: str = ""
    """Setting in the same class that the rule compares with; its name follows `rule` in the sentence."""
    other_value: Any = UNSET
    """Value of `other`, if the sentence shows it."""

    def __str__(self) -> str:
        """Return line and sentence: ``line 3: lr = -1 must be above 0; set it``."""
        return (f"line {self.line}: " if self.line else "") + self.sentence

    @property
    def sentence(self) -> str:
        """The message without the line number."""
        # shorten each part separately: the end of a long key stays visible
        key = ".".join(map(shorten_text, self.key.split(".")))
        if self.key.startswith("-") and self.value is not UNSET:
            begin = f"{key} {format_setting(self.value)}: "
        elif self.value is UNSET:
            begin = f"{key}: " if key else ""
        else:
            begin = f"{key} = {format_setting(self.value)} " if key else f"{format_setting(self.value)} "
        compared = ""
        if self.other:
            value_text = "" if self.other_value is UNSET else f" = {format_setting(self.other_value)}"
            compared = f" {self.other}{value_text}"
        return begin + self.rule + compared + (f"; {self.way_out}" if self.way_out else "")

    def with_prefix(self, prefix: str) -> "SettingsProblem":
        """Return the problem with `prefix.` before the key ("": unchanged, as are names of options)."""
        if not prefix or self.key.startswith("-"):
            return self
        return replace(self, key=f"{prefix}.{self.key}" if self.key else prefix)


def to_problem(problem: SettingsProblem | str) -> SettingsProblem:
    """Convert a sentence from a user's own `problems()` to a `SettingsProblem`."""
    if isinstance(problem, SettingsProblem):
        return problem
    return SettingsProblem(ProblemCode.RULE, "", problem)


def find_broken_rules(settings: Any, prefix: str, *rules: tuple[bool, str, str] | tuple[bool, str, str, str]
                      ) -> list[SettingsProblem]:
    """Return a problem per broken rule of (holds, key, rule[, fix]), with `prefix` before its dotted key."""
    problems = [SettingsProblem(ProblemCode.RULE, key, rule, _get_value(settings, key), "".join(way_out))
                for holds, key, rule, *way_out in rules if not holds]
    return [problem.with_prefix(prefix) for problem in problems]


def use_option_names(problems: Sequence[SettingsProblem], **options: str) -> list[SettingsProblem]:
    """Return settings problems with command-line options in place of field names; `options`: field -> option
    for each option that is not the field's name with hyphens."""
    def option(key: str) -> str:
        return options.get(key, f"--{key.replace('_', '-')}")

    return [replace(problem, key=option(problem.key), other=problem.other and option(problem.other))
            for problem in problems]


def _get_value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings[int(name)] if name.isdecimal() else getattr(settings, name)
    return settings


class SettingsError(UserError):
    """Invalid settings, with every problem."""

    def __init__(self, where: str, problems: Sequence[SettingsProblem]) -> None:
        """Format the message; it begins with `where`, a file, option or class; "": the command line."""
        self.where, self.problems = where, tuple(problems)
        fixes = [(problem.code, problem.fix or _fix_value(problem)) for problem in problems]
        # one broken rule may cause the next: of the fixes for rules, keep only the first
        rules = [fix for code, fix in fixes if fix and code == ProblemCode.RULE]
        fix = _join_fixes([fix for code, fix in fixes if code != ProblemCode.RULE or fix in rules[:1]])
        if len(problems) == 1:
            line = f", line {problems[0].line}" if problems[0].line else ""
            super().__init__((f"{where}{line}: " if where else "") + problems[0].sentence, fix)
            return
        sentences = [str(problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            sentences.append(f"and {len(problems) - MAX_PROBLEMS} more")
        super().__init__(format_problems(where or "command line", sentences), fix)

    @property
    def codes(self) -> list[tuple[str, str]]:
        return [(str(problem.code), problem.key) for problem in self.problems]


def _fix_value(problem: SettingsProblem) -> str | Fix:
    """Derive a fix from the problem's rule, code and `value_to_write`; "": no fix is known."""
    bound = re.match(r"must be at (?:least|most) (\d[\d.]*)(?::|\Z)", problem.rule)
    key, value = problem.key, problem.value_to_write or (bound[1] if bound else "")
    if problem.code == ProblemCode.INERT and (needed := load_table()["acts_with"].get(key)):
        return str(needed)
    if problem.way_out.endswith(LEFT_OUT) or problem.code == ProblemCode.INERT:
        option = f"--set {key}=" if not key.startswith("--") else f"{key} "
        typed = (str(problem.value), json.dumps(problem.value, default=str))
        return Fix(left_out=tuple(f"{option}{value}" for value in typed))
    if "=" in value:  # `value` sets another setting, which replaces the typed one
        return Fix(words={f"{key}={problem.value}": value})
    if not key.startswith("--"):
        return f"{key}={value}" if value and "." in key else ""
    values = value.split()
    if len(values) == 1 and problem.value and isinstance(problem.value, str):
        return Fix(words={problem.value: value})  # only the wrong one of several typed values
    return Fix(options=(key, *values)) if values else ""


def _join_fixes(fixes: Sequence[str | Fix]) -> Fix | None:
    changes = [Fix(options=("--set", fix)) if isinstance(fix, str) else fix for fix in fixes if fix]
    if not changes:
        return None
    return Fix(options=tuple(word for fix in changes for word in fix.options),
               left_out=tuple(word for fix in changes for word in fix.left_out),
               words={old: new for fix in changes for old, new in fix.words.items()},
               before=tuple(line for fix in changes for line in fix.before))


def format_setting(value: Any) -> str:
    """Format a value as JSON for a message: shortened, control characters escaped."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that cannot be shown"
    return shorten_text(text)


def shorten_text(text: str) -> str:
    """Shorten a text to `MAX_VALUE_CHARS` and escape unprintable characters."""
    # shorten before escaping: the text may have gigabytes
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_VALUE_CHARS + 1])
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS - 3] + "..."


# Bounds as types, which combine with bounds from `annotated_types`: `Annotated[NotNegativeInt,
# Le(MAX_STEPS)]`.

Violation = tuple[ProblemCode, str, str]
"""Code, rule and fix for a violated bound; see `SettingsProblem`."""

AtLeastOne = Annotated[int, Ge(1)]
NotNegativeInt = Annotated[int, Ge(0)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
"""A share from 0 to 1, both included."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""A rate from 0 to below 1, such as a decay or dropout."""


@dataclass(frozen=True)
class Bound:
    """A bound that `annotated_types` does not offer."""

    find_violation: Callable[[Any], Violation | None]
    """Returns how a well-typed value violates the bound; None: no violation."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the type's schema followed by the bound; called by pydantic."""
        # pydantic calls this method and is already loaded
        from pydantic_core import PydanticCustomError, core_schema

        def check_value(value: Any) -> Any:
            if violation := self.find_violation(value):
                code, rule, way_out = violation
                # `reading._convert_error` reads these fields; pydantic only transports them
                raise PydanticCustomError("bound", "{rule}", {"code": code, "rule": rule, "way_out": way_out})
            return value

        return core_schema.no_info_after_validator_function(check_value, handler(source))


@dataclass(frozen=True)
class Relation:
    """A bound set by another field in the same class; inactive while the other field has no value."""

    other: str
    holds: Callable[[Any, Any], bool]
    """Called with both values; returns whether they are compatible."""
    rule: str
    """The sentence in front of the other field's name: "must be at most"."""
    way_out: str = ""
    shows_value: bool = True
    """Whether the message shows the other field's value."""
    holds_default: bool = False
    """Whether the field's own default is compatible with every value of the other field."""

    def find_problem(self, settings: Any, name: str) -> SettingsProblem | None:
        """Return the problem if field `name` of `settings` breaks the relation, else None."""
        value, bound = getattr(settings, name), getattr(settings, self.other)
        is_default = value == type(settings).__dataclass_fields__[name].default
        if value is None or (is_default and self.holds_default) or self.holds(value, bound):
            return None
        return SettingsProblem(ProblemCode.RULE, name, self.rule, value, self.way_out, other=self.other,
                               other_value=bound if self.shows_value else UNSET)


def at_most_field(other: str) -> Relation:
    return Relation(other, lambda value, most: most is None or value <= most, "must be at most")


def below_field(other: str) -> Relation:
    """Bound a number strictly by another field's value."""
    return Relation(other, lambda value, end: end is None or value < end, "must be below")


def multiple_of_field(other: str) -> Relation:
    """Require a number, or each number in a tuple, to be a multiple of another field's value."""
    def is_multiple(value: Any, part: Any) -> bool:
        return not any(number % part for number in (value if isinstance(value, tuple) else (value,)))

    return Relation(other, is_multiple, "must be a multiple of")


def differs_from_field(other: str) -> Relation:
    """Require a non-empty text to differ from another field's text."""
    return Relation(other, lambda value, taken: not value or value != taken, "must not be that of",
                    "give each its own")


def requires_field(other: str) -> Relation:
    """Require another field to be set together with the setting."""
    return Relation(other, lambda value, required: bool(required), "is only for",
                    "add that, or leave this out", shows_value=False, holds_default=True)


def excludes_field(other: str) -> Relation:
    """Forbid a setting together with another setting."""
    return Relation(other, lambda value, excluded: not (value and excluded), "goes without",
                    "leave one of them out", shows_value=False)


def require_that(holds: Callable[[Any], object], rule: str, way_out: str = "") -> Bound:
    """Require a value for which `holds` returns a true value."""
    return Bound(lambda value: None if holds(value) else (ProblemCode.BOUND, rule, way_out))


def choice_from(known: Callable[[], Collection[str]]) -> Bound:
    """Require a text to be in `known()`, a table or file that the check reads."""
    def find_violation(value: str) -> Violation | None:
        words = sorted(filter(None, known()))
        if value in known():
            return None
        suggestion = suggest_name(value, words).removeprefix("; ")
        return ProblemCode.CHOICE, f"must be one of {', '.join(words)}", suggestion

    return Bound(find_violation)


def _find_repeated(values: Collection[Any]) -> Violation | None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if not repeated:
        return None
    return ProblemCode.BOUND, f"has {format_setting(repeated[0])} twice", "name it once"


NotBlank = Annotated[str, require_that(str.strip, "must not be empty")]
UNIQUE_ITEMS = Bound(_find_repeated)
"""List bound for `Annotated`: every item occurs once."""
ASCENDING_PAIR = require_that(lambda pair: pair[0] <= pair[1], "must have the lower number first")
"""Pair bound for `Annotated`: (lower end, upper end)."""
