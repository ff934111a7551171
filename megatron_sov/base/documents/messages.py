"""Parse conversations in the formats of OpenAI and ShareGPT."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
                  "assistant": "assistant", "function_call": "assistant", "tool": "tool",
                  "observation": "tool", "function_response": "tool"}
"""ShareGPT's `from` -> role."""

ROLE_ALIASES = {"developer": "system", "function": "tool", "human": "user", "gpt": "assistant",
                "bot": "assistant", "ai": "assistant", "model": "assistant"}
"""Role name in newer and older OpenAI models, ShareGPT, LangChain and Gemini -> role."""
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Field names for an assistant's reasoning."""
MESSAGE_FIELDS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "train",
                            "weight", "type", *REASONING_FIELDS))
"""Message fields that are read; `type` is accepted and ignored."""
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})
"""Values that count as a missing field."""
TEMPLATE_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "marks_generation"}
"""Variables that every chat template receives; a record may not set them."""
MAX_LEVELS = 64
"""Maximum nesting in a record, far below Python's recursion limit."""


class BadRecord(Exception):
    """A record that cannot become a document; readers report the record and continue."""

    def __init__(self, code: str, reason: str, line: int = 0, content: bytes = b"",
                 options: tuple[str, ...] = (), packing: str = "") -> None:
        """Keep the reason.

        Args:
            code: a word for counting.
            reason: rest of a sentence that begins with the record's location.
            line: as in `Document`.
            content: beginning of the record.
            options: options of `sov-data pack` that read such records.
            packing: end of the sentence, about options of `sov-data pack`.
        """
        super().__init__(reason + packing)
        self.code, self.reason, self.line, self.content = code, reason + packing, line, content
        self.options, self.fault = options, reason


@dataclass(frozen=True)
class Message:
    """A turn in a `Conversation`."""

    role: str
    """A role in `ROLES`."""
    content: str = ""
    reasoning: str = ""
    """Reasoning before the answer (`reasoning_content`, `thinking` or `reasoning`)."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls in OpenAI's format, but `function.arguments` is an object instead of JSON text (as inference
    engines pass arguments to chat templates)."""
    is_learned: bool = True
    """Whether training uses this assistant message (`train`, or OpenAI's `weight`)."""
    other: tuple[tuple[str, str], ...] = ()
    """`name` and `tool_call_id`, if present."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Non-empty fields in the record's message outside `MESSAGE_FIELDS`."""

    @property
    def is_plain(self) -> bool:
        """Whether the message has only a role and a content."""
        return not (self.reasoning or self.tool_calls or self.other)

    def texts(self) -> tuple[str, ...]:
        calls = (json.dumps(self.tool_calls, ensure_ascii=False),) if self.tool_calls else ()
        return (*((self.reasoning,) if self.reasoning else ()), self.content, *calls)

    def to_dict(self) -> dict[str, Any]:
        """Return `role`, `content` and further fields as a dictionary for chat templates."""
        # templates of gpt-oss read `thinking`
        optional = {"reasoning_content": self.reasoning, "thinking": self.reasoning,
                    "tool_calls": list(self.tool_calls)}
        present = {name: value for name, value in optional.items() if value}
        return {"role": self.role, "content": self.content, **present, **dict(self.other)}


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages, tools and variables for a chat template."""

    messages: Messages
    tools: tuple[dict[str, Any], ...] = ()
    """Tool descriptions in OpenAI's format."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Template variables (`chat_template_kwargs`), for example `enable_thinking`."""

    @staticmethod
    def of(*turns: tuple[str, str]) -> "Conversation":
        return Conversation(tuple(Message(role, content) for role, content in turns))

    def extra_texts(self) -> tuple[str, ...]:
        """Return a record's strings outside message contents: in tools, variables and names."""
        other_fields = [value for message in self.messages for _, value in message.other]
        return tuple(_iter_strings([*self.tools, dict(self.template_kwargs), *other_fields]))


def _iter_strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, including keys, which a template may print."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _iter_strings(part)


def check_depth(value: Any, levels: int = MAX_LEVELS) -> None:
    """Raise `BadRecord` for a JSON value with more than `levels` nested objects and lists."""
    if isinstance(value, (dict, list, tuple)):
        if not levels:
            raise BadRecord("json", f"is nested more than {MAX_LEVELS} levels deep; flatten it")
        for part in value.values() if isinstance(value, dict) else value:
            check_depth(part, levels - 1)


