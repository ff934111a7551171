"""Messages of a conversation, in the spellings that data sets have: OpenAI's and ShareGPT's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
                  "assistant": "assistant", "function_call": "assistant", "tool": "tool",
                  "observation": "tool", "function_response": "tool"}
"""ShareGPT's `from` -> role."""

OTHER_NAMES = {"developer": "system", "function": "tool"}
"""Role of OpenAI's newer and older models -> role."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which records keep thoughts."""
MESSAGE_FIELDS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "train",
                            "weight", "type", *REASONING))
"""Fields of messages that are read, and `type`, which says nothing."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that holds nothing."""
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "marks_generation"}
"""What chat templates are given beside a conversation's own variables."""
MOST_LEVELS = 64
"""Objects and lists within each other in a record: what is deeper ends in Python's limit on recursion."""


class BadRecord(Exception):
    """A record that cannot become a document; the reader goes on behind it."""

    def __init__(self, code: str, reason: str, line: int = 0, content: bytes = b"",
                 options: tuple[str, ...] = ()) -> None:
        """`code`: a word to count by; `reason`: completes a sentence that begins with the place;
        `line`: as in `Document`; `options`: of `sov-data pack`, with which such records are read."""
        super().__init__(reason)
        self.code, self.reason, self.line, self.content = code, reason, line, content
        self.options = options


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str = ""
    reasoning: str = ""
    """What was thought before it (`reasoning_content`, `thinking` or `reasoning`)."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls as OpenAI spells them, but `function.arguments` is an object and not its JSON: what templates
    are given by the engines that serve models."""
    is_learned: bool = True
    """Whether an assistant's turn is learned (`train`, or OpenAI's `weight`)."""
    other: tuple[tuple[str, str], ...] = ()
    """`name` and `tool_call_id`, where a record has them."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the record's message that hold something and are not among `MESSAGE_FIELDS`."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a role and a content and nothing else."""
        return not (self.reasoning or self.tool_calls or self.other)

    def texts(self) -> tuple[str, ...]:
        calls = (json.dumps(self.tool_calls, ensure_ascii=False),) if self.tool_calls else ()
        return (*((self.reasoning,) if self.reasoning else ()), self.content, *calls)

    def to_dict(self) -> dict[str, Any]:
        """Return it as chat templates know messages."""
        more = {"reasoning_content": self.reasoning, "thinking": self.reasoning,  # gpt-oss's name for it
                "tool_calls": list(self.tool_calls)}
        return {"role": self.role, "content": self.content, **{k: v for k, v in more.items() if v},
                **dict(self.other)}


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages with what a chat template is given beside them."""

    messages: Messages
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of tools, as OpenAI spells them."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template (`chat_template_kwargs`), such as `enable_thinking`."""

    @staticmethod
    def of(*turns: tuple[str, str]) -> Conversation:
        return Conversation(tuple(Message(role, content) for role, content in turns))

    def beside(self) -> tuple[str, ...]:
        """Return the strings that records bring besides what is said: in tools, variables and names."""
        other = [value for message in self.messages for _, value in message.other]
        return tuple(_strings([*self.tools, dict(self.template_kwargs), *other]))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        # keys too: a template may show them
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(part)


def refuse_deep(value: Any, levels: int = MOST_LEVELS) -> None:
    """Refuse a JSON value with more levels than are left.

    Raises:
        BadRecord: it has more.
    """
    if isinstance(value, (dict, list, tuple)):
        if not levels:
            raise BadRecord("json", f"is nested more than {MOST_LEVELS} levels deep; flatten it")
        for part in value.values() if isinstance(value, dict) else value:
            refuse_deep(part, levels - 1)


def read_messages(messages: Any, name: str) -> Messages:
    """Return a record's messages.

    Args:
        messages: the value of a field.
        name: of the field, for messages.

    Raises:
        BadRecord: they are malformed, a turn of a user or an assistant is empty, or calls and results
            of tools do not belong together.
    """
    if not isinstance(messages, list) or not messages:
        what = "a string, or " if name == "prompt" else ""
        raise BadRecord("fields", f"'{name}' must be {what}a non-empty list of objects with 'role' and "
                                  "'content'")
    found = tuple(_message(message, f"{name}[{i}]") for i, message in enumerate(messages))
    _check_tools(found, name)
    return found


