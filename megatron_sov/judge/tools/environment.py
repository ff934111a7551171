"""An environment: typed tools, a state and a goal that can be checked; what can go wrong with a call; and how
far an episode may go.

A tool is a Python function: its signature and docstring become the JSON schema that models are shown, and a
model's arguments are held to it."""

from __future__ import annotations

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
"""Code -> what it means."""
MALFORMED_CALLS = ("json", "form", "unclosed", "many", "unknown_tool", "arguments")
"""Codes of calls that never reached a tool."""
INFRASTRUCTURE = "infrastructure"


class ToolFault(Exception):
    """A call that gave no result."""

    def __init__(self, code: str, reason: str) -> None:
        """`code`: one of `FAULTS`; `reason`: one sentence, which the model is told."""
        super().__init__(reason)
        self.code, self.reason = code, reason


class ToolRefused(ToolFault):
    """What a tool raises to say no to a model: no such row, a rule of the world is broken."""

    def __init__(self, reason: str) -> None:
        super().__init__("refused", reason)


class InfrastructureFault(ToolFault):
    """What a tool raises when the machine, and not the call, is at fault: the episode has no reward."""

    def __init__(self, reason: str) -> None:
        super().__init__(INFRASTRUCTURE, reason)


F = TypeVar("F", bound=Callable[..., Any])
_MARK = "_is_tool"
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^(\w+)(?: \([^)]*\))?: *(.*(?:\n+[ \t]+.*)*)", re.MULTILINE)
# made of values, which type checkers do not follow
_TYPED_DICT, _ANNOTATED, _NOT_REQUIRED = cast(Any, TypedDict), cast(Any, Annotated), cast(Any, NotRequired)
MAX_SHOWN_ERRORS = 5
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
        fields = {name: _annotate_parameter(parameter) for name, parameter in self.parameters.items()}
        try:
            object.__setattr__(self, "_adapter", build_strict_adapter(self.name, fields))
            self._adapter.json_schema()
        except Exception as e:  # whatever a type's own hooks raise
            raise UserError(f"tool {self.name}: its arguments have no JSON schema ({first_error_line(e)}); "
                            "use str, int, float, bool, list, dict, Literal and None") from None

    def describe_for_models(self) -> dict[str, Any]:
        """Return it as OpenAI describes functions, which chat templates show."""
        schema = _strip_titles(self._adapter.json_schema())
        schema_parameters = {"type": "object", "properties": schema.pop("properties", {}),
                 "required": schema.pop("required", [])}
        schema_parameters |= {key: schema[key] for key in ("$defs",) if key in schema}
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": schema_parameters}}

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
            problems = [f"{'.'.join(map(str, error['loc'])) or 'arguments'}: {_format_argument_error(error)}"
                    for error in e.errors(include_url=False)]
            num_more = len(problems) - MAX_SHOWN_ERRORS
            more = f"; and {num_more} more" if num_more > 0 else ""
            raise ToolFault("arguments", f"{self.name} was given wrong arguments: "
                                         f"{'; '.join(problems[:MAX_SHOWN_ERRORS])}{more}") from None
        return self.function(**checked)


def build_strict_adapter(name: str, fields: Mapping[str, Any]) -> TypeAdapter[Any]:
    """Return the check of an object with these fields (name -> type) and no others, of these exact types."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    # strict: "3" is no 3, and true is no 1; a TypedDict leaves optional fields out
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return TypeAdapter(with_config(config)(_TYPED_DICT(name, dict(fields))))


def build_tool(function: Callable[..., Any]) -> Tool:
    """Return a function, or a bound method, as a tool.

    Raises:
        UserError: it has no docstring, or an argument has no type or none that JSON has.
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
    """Return a tool whose descriptions are those of a docstring in Google's style.

    Raises:
        UserError: the docstring is empty, or an argument is of a type that JSON has not.
    """
    text = textwrap.dedent(docstring)
    if not text.strip():
        raise UserError(f"tool {name}: has no docstring; models are shown it, so say what the tool does")
    described = _parse_argument_docs(text)
    return Tool(name, " ".join(_SECTION.split(text)[0].split()),
                {argument: replace(parameter, description=described.get(argument, ""))
                 for argument, parameter in parameters.items()}, function)


def collect_tools(environment: Any) -> tuple[Tool, ...]:
    """Return the methods of an environment that are marked as tools, in the order in which they are written;
    raises as `tool_of` does."""
    # base classes first, each name once: a dict is an ordered set
    names: dict[str, None] = {}
    for base_class in reversed(type(environment).__mro__):
        names |= {name: None for name, value in vars(base_class).items() if getattr(value, _MARK, False)}
    return tuple(build_tool(getattr(environment, name)) for name in names)


def _annotate_parameter(parameter: Parameter) -> Any:
    from pydantic import Field

    optional = parameter.default is not inspect.Parameter.empty
    schema_extra = {"default": parameter.default} if optional and parameter.default is not None else None
    info = Field(description=parameter.description or None, json_schema_extra=schema_extra)
    # the default is shown and not filled in: models see what happens without it
    kind = _ANNOTATED[parameter.type, info]
    return _NOT_REQUIRED[kind] if optional else kind


def _parse_argument_docs(text: str) -> dict[str, str]:
    """Return name -> description of the arguments in a Google-style docstring."""
    # odd places have the names of sections, even ones their texts
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = textwrap.dedent(sections.get("Args", "").strip("\n"))
    return {name: " ".join(description.split()) for name, description in _ARGUMENT.findall(lines)}


