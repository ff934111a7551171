"""Environment interface: typed tools, tool faults, episode limits.

A tool is a Python function, whose signature and docstring define the JSON schema for models.
"""

import copy
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Protocol, TypeVar, cast, get_type_hints

from annotated_types import Gt, Le
from typing_extensions import TypedDict

from megatron_sov.base.errors import UserError, first_error_line
from megatron_sov.base.settings import AtLeastOne
from megatron_sov.chat.tool_calls import ServedTurn
from megatron_sov.judge.rewards.reward import Score

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FAULTS = {
    "json": "the call is no JSON", "form": "the call is no object of a name and arguments",
    "unclosed": "nothing ends the call", "many": "more calls in a turn than the limit",
    "unknown_tool": "there is no tool of that name", "arguments": "arguments are missing, unknown or of "
    "another type", "refused": "the tool says no: no such row, a rule of the world is broken",
    "failed": "the tool raised an error", "result": "the tool returned something that is no JSON",
    "timeout": "the tool took longer than the limit", "memory": "the tool asked for too much memory",
    "ended": "the tool ended its process", "state": "the tool left a state that is no JSON, or too large",
    "infrastructure": "what the tool runs on is broken: the episode has no reward",
}
"""Fault code -> meaning."""
MALFORMED_CALLS = ("json", "form", "unclosed", "many", "unknown_tool", "arguments")
"""Keys of `FAULTS` for calls that reach no tool."""
INFRASTRUCTURE = "infrastructure"


class ToolFault(Exception):
    """A call without a result."""

    def __init__(self, code: str, reason: str) -> None:
        """Store `code`, a key of `FAULTS`, and `reason`, a sentence for the model."""
        super().__init__(reason)
        self.code, self.reason = code, reason


class ToolRefused(ToolFault):
    """Raised by a tool to refuse a call: missing rows, broken rules."""

    def __init__(self, reason: str) -> None:
        super().__init__("refused", reason)


class InfrastructureFault(ToolFault):
    """Raised by a tool if the machine fails: the episode has no reward."""

    def __init__(self, reason: str) -> None:
        super().__init__(INFRASTRUCTURE, reason)


F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_is_tool"
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: \([^)]*\))?: *(.*(?:\n+[ \t]+.*)*)", re.MULTILINE)
# Built dynamically, which type checkers cannot follow.
_TYPED_DICT, _ANNOTATED, _NOT_REQUIRED = cast(Any, TypedDict), cast(Any, Annotated), cast(Any, NotRequired)
MAX_SHOWN_ERRORS = 5
"""Argument errors reported to a model."""


def tool(function: F) -> F:
    """Mark an environment's method as a tool."""
    setattr(function, _MARK, True)
    return function


@dataclass(frozen=True)
class Parameter:
    """A tool's argument."""

    type: Any
    """Python type: str, int, list[str], Literal[...], X | None."""
    description: str = ""
    """Description for models."""
    default: Any = inspect.Parameter.empty
    """Default value; empty: the argument is required."""