def parse_messages(messages: Any, name: str) -> Messages:
    """Parse a record's messages. `name`: name of the field, for error messages. Raises `BadRecord`: messages
    are malformed, a user's or assistant's turn is empty, or tool results do not match tool calls."""
    if not isinstance(messages, list) or not messages:
        alternative = "a string, or " if name in ("prompt", "chosen", "rejected") else ""
        advice = ""
        if isinstance(messages, str) and messages[:1] == "[":
            advice = f"; parse the JSON in it: jq -c '.{name} |= fromjson' FILE > NEW_FILE"
        raise BadRecord("fields", f"'{name}' must be {alternative}a non-empty list of objects with 'role' "
                                  f"and 'content'{advice}")
    parsed = tuple(_parse_message(message, f"{name}[{i}]") for i, message in enumerate(messages))
    _check_tool_results(parsed, name)
    return parsed


def parse_sharegpt(turns: Any, name: str) -> Messages:
    """Parse messages of the form `{"from": ..., "value": ...}`; a `function_call`'s value is JSON text.
    Raises `BadRecord`: as `parse_messages`."""
    return parse_messages(convert_sharegpt(turns, name), name)


def convert_sharegpt(turns: Any, name: str) -> list[dict[str, Any]]:
    """Convert ShareGPT turns to messages with `role` and `content`; messages stay unchanged. Raises
    `BadRecord`: `turns` is not a list, or a speaker is unknown."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord("fields", f"'{name}' must be a non-empty list of objects with 'from' and 'value'")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        # some data sets mix both formats in one list
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
            call = _parse_json(turn.get("value"), f"{name}[{i}].value")
            message |= {"content": "", "tool_calls": call if isinstance(call, list) else [call]}
        messages.append(message)
    return messages


def parse_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Parse tool descriptions from a list or JSON text. Raises `BadRecord`: no list of objects."""
    descriptions = _parse_json(tools, "tools") if isinstance(tools, str) else tools
    if not isinstance(descriptions, list) or not all(isinstance(tool, dict) for tool in descriptions):
        raise BadRecord("fields", f"'tools' is {str(tools)[:40]!r}, must be a list of objects that describe "
                                  "functions")
    check_is_json(descriptions, "'tools'")
    return tuple(descriptions)


def parse_tools_and_kwargs(tools: Any, template_kwargs: Any) -> dict[str, Any]:
    """Parse a `Conversation`'s fields other than messages.

    Args:
        tools: as in `parse_tools`; None: no tools.
        template_kwargs: variables of the chat template; None: no variables.

    Raises:
        BadRecord: a value is malformed, or a variable's name is one of `TEMPLATE_VARIABLES`.
    """
    kwargs = template_kwargs or {}
    if not isinstance(kwargs, dict):
        raise BadRecord("fields", f"'chat_template_kwargs' is {str(kwargs)[:40]!r}, must be an object")
    if reserved := TEMPLATE_VARIABLES & kwargs.keys():
        raise BadRecord("fields", f"'chat_template_kwargs' has {min(reserved)!r}, which the template gets "
                                  "anyway; remove it")
    check_is_json(kwargs, "'chat_template_kwargs'")
    return {"tools": parse_tools(tools) if tools else (), "template_kwargs": kwargs}


def check_is_json(value: Any, where: str, allow_nan: bool = True) -> None:
    """Refuse values that templates cannot print as JSON, for example times and bytes from Parquet files.
    Raises `BadRecord`: a value is not JSON."""
    try:
        json.dumps(value, allow_nan=allow_nan)
    except (TypeError, ValueError) as e:
        raise BadRecord("fields", f"{where} is no JSON ({e}); use numbers, strings and null") from None