def _strip_titles(value: Any, inside_properties: bool = False) -> Any:
    """Return a schema without the titles that pydantic makes of names; models need none."""
    if isinstance(value, dict):
        return {key: _strip_titles(part, key == "properties") for key, part in value.items()
                # inside of `properties` a key is an argument's name, and "title" may be one
                if inside_properties or not (key == "title" or (key == "additionalProperties" and not part))}
    return [_strip_titles(part) for part in value] if isinstance(value, list) else value


def _format_argument_error(error: Any) -> str:
    """Return what is wrong with an argument, without its value, which may be a megabyte."""
    return {"missing": "is missing", "extra_forbidden": "there is no such argument"}.get(
        error["type"], str(error["msg"])[:200])


MAX_TIMEOUT_S = 86_400.0


@dataclass(frozen=True)
class EpisodeLimits:
    """Where an episode ends."""

    max_turns: AtLeastOne = 5
    """Of the model, its answer among them."""
    max_tool_chars: AtLeastOne = 1024
    """Of one result; the rest is cut off, and the model is told so."""
    max_prompt_tokens: AtLeastOne = 4096
    """Of the first prompt: rules, tools and question."""
    max_response_tokens: AtLeastOne = 8192
    """Behind the first prompt: what the model writes and what tools say."""
    max_turn_tokens: AtLeastOne = 4096
    """That the model may write in one turn; asked of an engine whatever is left of an episode, so that its
    samples do not depend on that."""
    max_calls_per_turn: AtLeastOne = 8
    """More calls of a turn are not made, and the model is told so."""
    call_timeout_s: Annotated[float, Gt(0), Le(MAX_TIMEOUT_S)] = 30.0
    """For one call, without the time that it waits for a processor; what takes longer is ended."""
    max_state_bytes: AtLeastOne = 16 << 20
    """Of an environment's state as JSON, which the journal keeps for each turn."""


LIMITS = {"train": EpisodeLimits(), "test": EpisodeLimits(max_turns=12, max_tool_chars=4000)}
"""Name -> limits; both as in Typhoon-S's released code (scb-10x/typhoon-s), whose agent is trained with 5
turns and 1,024 characters of a tool's answer, and judged with 12 and 4,000."""


def cut_text(text: str, max_chars: int) -> tuple[str, bool]:
    """Return a tool's result within the limit, with a note of what was cut, and whether anything was."""
    if len(text) <= max_chars:
        return text, False
    # the note counts towards the limit, unless it would not leave a character of the text
    note = f"\n[cut: {max_chars:,} of {len(text):,} characters]"
    return (text[:max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]), True


Task = Mapping[str, Any]
"""What is to be done, in JSON: `question`, what the world is at first, and how the end is checked."""


@dataclass(frozen=True)
class Observation:
    """What a model is told first."""

    user: str
    """The question."""
    system: str = ""
    """Rules of the world; empty: no system message."""


class Environment(Protocol):
    """What every environment has; its settings are what it is made with, by name and with defaults.

    One object plays one episode at a time, and many after each other: `reset` forgets the last one.
    """

    def reset(self, task: Task) -> Observation:
        """Begin an episode.

        Raises:
            UserError: the task is none of this environment's.
        """
        ...

    def tools(self) -> Sequence[dict[str, Any]]:
        """Return the tools of this episode, as OpenAI describes functions."""
        ...

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return what a tool gives: a text, or a JSON value.

        Raises:
            ToolFault: why there is nothing; the state is then brought back to that before the call.
        """
        ...

    def score(self, answer: str) -> Score | float:
        """Return the reward of the episode.

        Args:
            answer: what the model said in the end; empty where it did not come to an end.
        """
        ...

    def snapshot(self) -> Any:
        """Return the state as a JSON value."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from a state that `snapshot` gave, in this process or another one."""
        ...


@dataclass(frozen=True)
class TurnReply:
    """What an environment that holds a conversation says behind a turn of the model."""

    results: tuple[str, ...] = ()
    """Of the turn's calls, in order; none of them where the episode is over."""
    user: str | None = None
    """What a user says behind them."""
    is_over: bool = False
    """Whether the model is asked for no more."""


class ConversingEnvironment(Environment, Protocol):
    """An environment that is told whole turns and not calls one by one, and whose user may answer."""

    def reply(self, turn: ServedTurn) -> TurnReply:
        """Return what is said behind a turn of the model.

        Raises:
            ToolFault: the episode cannot go on: it has no reward.
        """
        ...


class World:
    """An environment whose tools are its methods marked with `@tool`, and whose state is `self.state`."""

    SYSTEM = ""
    """Rules of the world, for the model."""
    EXAMPLES: tuple[Task, ...] = ()
    """Tasks to try it with."""

    state: dict[str, Any]
    """JSON values alone."""
    task: Task
    """Of this episode."""

    def reset(self, task: Task) -> Observation:
        # a copy: the task is reused for other episodes, and tools change the state in place
        self.task, self.state = task, copy.deepcopy(self.first_state(task))
        return Observation(get_text_field(task, "question"), get_text_field(task, "system", self.rules()))

    def rules(self) -> str:
        """Return what models are told where a task has no `system` of its own."""
        return self.SYSTEM

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return the state that an episode begins with."""
        return {}

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        """Name -> tool; of methods that are marked, unless a world makes its own."""
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
    """Return what a model is told that calls a tool which does not exist."""
    return f"there is no tool {name[:60]!r}; the tools are {', '.join(tools)}"


def get_text_field(task: Task, name: str, default: str | None = None) -> str:
    """Return a field of a task that has to be text.

    Raises:
        UserError: it is missing, or something else.
    """
    value = task.get(name, default)
    if not isinstance(value, str):
        problem = f"{name} = {str(value)[:60]!r}: must be text" if name in task else f"has no {name!r}"
        raise UserError(f"the task {problem}")
    return value