@dataclass(frozen=True)
class Tool:
    """A function that models may call."""

    name: str
    """Name for models."""
    description: str
    """Description for models."""
    parameters: Mapping[str, Parameter]
    """Name -> parameter."""
    function: Callable[..., Any] = field(compare=False)
    """Function called with keyword arguments."""
    _adapter: "TypeAdapter[Any]" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = {name: _annotate_parameter(parameter) for name, parameter in self.parameters.items()}
        try:
            object.__setattr__(self, "_adapter", build_strict_adapter(self.name, fields))
            self._adapter.json_schema()
        except Exception as e:  # type hooks may raise any exception
            raise UserError(f"tool {self.name}: its arguments have no JSON schema ({first_error_line(e)}); "
                            "use str, int, float, bool, list, dict, Literal and None") from None

    def describe_for_models(self) -> dict[str, Any]:
        """Return the OpenAI-style description, as used in chat templates."""
        schema = _strip_titles(self._adapter.json_schema())
        schema_parameters = {"type": "object", "properties": schema.pop("properties", {}),
                             "required": schema.pop("required", [])}
        schema_parameters |= {key: schema[key] for key in ("$defs",) if key in schema}
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": schema_parameters}}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Validate a model's arguments and call the function.

        Raises:
            ToolFault: an argument is missing, unknown or mistyped.
        """
        from pydantic import ValidationError  # slow to import; `--help` must be fast

        try:
            # Validate as JSON, in which tuples are lists.
            checked = self._adapter.validate_json(json.dumps(arguments, allow_nan=False))
        except ValidationError as e:
            problems = [f"{'.'.join(map(str, error['loc'])) or 'arguments'}: {_format_argument_error(error)}"
                        for error in e.errors(include_url=False)]
            num_more = len(problems) - MAX_SHOWN_ERRORS
            more = f"; and {num_more} more" if num_more > 0 else ""
            raise ToolFault("arguments", f"{self.name} was given wrong arguments: "
                                         f"{'; '.join(problems[:MAX_SHOWN_ERRORS])}{more}") from None
        return self.function(**checked)


def build_strict_adapter(name: str, fields: Mapping[str, Any]) -> "TypeAdapter[Any]":
    """Return a validator for objects with exactly these fields (name -> type) and exact types."""
    from pydantic import ConfigDict, TypeAdapter, with_config  # slow to import; `--help` must be fast

    # Strict: "3" is not 3, and true is not 1. A TypedDict omits optional fields.
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return TypeAdapter(with_config(config)(_TYPED_DICT(name, dict(fields))))


def build_tool(function: Callable[..., Any]) -> Tool:
    """Build a tool from a function or bound method.

    Raises:
        UserError: the docstring or a type is missing, or a type has no JSON form.
    """
    name = function.__name__
    hints = get_type_hints(function, include_extras=True)
    parameters = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD,
                                  parameter.KEYWORD_ONLY) or parameter.name not in hints:
            raise UserError(f"tool {name}: its argument {str(parameter)!r} must have a name and a type; "
                            "write it as `name: str`")
        parameters[parameter.name] = Parameter(hints[parameter.name], "", parameter.default)
    return describe_tool(name, inspect.getdoc(function) or "", parameters, function)


def describe_tool(name: str, docstring: str, parameters: Mapping[str, Parameter],
                  function: Callable[..., Any]) -> Tool:
    """Build a tool with descriptions from a Google-style docstring.

    Raises:
        UserError: the docstring is empty, or a type has no JSON form.
    """
    text = textwrap.dedent(docstring)
    if not text.strip():
        raise UserError(f"tool {name}: has no docstring; models are shown it, so say what the tool does")
    described = _parse_argument_docs(text)
    return Tool(name, " ".join(_SECTION.split(text)[0].split()),
                {argument: replace(parameter, description=described.get(argument, ""))
                 for argument, parameter in parameters.items()}, function)


def collect_tools(environment: Any) -> tuple[Tool, ...]:
    """Return an environment's tools in definition order; raises like `build_tool`."""
    # Base classes first; a dict is an ordered set.
    names: dict[str, None] = {}
    for base_class in reversed(type(environment).__mro__):
        names |= {name: None for name, value in vars(base_class).items() if getattr(value, _MARK, False)}
    return tuple(build_tool(getattr(environment, name)) for name in names)


def _annotate_parameter(parameter: Parameter) -> Any:
    from pydantic import Field  # slow to import; `--help` must be fast

    optional = parameter.default is not inspect.Parameter.empty
    schema_extra = {"default": parameter.default} if optional and parameter.default is not None else None
    info = Field(description=parameter.description or None, json_schema_extra=schema_extra)
    # Show the default without filling it in, so that models see the effect of omission.
    kind = _ANNOTATED[parameter.type, info]
    return _NOT_REQUIRED[kind] if optional else kind


def _parse_argument_docs(text: str) -> dict[str, str]:
    """Return argument -> description from a Google-style docstring."""
    # Odd items are section names, even items their texts.
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = textwrap.dedent(sections.get("Args", "").strip("\n"))
    return {name: " ".join(description.split()) for name, description in _ARGUMENT.findall(lines)}


def _strip_titles(value: Any, inside_properties: bool = False) -> Any:
    """Return a schema without the titles that `pydantic` derives from names."""
    if isinstance(value, dict):
        return {key: _strip_titles(part, key == "properties") for key, part in value.items()
                # Inside `properties`, keys are argument names, which may be "title".
                if inside_properties or not (key == "title" or (key == "additionalProperties" and not part))}
    return [_strip_titles(part) for part in value] if isinstance(value, list) else value


def _format_argument_error(error: Any) -> str:
    """Describe an argument error without the value, which may be large."""
    return {"missing": "is missing", "extra_forbidden": "there is no such argument"}.get(
        error["type"], str(error["msg"])[:200])


MAX_TIMEOUT_S = 86_400.0


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits per episode."""

    max_turns: AtLeastOne = 5
    """Model turns, including the answer."""
    max_tool_chars: AtLeastOne = 1024
    """Characters per tool result; the rest is cut with a note."""
    max_prompt_tokens: AtLeastOne = 4096
    """Tokens in the first prompt: rules, tools and question."""
    max_response_tokens: AtLeastOne = 8192
    """Tokens after the first prompt: model turns and tool results."""
    max_turn_tokens: AtLeastOne = 4096
    """Tokens per model turn. Engines always get this limit, so that samples do not depend on the remaining
    tokens."""
    max_calls_per_turn: AtLeastOne = 8
    """Calls per turn; further calls are rejected with a note."""
    call_timeout_s: Annotated[float, Gt(0), Le(MAX_TIMEOUT_S)] = 30.0
    """Time per call, without waiting for a processor; slower calls are ended."""
    max_state_bytes: AtLeastOne = 16 << 20
    """Size of an environment's state as JSON, which is journaled every turn."""


