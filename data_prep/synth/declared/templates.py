"""Jinja templates for prompts and values in generator files, in Jinja's sandbox.

A field's value is inserted as text of one message: a document in it can neither open a turn nor act as a
template. Compiling refuses attributes with a leading underscore and includes of other files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.synth.replies import NoReply
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import NotBlank


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without `**`, and with `*` for numbers only: `'x' * 10**10` would fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, *, is_trimmed: bool) -> None:
        """`is_trimmed`: whether to drop the line end after `{% ... %}`."""
        super().__init__(undefined=StrictUndefined, trim_blocks=is_trimmed, lstrip_blocks=is_trimmed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(value, (int, float)) for value in (left, right)):
            raise TypeError(f"{operator} takes two numbers, and ** is not there")
        return left * right


PROMPTS, VALUES = PromptEnvironment(is_trimmed=True), PromptEnvironment(is_trimmed=False)


def add_functions(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Make functions callable from prompts and values."""
    for environment in (PROMPTS, VALUES):
        environment.globals.update(functions)


class BadTemplate(Exception):
    """A text that is no valid template; the message contains problem and fix."""


def parse_template(text: str, environment: PromptEnvironment) -> tuple[nodes.Template, frozenset[str]]:
    """Return the template's syntax tree and field names. Raises `BadTemplate`: the syntax is wrong, or the
    template accesses other files or Python internals."""
    try:
        tree = environment.parse(text)
        fields = frozenset(meta.find_undeclared_variables(tree)) - environment.globals.keys()
    except TemplateError as e:
        raise BadTemplate(f"is no Jinja template ({e.message}); mend it") from None
    attributes = [(node.lineno, node.attr) for node in tree.find_all(nodes.Getattr)]
    attributes += [(node.lineno, node.arg.value) for node in tree.find_all(nodes.Getitem)
                   if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)]
    attributes += [(node.lineno, "_attr") for node in tree.find_all(nodes.Filter) if node.name == "attr"]
    for line, name in reversed(attributes):  # innermost first; "_attr": a filter that reads any attribute
        if name.startswith("_"):
            raise BadTemplate(f"line {line} reads the attribute {name!r}; templates may read fields alone, "
                              "remove it")
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise BadTemplate(f"line {node.lineno} includes another file; a template is one file")
    return tree, fields


def find_unknown_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return a problem sentence for each name outside `known`."""
    known = sorted(set(known))
    return [f"names {name!r}, which no setting, field or step before gives{suggest_name(name, known)}; there "
            f"are {', '.join(known)}" for name in sorted(set(names) - set(known))]


@dataclass(frozen=True)
class Prompt:
    """Jinja templates for a prompt's messages."""

    user: NotBlank
    system: str = ""


@dataclass(frozen=True)
class PromptTemplate:
    """A compiled prompt."""

    name: str
    """GENERATOR/PROMPT, for seeds."""
    field_names: frozenset[str]
    """Fields that the templates read."""
    messages: tuple[tuple[str, Template], ...]
    """(role, template) for each message."""

    @classmethod
    def from_prompt(cls, name: str, prompt: Prompt) -> "PromptTemplate":
        """Compile a prompt; raises `BadTemplate`."""
        texts = [(role, text) for role, text in (("system", prompt.system), ("user", prompt.user)) if text]
        names = frozenset[str]().union(*(parse_template(text, PROMPTS)[1] for _, text in texts))
        return cls(name, names, tuple((role, PROMPTS.from_string(text)) for role, text in texts))

    def render_messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """Render the messages; raises `UserError` for a missing field or attribute."""
        try:
            return [{"role": role, "content": template.render(fields).strip()}
                    for role, template in self.messages]
        except NoReply:
            raise  # a function in the template had no answer: the item is tried again later
        except Exception as e:  # expressions over model output may raise anything
            raise UserError(f"prompt {self.name}: cannot be rendered ({_format_template_error(e)}); it is "
                            f"given {', '.join(sorted(fields)) or 'no field'}") from None


@dataclass(frozen=True)
class CompiledValue:
    """A value in a generator file, computed from a sample's fields.

    A text that consists of one `{{ expression }}` gives the expression's value; other text is rendered.
    """

    raw: Any
    """Value in the file."""
    field_names: frozenset[str]
    """Fields that the value reads."""
    function: Any = None
    """Fields -> value; None: `raw` is the value."""
    is_expression: bool = False
    """Whether the text is one `{{ expression }}`, whose value keeps its type."""

    def compute(self, fields: Mapping[str, Any]) -> Any:
        """Return the value; raises `UserError` if the template cannot be computed."""
        if self.function is None:
            return self.raw
        try:
            value = self.function(**{name: fields[name] for name in self.field_names if name in fields})
            if isinstance(value, Iterator):  # filters such as `map` are lazy
                return list(value)
        except (UserError, NoReply):
            raise
        except Exception as e:  # expressions over model output may raise anything
            raise UserError(f"{self.raw}: cannot be computed ({_format_template_error(e)}); mend this value "
                            "of the generator's file") from None
        if isinstance(value, Undefined):
            raise UserError(f"{self.raw}: has no value; mend this value of the generator's file")
        return value


def _format_template_error(error: Exception) -> str | None:
    if isinstance(error, TemplateError):
        return error.message
    return f"{type(error).__name__}: {error}"


def compile_value(raw: Any) -> CompiledValue | dict[str, Any] | list[Any]:
    """Compile a text, or each text in a list or mapping; raises `BadTemplate`."""
    if isinstance(raw, Mapping):
        return {str(name): compile_value(value) for name, value in raw.items()}
    if isinstance(raw, list):
        return [compile_value(value) for value in raw]
    if not isinstance(raw, str) or "{" not in raw:
        return CompiledValue(raw, frozenset())
    tree, names = parse_template(raw.strip(), VALUES)
    first = tree.body[0] if len(tree.body) == 1 else None
    is_expression = (isinstance(first, nodes.Output) and len(first.nodes) == 1
                     and not isinstance(first.nodes[0], nodes.TemplateData))
    if is_expression:
        text = raw.strip().removeprefix("{{").removesuffix("}}").strip("-")  # "{{- ... -}}" trims blanks
        function: Any = VALUES.compile_expression(text, undefined_to_none=False)
    else:
        function = VALUES.from_string(raw).render
    return CompiledValue(raw, names, function, is_expression)


def collect_field_names(value: Any) -> set[str]:
    """Return the fields that a compiled value reads, in nested lists and mappings too."""
    if isinstance(value, CompiledValue):
        return set(value.field_names)
    parts = value.values() if isinstance(value, dict) else value
    return set[str]().union(*map(collect_field_names, parts))


def compute_value(value: Any, fields: Mapping[str, Any]) -> Any:
    """Compute a compiled value, in nested lists and mappings too."""
    if isinstance(value, CompiledValue):
        return value.compute(fields)
    if isinstance(value, dict):
        return {name: compute_value(part, fields) for name, part in value.items()}
    return [compute_value(part, fields) for part in value]


def compute_record(value: Any, fields: Mapping[str, Any]) -> Any:
    """Compute a sample's record, without values for which `fields` lacks a field.

    A failed sample lacks the fields of later steps. A list loses only the items that read such a field; a
    mapping inside is omitted as a whole, such as a message without `content`.
    """
    if isinstance(value, dict):
        return {name: compute_record(part, fields) for name, part in value.items()
                if isinstance(part, list) or collect_field_names(part) <= fields.keys()}
    if isinstance(value, list):
        return [compute_value(part, fields) for part in value if collect_field_names(part) <= fields.keys()]
    return compute_value(value, fields)
