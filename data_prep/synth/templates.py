"""Prompts and values: Jinja templates over named fields, in Jinja's sandbox.

A field is text inside one message: a document opens no turn of its own and is never read as a template.
Attributes with a leading underscore, and other files, are refused when a template is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.synth.replies import NoReply
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import NotBlank, read_settings_file


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product is one of numbers: `'x' * 10**10` would fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, *, is_trimmed: bool) -> None:
        """`is_trimmed`: whether a line end after a `{% ... %}` is no part of the text."""
        super().__init__(undefined=StrictUndefined, trim_blocks=is_trimmed, lstrip_blocks=is_trimmed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(one, (int, float)) for one in (left, right)):
            raise TypeError(f"{operator} takes two numbers, and ** is not there")
        return left * right


PROMPTS, VALUES = PromptEnvironment(is_trimmed=True), PromptEnvironment(is_trimmed=False)


def add_functions(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Let prompts and values call functions by these names."""
    for environment in (PROMPTS, VALUES):
        environment.globals.update(functions)


class BadTemplate(Exception):
    """A text that is no template; says why and what to do."""


def parse_template(text: str, environment: PromptEnvironment) -> tuple[nodes.Template, frozenset[str]]:
    """Return the tree of a template, and the fields that it reads.

    Raises:
        BadTemplate: it is none, or reaches for other files or the inside of Python's objects.
    """
    try:
        tree = environment.parse(text)
        fields = frozenset(meta.find_undeclared_variables(tree)) - environment.globals.keys()
    except TemplateError as e:
        raise BadTemplate(f"is no Jinja template ({e.message}); mend it") from None
    names = [(node.lineno, node.attr) for node in tree.find_all(nodes.Getattr)]
    names += [(node.lineno, node.arg.value) for node in tree.find_all(nodes.Getitem)
              if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)]
    names += [(node.lineno, f"_{node.name}") for node in tree.find_all(nodes.Filter) if node.name == "attr"]
    for line, name in reversed(names):  # the innermost first
        if name.startswith("_"):
            raise BadTemplate(f"line {line} reads the attribute {name!r}; templates may read fields alone, "
                              "remove it")
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise BadTemplate(f"line {node.lineno} includes another file; a template is one file")
    return tree, fields


def unknown_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return a sentence for each name that no field has."""
    known = sorted(set(known))
    return [f"names {name!r}, which no setting, field or step before gives{suggest_name(name, known)}; there "
            f"are {', '.join(known)}" for name in sorted(set(names) - set(known))]


@dataclass(frozen=True)
class Prompt:
    """One prompt: a Jinja template for each message."""

    user: NotBlank
    system: str = ""


@dataclass(frozen=True)
class PromptTemplate:
    """A compiled prompt."""

    name: str
    names: frozenset[str]
    """Fields that it reads."""
    parts: tuple[tuple[str, Template], ...]
    """Role and template of each message."""

    @classmethod
    def compile(cls, name: str, prompt: Prompt) -> PromptTemplate:
        """Compile a prompt; raises `BadTemplate`."""
        texts = [(role, text) for role, text in (("system", prompt.system), ("user", prompt.user)) if text]
        names = frozenset[str]().union(*(parse_template(text, PROMPTS)[1] for _, text in texts))
        return cls(name, names, tuple((role, PROMPTS.from_string(text)) for role, text in texts))

    def messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """Render the messages; raises `UserError` where a field is missing or lacks an attribute."""
        try:
            return [{"role": role, "content": template.render(fields).strip()}
                    for role, template in self.parts]
        except NoReply:
            raise
        except Exception as e:  # any error of an expression over values of models
            said = e.message if isinstance(e, TemplateError) else f"{type(e).__name__}: {e}"
            raise UserError(f"prompt {self.name}: cannot be rendered ({said}); it is given "
                            f"{', '.join(sorted(fields)) or 'no field'}") from None


@dataclass(frozen=True)
class _PromptFile:
    """Prompts of a generator that is written in Python."""

    prompts: dict[str, Prompt]


def read_prompts(file: Path) -> dict[str, PromptTemplate]:
    """Read the prompts of a YAML file, as GENERATOR/PROMPT.

    Raises:
        UserError: the file cannot be used.
    """
    found = {}
    for name, prompt in read_settings_file(_PromptFile, file).prompts.items():
        try:
            found[f"{file.stem}/{name}"] = PromptTemplate.compile(f"{file.stem}/{name}", prompt)
        except BadTemplate as e:
            raise UserError(f"{file}: prompts.{name}: {e}") from None
    return found


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
        """Return the value; raises `UserError` where a field lacks what the template asks of it."""
        if self.compute is None:
            return self.raw
        try:
            found = self.compute(**{name: fields[name] for name in self.names if name in fields})
        except (UserError, NoReply):
            raise
        except Exception as e:  # any error of an expression over values of models
            said = e.message if isinstance(e, TemplateError) else f"{type(e).__name__}: {e}"
            raise UserError(f"{self.raw}: cannot be computed ({said}); mend this value of the generator's "
                            "file") from None
        if isinstance(found, Undefined):
            raise UserError(f"{self.raw}: has no value; mend this value of the generator's file")
        return list(found) if isinstance(found, Iterator) else found


def compile_value(raw: Any) -> Value | dict[str, Any] | list[Any]:
    """Compile a text, or each text of a list or mapping; raises `BadTemplate`."""
    if isinstance(raw, Mapping):
        return {str(name): compile_value(value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [compile_value(value) for value in raw]
    if not isinstance(raw, str) or "{" not in raw:
        return Value(raw, frozenset())
    tree, names = parse_template(raw.strip(), VALUES)
    first = tree.body[0] if len(tree.body) == 1 else None
    is_expression = (isinstance(first, nodes.Output) and len(first.nodes) == 1
                     and not isinstance(first.nodes[0], nodes.TemplateData))
    if is_expression:
        text = raw.strip().removeprefix("{{").removesuffix("}}").strip("-")
        compute: Any = VALUES.compile_expression(text, undefined_to_none=False)
    else:
        compute = VALUES.from_string(raw).render
    return Value(raw, names, compute, is_expression)


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
    """Compute a record.  A value that reads a field which a failed sample lacks is left out; so is a mapping
    in a list that lacks a part, such as a message without its content."""
    if isinstance(value, dict):
        return {name: fill_known(part, fields) for name, part in value.items()
                if isinstance(part, list) or names_in(part) <= fields.keys()}
    if isinstance(value, list):
        return [fill(part, fields) for part in value if names_in(part) <= fields.keys()]
    return fill(value, fields)