def read_sharegpt(turns: Any, name: str) -> Messages:
    """Return messages that are spelled `{"from": ..., "value": ...}`; a `function_call`'s value is JSON.

    Raises:
        BadRecord: as `read_messages`.
    """
    return read_messages(sharegpt_messages(turns, name), name)


def sharegpt_messages(turns: Any, name: str) -> list[dict[str, Any]]:
    """Return such turns as objects with `role` and `content`; those that are spelled so stay as they are.

    Raises:
        BadRecord: they are no list, or a turn is from nobody who is known.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRecord("fields", f"'{name}' must be a non-empty list of objects with 'from' and 'value'")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        # mixed data sets have both spellings in one list
        if isinstance(turn, dict) and turn.get("role") is not None and turn.get("from") is None:
            messages.append(turn)
            continue
        speaker = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise BadRecord("fields", f"{name}[{i}] is from {speaker!r}, must be one of "
                                      f"{', '.join(SHAREGPT_ROLES)}")
        message = {k: v for k, v in turn.items() if k not in ("from", "value")}
        message |= {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
        if speaker == "function_call":
            call = _json(turn.get("value"), f"{name}[{i}].value")
            message |= {"content": "", "tool_calls": call if isinstance(call, list) else [call]}
        messages.append(message)
    return messages


def read_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Return descriptions of tools, given as a list or as its JSON.

    Raises:
        BadRecord: they are no list of objects.
    """
    found = _json(tools, "tools") if isinstance(tools, str) else tools
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRecord("fields", f"'tools' is {str(tools)[:40]!r}, must be a list of objects that describe "
                                  "functions")
    refuse_other_types(found, "'tools'")
    return tuple(found)


def read_beside(tools: Any, template_kwargs: Any) -> dict[str, Any]:
    """Return the fields of a `Conversation` beside its messages.

    Args:
        tools: as of `read_tools`; None: there are none.
        template_kwargs: variables of the chat template; None: there are none.

    Raises:
        BadRecord: one of them is malformed, or a variable has a name that every template is given.
    """
    kwargs = template_kwargs or {}
    if not isinstance(kwargs, dict):
        raise BadRecord("fields", f"'chat_template_kwargs' is {str(kwargs)[:40]!r}, must be an object")
    if own := GIVEN & kwargs.keys():
        raise BadRecord("fields", f"'chat_template_kwargs' has {min(own)!r}, which the template is given "
                                  "anyway; remove it")
    refuse_other_types(kwargs, "'chat_template_kwargs'")
    return {"tools": read_tools(tools) if tools else (), "template_kwargs": kwargs}


def refuse_other_types(value: Any, where: str, allow_nan: bool = True) -> None:
    """Refuse what templates cannot show as JSON, such as the times and bytes that Parquet files hold.

    Raises:
        BadRecord: there is such a value.
    """
    try:
        json.dumps(value, allow_nan=allow_nan)
    except (TypeError, ValueError) as e:
        raise BadRecord("fields", f"{where} is no JSON ({e}); use numbers, strings and null") from None


