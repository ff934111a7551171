"""Typed tools: a Python function's signature and docstring as the JSON schema that models are shown, and a
model's arguments held to it."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypeVar, cast, get_type_hints

from typing_extensions import TypedDict

from megatron_sov.base.errors import UserError, first_line
from megatron_sov.judge.tools.faults import ToolFault

if TYPE_CHECKING:
    from pydantic import TypeAdapter

F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_is_tool"
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: \([^)]*\))?: *(.*(?:\n+[ \t]+.*)*)", re.MULTILINE)
# made of values, which type checkers do not follow
_TYPED_DICT, _ANNOTATED, _NOT_REQUIRED = cast(Any, TypedDict), cast(Any, Annotated), cast(Any, NotRequired)
MAX_TOLD = 5
"""Wrong arguments that a model is told of."""


def tool(function: F) -> F:
    """Mark a method of an environment as a tool that models may call."""
    setattr(function, _MARK, True)
    return function


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool."""

    type: Any
    """As Python writes it: str, int, list[str], Literal[...], X | None."""
    description: str = ""
    """What models are told."""
    default: Any = inspect.Parameter.empty
    """Taken where the argument is left out; without one it may not be."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    """As models write it."""
    description: str
    """What it does."""
    parameters: Mapping[str, Parameter]
    """Name -> what it takes."""
    function: Callable[..., Any] = field(compare=False)
    """Is given the arguments by name."""
    _adapter: TypeAdapter[Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from pydantic import ConfigDict, TypeAdapter, with_config

        fields = {name: _annotated(parameter) for name, parameter in self.parameters.items()}
        # strict: "3" is no 3, and true is no 1
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        made = with_config(config)(_TYPED_DICT(self.name, fields))
        try:
            object.__setattr__(self, "_adapter", TypeAdapter(made))
            self._adapter.json_schema()
        except Exception as e:  # whatever a type's own hooks raise
            raise UserError(f"tool {self.name}: its arguments have no JSON schema "
                            f"({first_line(e)}); use str, int, float, bool, list, dict, Literal and "
                            "None") from None

    def description_for_models(self) -> dict[str, Any]:
        """Return it as OpenAI describes functions, which chat templates show."""
        schema = _without_titles(self._adapter.json_schema())
        shown = {"type": "object", "properties": schema.pop("properties", {}),
                 "required": schema.pop("required", [])}
        shown |= {key: schema[key] for key in ("$defs",) if key in schema}
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": shown}}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Return what the function gives for a model's arguments.

        Raises:
            ToolFault: an argument is missing, unknown, or of another type.
        """
        from pydantic import ValidationError

        try:
            # as JSON: a tuple is a list there
            checked = self._adapter.validate_json(json.dumps(arguments, allow_nan=False))
        except ValidationError as e:
            told = [f"{'.'.join(map(str, error['loc'])) or 'arguments'}: {_told(error)}"
                    for error in e.errors(include_url=False)]
            more = f"; and {len(told) - MAX_TOLD} more" if len(told) > MAX_TOLD else ""
            raise ToolFault("arguments", f"{self.name} was given wrong arguments: "
                                         f"{'; '.join(told[:MAX_TOLD])}{more}") from None
        return self.function(**checked)


def tool_of(function: Callable[..., Any]) -> Tool:
    """Return a function, or a bound method, as a tool.

    Raises:
        UserError: it has no docstring, or an argument has no type or none that JSON has.
    """
    name = function.__name__
    text = textwrap.dedent(inspect.getdoc(function) or "")
    if not text.strip():
        raise UserError(f"tool {name}: has no docstring; models are shown it, so say what the tool does")
    hints = get_type_hints(function, include_extras=True)
    described = _described(text)
    found = {}
    for given in inspect.signature(function).parameters.values():
        if given.kind not in (given.POSITIONAL_OR_KEYWORD, given.KEYWORD_ONLY) or given.name not in hints:
            raise UserError(f"tool {name}: its argument {str(given)!r} must have a name and a type; "
                            "write it as `name: str`")
        found[given.name] = Parameter(hints[given.name], described.get(given.name, ""), given.default)
    return Tool(name, " ".join(_SECTION.split(text)[0].split()), found, function)


def tools_of(environment: Any) -> tuple[Tool, ...]:
    """Return the methods of an environment that are marked as tools, in the order in which they are written;
    raises as `tool_of` does."""
    names: dict[str, None] = {}
    for made in reversed(type(environment).__mro__):
        names |= {name: None for name, value in vars(made).items() if getattr(value, _MARK, False)}
    return tuple(tool_of(getattr(environment, name)) for name in names)


def _annotated(parameter: Parameter) -> Any:
    from pydantic import Field

    optional = parameter.default is not inspect.Parameter.empty
    shown = {"default": parameter.default} if optional and parameter.default is not None else None
    info = Field(description=parameter.description or None, json_schema_extra=shown)
    kind = _ANNOTATED[parameter.type, info]
    return _NOT_REQUIRED[kind] if optional else kind


def _described(text: str) -> dict[str, str]:
    """Return name -> description of the arguments in a Google-style docstring."""
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = textwrap.dedent(sections.get("Args", "").strip("\n"))
    return {name: " ".join(said.split()) for name, said in _ARGUMENT.findall(lines)}


def _without_titles(value: Any, inside_properties: bool = False) -> Any:
    """Return a schema without the titles that pydantic makes of names; models need none."""
    if isinstance(value, dict):
        return {key: _without_titles(part, key == "properties") for key, part in value.items()
                if inside_properties or not (key == "title" or (key == "additionalProperties" and not part))}
    return [_without_titles(part) for part in value] if isinstance(value, list) else value


def _told(error: Any) -> str:
    """Return what is wrong with an argument, without its value, which may be a megabyte."""
    return {"missing": "is missing", "extra_forbidden": "there is no such argument"}.get(
        error["type"], str(error["msg"])[:200])