LIMITS = {"train": EpisodeLimits(), "test": EpisodeLimits(max_turns=12, max_tool_chars=4000)}
"""Name -> limits, as in Typhoon-S's code (scb-10x/typhoon-s): 5 turns and 1,024 characters per tool result in
training, 12 and 4,000 in tests."""


def cut_text(text: str, max_chars: int) -> tuple[str, bool]:
    """Cut a tool result to a limit, with a note; return (text, whether it was cut)."""
    if len(text) <= max_chars:
        return text, False
    # The note counts towards the limit, unless no text would remain.
    note = f"\n[cut: {max_chars:,} of {len(text):,} characters]"
    return (text[:max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]), True


Task = Mapping[str, Any]
"""A task as JSON: `question`, initial state, goal."""


@dataclass(frozen=True)
class Observation:
    """First messages to a model."""

    user: str
    """User message with the question."""
    system: str = ""
    """System message with rules, or ""."""


class Environment(Protocol):
    """Environment protocol; settings are the keyword arguments of the constructor, with defaults.

    An object plays one episode at a time; `reset` starts the next.
    """

    def reset(self, task: Task) -> Observation:
        """Begin an episode.

        Raises:
            UserError: the task does not fit this environment.
        """
        ...

    def tools(self) -> Sequence[dict[str, Any]]:
        """Return the episode's tools, in OpenAI's format."""
        ...

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Call a tool; return a text or a JSON value.

        Raises:
            ToolFault: the call has no result; the state is restored.
        """
        ...

    def score(self, answer: str) -> Score | float:
        """Return the episode's reward.

        Args:
            answer: final answer; "" for unfinished episodes.
        """
        ...

    def snapshot(self) -> Any:
        """Return the state as a JSON value."""
        ...

    def restore(self, state: Any) -> None:
        """Restore a state from `snapshot`, possibly from another process."""
        ...


@dataclass(frozen=True)
class TurnReply:
    """Reply to a model's turn in a conversation."""

    results: tuple[str, ...] = ()
    """Results of the turn's calls in order; () at the end of an episode."""
    user: str | None = None
    """User message after the results."""
    is_over: bool = False
    """The episode is over."""


class ConversingEnvironment(Environment, Protocol):
    """Environment that receives whole turns rather than calls, with a user who may answer."""

    def reply(self, turn: ServedTurn) -> TurnReply:
        """Reply to a model's turn.

        Raises:
            ToolFault: the episode cannot continue and has no reward.
        """
        ...


class World:
    """Base class: tools are methods marked with `@tool`, and the state is `self.state`."""

    SYSTEM = ""
    """Rules for the model."""
    EXAMPLES: tuple[Task, ...] = ()
    """Example tasks."""

    state: dict[str, Any]
    """State as JSON values."""
    task: Task
    """The episode's task."""

    def reset(self, task: Task) -> Observation:
        # A copy, because tasks are reused and tools change the state in place.
        self.task, self.state = task, copy.deepcopy(self.first_state(task))
        return Observation(get_text_field(task, "question"), get_text_field(task, "system", self.rules()))

    def rules(self) -> str:
        """Return the rules for tasks without `system`."""
        return self.SYSTEM

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return the initial state."""
        return {}

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        """Name -> tool; by default from the marked methods."""
        return {tool.name: tool for tool in collect_tools(self)}

    def tools(self) -> list[dict[str, Any]]:
        return [tool.describe_for_models() for tool in self.tools_by_name.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if name not in self.tools_by_name:
            raise ToolFault("unknown_tool", format_unknown_tool(name, self.tools_by_name))
        return self.tools_by_name[name].call(arguments)

    def snapshot(self) -> Any:
        return copy.deepcopy(self.state)

    def restore(self, state: Any) -> None:
        self.state = copy.deepcopy(state)


def format_unknown_tool(name: str, tools: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the error for a call to an unknown tool."""
    return f"there is no tool {name[:60]!r}; the tools are {', '.join(tools)}"


def get_text_field(task: Task, name: str, default: str | None = None) -> str:
    """Return a task's text field.

    Raises:
        UserError: the field is missing or not text.
    """
    value = task.get(name, default)
    if not isinstance(value, str):
        problem = f"{name} = {str(value)[:60]!r}: must be text" if name in task else f"has no {name!r}"
        raise UserError(f"the task {problem}")
    return value