def _parse_message(message: Any, where: str) -> Message:
    """Parse a message of OpenAI's form; `where` names it in errors. Raises `BadRecord`."""
    role = message.get("role") if isinstance(message, dict) else message
    if isinstance(role, str):
        role = ROLE_ALIASES.get(role, role)
    if not isinstance(message, dict) or role not in ROLES:
        raise BadRecord("fields", f"{where} has role {role!r}, must be one of {', '.join(ROLES)}")
    calls = _parse_calls(message.get("tool_calls"), f"{where}.tool_calls")
    if old_call := message.get("function_call"):  # OpenAI's form before tool_calls
        if calls:
            raise BadRecord("tool_call", f"{where} has 'tool_calls' and 'function_call'; leave out one of "
                                         "them")
        calls = _parse_calls([old_call], f"{where}.function_call")
    content = _join_content(message.get("content"), where, optional=bool(calls))
    reasoning = next((message[key] for key in REASONING_FIELDS if message.get(key)), "")
    if not isinstance(reasoning, str):
        raise BadRecord("fields", f"{where}.reasoning_content is {str(reasoning)[:40]!r}, must be a string")
    if role != "assistant" and (calls or reasoning):
        raise BadRecord("fields", f"{where} has role {role!r} and {'tool_calls' if calls else 'reasoning'}, "
                                  "which only an assistant's message has")
    if role in ("user", "assistant") and not (content.strip() or calls):
        raise BadRecord("empty_turn", f"has an empty turn: {where} ({role}) says nothing; remove it")
    more_fields = tuple((key, message[key]) for key in ("name", "tool_call_id")
                        if isinstance(message.get(key), str) and message[key])
    unread = tuple(name for name, value in message.items()
                   if name not in MESSAGE_FIELDS and value not in EMPTY_VALUES)
    return Message(role, content, reasoning, calls, _is_learned(message, where), more_fields, unread)


def _join_content(content: Any, where: str, optional: bool) -> str:
    """Return a message's content as text; parts in OpenAI's format are joined by line feeds, as in vLLM."""
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
    """Return whether training uses a turn: `train` (true or false) or `weight` (0 or 1)."""
    for key, allowed in (("train", (True, False)), ("weight", (0, 1))):
        if (value := message.get(key)) is not None:
            if value not in allowed:
                raise BadRecord("fields", f"{where}.{key} is {value!r}, must be "
                                          f"{' or '.join(map(str, allowed))}")
            return bool(value)
    return True


def _parse_calls(calls: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Normalise tool calls to `{"type": "function", "function": {"name", "arguments"}}`, keeping an `id`."""
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise BadRecord("tool_call", f"{where} is {str(calls)[:40]!r}, must be a list")
    parsed = []
    for i, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise BadRecord("tool_call", f"{where}[{i}] has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            # OpenAI sends arguments as JSON text, templates need the object
            arguments = _parse_json(arguments, f"{where}[{i}].function.arguments")
        arguments = {} if arguments in (None, "") else arguments
        if not isinstance(arguments, dict):
            raise BadRecord("tool_call", f"{where}[{i}].function.arguments is {str(arguments)[:40]!r}, must "
                                         "be a JSON object")
        check_is_json(arguments, f"{where}[{i}].function.arguments", allow_nan=False)
        id_field = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        parsed.append({**id_field, "type": "function", "function": {"name": name, "arguments": arguments}})
    return tuple(parsed)


def _parse_json(value: Any, where: str) -> Any:
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError, RecursionError) as e:
        raise BadRecord("tool_call", f"{where} is {str(value)[:40]!r}, which is not JSON ({e})") from None
    check_depth(parsed)
    return parsed


def _check_tool_results(messages: Sequence[Message], name: str) -> None:
    """Refuse tool results without a call or of another call, and calls without results before a turn."""
    open_calls: list[dict[str, Any]] = []
    answered = 0
    for i, message in enumerate(messages):
        if message.role == "tool":
            if answered >= len(open_calls):
                raise BadRecord("tool_result", f"has a tool's result without a call: {name}[{i}]")
            ids = [call.get("id") for call in open_calls]
            # compare ids only if the calls have ids: many datasets leave ids out
            if (id_ := dict(message.other).get("tool_call_id")) is not None and any(ids) and id_ not in ids:
                raise BadRecord("tool_result", f"has the result of another call: {name}[{i}].tool_call_id is "
                                               f"{id_!r}, the calls before it are {ids}")
            answered += 1
            continue
        # the conversation may end with open calls
        if answered < len(open_calls):
            raise BadRecord("tool_call", f"has {len(open_calls)} tool calls and {answered} results before "
                                         f"{name}[{i}]; give each call its result, or end there")
        open_calls, answered = list(message.tool_calls), 0
