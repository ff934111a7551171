"""Values in a generator's file: constants, and Jinja templates over the fields of a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, Undefined, meta, nodes

from data_prep.synth.declared.functions import FUNCTIONS
from data_prep.synth.generator import NoReply
from data_prep.synth.templates import PromptEnvironment
from megatron_sov.base.errors import UserError, nearest

ENVIRONMENT = PromptEnvironment()
"""Of prompts."""
VALUES = PromptEnvironment(is_trimmed=False)
for _environment in (ENVIRONMENT, VALUES):
    _environment.globals.update(FUNCTIONS)


class BadValue(Exception):
    """A value of a file that is no template; says why and what to do."""


@dataclass(frozen=True)
class Value:
    """A compiled value: call it with the fields of a sample.

    A text that is one `{{ expression }}` gives the expression's value, any other text is rendered.
    """

    raw: Any
    """As the file has it."""
    names: frozenset[str]
    """Fields that it reads."""
    compute: Any = None
    """Fields -> value; None: `raw` is the value."""
    is_expression: bool = False
    """Whether it is one `{{ expression }}`, whose value may be of any type."""

    def __call__(self, fields: Mapping[str, Any]) -> Any:
        """Return the value; raises UserError where a field lacks what the template asks of it."""
        if self.compute is None:
            return self.raw
        try:
            found = self.compute(**{name: fields[name] for name in self.names if name in fields})
        except (UserError, NoReply):
            raise
        except Exception as e:  # whatever an expression does to the values that it meets
            said = e.message if isinstance(e, TemplateError) else f"{type(e).__name__}: {e}"
            raise UserError(f"{self.raw}: cannot be computed ({said}); mend this value of the generator's "
                            "file") from None
        if isinstance(found, Undefined):
            raise UserError(f"{self.raw}: has no value; mend this value of the generator's file")
        return list(found) if isinstance(found, Iterator) else found


def compile_value(raw: Any) -> Value | dict[str, Any] | list[Any]:
    """Compile a text, or each text of a list or mapping.

    Raises:
        BadValue: a text is no template, or reaches for the inside of Python's objects.
    """
    if isinstance(raw, Mapping):
        return {str(name): compile_value(value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [compile_value(value) for value in raw]
    if not isinstance(raw, str) or "{" not in raw:
        return Value(raw, frozenset())
    is_expression = False
    try:
        tree = VALUES.parse(raw.strip())
        is_expression = _is_one_expression(tree)
        if problems := VALUES.unsafe_parts(tree):
            raise BadValue(problems[0])
        if is_expression:
            text = raw.strip().removeprefix("{{").removesuffix("}}").strip("-")
            compute: Any = VALUES.compile_expression(text, undefined_to_none=False)
        else:
            compute = VALUES.from_string(raw).render
    except TemplateError as e:
        raise BadValue(f"is no Jinja template ({e.message}); mend it") from None
    return Value(raw, frozenset(meta.find_undeclared_variables(tree)) - VALUES.globals.keys(), compute,
                 is_expression)


def _is_one_expression(tree: nodes.Template) -> bool:
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output):
        return False
    parts = tree.body[0].nodes
    return len(parts) == 1 and not isinstance(parts[0], nodes.TemplateData)


def unknown_names(value: Any, known: Iterable[str]) -> list[str]:
    """Return a sentence for each name in a value that no field has."""
    known = sorted(known)
    return [f"names {name!r}, which no setting, field or step before gives{nearest(name, known)}; there are "
            f"{', '.join(known)}" for name in sorted(names_in(value) - set(known))]


def names_in(value: Any) -> set[str]:
    """Return all fields that a compiled value reads."""
    if isinstance(value, Value):
        return set(value.names)
    parts = value.values() if isinstance(value, dict) else value
    return {name for part in parts for name in names_in(part)}


def fill(value: Any, fields: Mapping[str, Any]) -> Any:
    """Compute a value, and each value in a mapping or list."""
    if isinstance(value, Value):
        return value(fields)
    if isinstance(value, dict):
        return {name: fill(part, fields) for name, part in value.items()}
    return [fill(part, fields) for part in value]


def fill_known(value: Any, fields: Mapping[str, Any]) -> Any:
    """Compute a record.  What reads a field that a sample does not have, since it failed before, is left
    out; so is a mapping in a list that lacks a part, such as a message without its content."""
    if isinstance(value, dict):
        return {name: fill_known(part, fields) for name, part in value.items()
                if isinstance(part, list) or names_in(part) <= fields.keys()}
    if isinstance(value, list):
        return [fill(part, fields) for part in value if names_in(part) <= fields.keys()]
    return fill(value, fields)