def _message(message: Any, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else message
    if isinstance(role, str):
        role = OTHER_NAMES.get(role, role)
    if not isinstance(message, dict) or role not in ROLES:
        raise BadRecord("fields", f"{where} has role {role!r}, must be one of {', '.join(ROLES)}")
    calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
    if older := message.get("function_call"):
        if calls:
            raise BadRecord("tool_call", f"{where} has 'tool_calls' and 'function_call'; leave out one of "
                                         "them")
        calls = _calls([older], f"{where}.function_call")
    content = _content(message.get("content"), where, optional=bool(calls))
    reasoning = next((message[key] for key in REASONING if message.get(key)), "")
    if not isinstance(reasoning, str):
        raise BadRecord("fields", f"{where}.reasoning_content is {str(reasoning)[:40]!r}, must be a string")
    if role != "assistant" and (calls or reasoning):
        raise BadRecord("fields", f"{where} has role {role!r} and {'tool_calls' if calls else 'reasoning'}, "
                                  "which only an assistant's message has")
    if role in ("user", "assistant") and not (content.strip() or calls):
        raise BadRecord("empty_turn", f"has an empty turn: {where} ({role}) says nothing; remove it")
    other = tuple((key, message[key]) for key in ("name", "tool_call_id")
                  if isinstance(message.get(key), str) and message[key])
    unread = tuple(name for name, value in message.items()
                   if name not in MESSAGE_FIELDS and value not in EMPTY)
    return Message(role, content, reasoning, calls, _is_learned(message, where), other, unread)


def _content(content: Any, where: str, optional: bool) -> str:
    """Return a content as one text.  OpenAI's parts of text are joined by line feeds, as vLLM joins them for
    templates that take strings."""
    if content is None and optional:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                         and isinstance(part.get("text"), str) for part in content):
        return "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        is_media = isinstance(content, list) and any(isinstance(part, dict) and part.get("type") != "text"
                                                     for part in content)
        hint = ("; for training, `sov-data encode-media` turns pictures, sounds and videos into tokens"
                if is_media else "")
        raise BadRecord("fields", f"{where}.content is {str(content)[:80]!r}, must be a string{hint}")
    return content


def _is_learned(message: Mapping[str, Any], where: str) -> bool:
    """Return whether a turn is learned: `train` true or false, or `weight` 0 or 1."""
    for key, allowed in (("train", (True, False)), ("weight", (0, 1))):
        if (value := message.get(key)) is not None:
            if value not in allowed:
                raise BadRecord("fields", f"{where}.{key} is {value!r}, must be "
                                          f"{' or '.join(map(str, allowed))}")
            return bool(value)
    return True


def _calls(calls: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Return an assistant's calls in one spelling: `{"type": "function", "function": {"name", "arguments"}}`,
    with `id` where they have one."""
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise BadRecord("tool_call", f"{where} is {str(calls)[:40]!r}, must be a list")
    found = []
    for i, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise BadRecord("tool_call", f"{where}[{i}] has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            # OpenAI sends arguments as JSON in a string, templates want the object
            arguments = _json(arguments, f"{where}[{i}].function.arguments")
        arguments = {} if arguments in (None, "") else arguments
        if not isinstance(arguments, dict):
            raise BadRecord("tool_call", f"{where}[{i}].function.arguments is {str(arguments)[:40]!r}, must "
                                         "be a JSON object")
        refuse_other_types(arguments, f"{where}[{i}].function.arguments", allow_nan=False)
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**known, "type": "function", "function": {"name": name, "arguments": arguments}})
    return tuple(found)


def _json(value: Any, where: str) -> Any:
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise BadRecord("tool_call", f"{where} is {str(value)[:40]!r}, which is not JSON ({e})") from None
    refuse_deep(found)
    return found


def _check_tools(messages: Sequence[Message], name: str) -> None:
    """Refuse a result without a call before it, one of another call, and a call that the conversation
    passes over without a result."""
    open_calls: list[dict[str, Any]] = []
    answered = 0
    for i, message in enumerate(messages):
        if message.role == "tool":
            if answered >= len(open_calls):
                raise BadRecord("tool_result", f"has a tool's result without a call: {name}[{i}]")
            ids = [call.get("id") for call in open_calls]
            # ids are compared only where the calls have some: many data sets leave them out
            if (id_ := dict(message.other).get("tool_call_id")) is not None and any(ids) and id_ not in ids:
                raise BadRecord("tool_result", f"has the result of another call: {name}[{i}].tool_call_id is "
                                               f"{id_!r}, the calls before it are {ids}")
            answered += 1
            continue
        # calls at the very end may be open: the conversation stops with them
        if answered < len(open_calls):
            raise BadRecord("tool_call", f"has {len(open_calls)} tool calls and {answered} results before "
                                         f"{name}[{i}]; give each call its result, or end there")
        open_calls, answered = list(message.tool_calls), 0
