"""A tokenizer's chat template, rendered as transformers renders it: in a sandbox, in bounds; and which
characters of its text are the template's, and which are a message's.

The text is always what the template shows of the real messages.  Where the learned turns are in it is found
in the first of three ways that serves:

1. Marks in the place of contents, for messages that are a content and nothing else: every character is known
   to come from the template or from one message.  A template that does more with contents than show them
   (trims them, looks into them) shows another text then, and the next way is tried.
2. The template's own generation blocks.
3. Prefixes: a turn begins where the text ends with which a model is asked for it, and goes on as long as the
   conversation that ends with it is the beginning of the whole one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.base.errors import UserError
from megatron_sov.chat.limits import TemplateTimeout, limit_resources
from megatron_sov.chat.marks import BEGIN_THOUGHTS, END_THOUGHTS
from megatron_sov.chat.tool_calls import split_thoughts

CPU_S, MEMORY_BYTES = 2.0, 1 << 30
"""What one rendering may take: a template of a model on the hub takes well below a millisecond."""
PACKING_DATE = datetime(2026, 1, 1)
"""What templates that show the date are given when data are packed: the same bytes on every day."""
BEGIN, END = "\ue002", "\ue003"
"""Stand around what a template's generation blocks write, where they are asked for."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark what an assistant wrote: its body,
    between `BEGIN` and `END` where `marks_generation` is given."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        # the marks depend on a variable, so that one compiled template serves both renderings
        def mark(text: str) -> nodes.If:
            asked = nodes.Name("marks_generation", "load")
            return nodes.If(asked, [nodes.Output([nodes.TemplateData(text)])], [], [], lineno=line)

        return nodes.Scope([mark(BEGIN), *body, mark(END)], lineno=line)


class _Namespace(Namespace):
    """What `namespace()` gives a template: like Jinja's own, but for names that begin with an underscore,
    behind which Python's internals are."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        names = dict(*given, **kwargs)
        if hidden := [name for name in names if str(name).startswith("_")]:
            raise SecurityError(f"a namespace may not hold {hidden[0]!r}")
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        Namespace.__setitem__(self, name, value)


class ChatTemplate:
    """A chat template."""

    def __init__(self, template: str, bos_token: str, eos_token: str, where: str,
                 today: datetime = PACKING_DATE) -> None:
        """Compile a template: sandboxed, with what transformers lets templates use.

        Args:
            template: Jinja; "" shows nothing.
            bos_token: what the template knows under this name.
            eos_token: likewise.
            where: names it in messages.
            today: what `strftime_now` formats.

        Raises:
            UserError: it is not a Jinja template.
        """
        self._arguments = template, bos_token, eos_token, where, today
        # the settings of transformers' `apply_chat_template`: other ones give other white space
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_template_error, "namespace": _Namespace,
                                "dict": lambda *given, **named: dict(*given, **named)}
        self.where = where
        """Names it in messages."""
        self._globals = {"bos_token": bos_token, "eos_token": eos_token, "strftime_now": today.strftime}
        if not isinstance(template, str):
            raise UserError(f"{where}: its chat_template is a {type(template).__name__}, must be a string; "
                            "keep the one that is meant as a string")
        try:
            # compiling runs constant expressions of the template, which can be as large as any
            with limit_resources(CPU_S, MEMORY_BYTES):
                self._template = environment.from_string(template)
        except Exception as e:
            raise UserError(f"{where}: its chat_template is not valid Jinja ({_describe_error(e)}); "
                            "mend the template") from None

    def __reduce__(self) -> tuple[Any, ...]:  # compiled anew
        return ChatTemplate, self._arguments

    def render(self, conversation: Conversation, awaits_response: bool = False, *,
               contents: Sequence[str] | None = None, marks_generation: bool = False) -> str:
        """Return a conversation as text.

        Args:
            conversation: what is shown.
            awaits_response: open the assistant's turn at the end.
            contents: stand in the place of the messages' own.
            marks_generation: put `BEGIN` and `END` around what generation blocks write.

        Raises:
            BadRecord: the template refuses the conversation, fails, or does not end.
        """
        turns = [message.to_dict() for message in conversation.messages]
        for turn, content in zip(turns, contents or (), strict=contents is not None):
            turn["content"] = content
        # a record's variables come first, so that they cannot replace what every template is given
        given: dict[str, Any] = {**conversation.template_kwargs, **self._globals,
                                 "tools": list(conversation.tools) or None, "documents": None}
        try:
            with limit_resources(CPU_S, MEMORY_BYTES):
                return self._template.render(messages=turns, add_generation_prompt=awaits_response,
                                             marks_generation=marks_generation, **given)
        except TemplateError as e:
            raise BadRecord("template", f"is refused by the chat template of {self.where} ({e}); "
                                        "change its roles") from None
        except Exception as e:  # whatever the template's own code does
            raise BadRecord("template", f"makes the chat template of {self.where} fail ({_describe_error(e)}); "
                                        "mend the template") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Return JSON as transformers' filter gives it: Jinja's own writes < as an escape."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _describe_error(error: BaseException) -> str:
    if isinstance(error, TemplateTimeout):
        return f"it took more than {CPU_S:g} s"
    if isinstance(error, MemoryError):
        return f"it asked for more than {MEMORY_BYTES >> 20} MiB"
    return f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")
_GENERATED = re.compile(f"({BEGIN}|{END})")
MAX_CACHED_CONTEXT = 10_000
"""Characters of tools and variables with which it is remembered how a template asks: longer ones would fill
the memory."""


@dataclass(frozen=True)
class ChatSegment:
    """A part of a rendered conversation."""

    text: str
    message: int | None
    """Whose content or turn it is; None: nothing of it is learned, or it is the template's own."""
    is_turn: bool = False
    """Whether it is a whole turn as the template shows it, in which special tokens are meant; else what is a
    message's is its content, in which they are text."""


Segments = list[ChatSegment]


def split_at_contents(template: ChatTemplate, conversation: Conversation, awaits_response: bool = False,
                    learned: Collection[int] = ()) -> Segments:
    """Return the segments of a conversation by marks, one for each message's content.

    Args:
        template: shows it.
        conversation: of contents alone.
        awaits_response: open the assistant's turn at the end.
        learned: messages whose turns are learned: what the template writes before their content, and does not
            write when it asks for them, is the model's to write (an empty block of thoughts, say).

    Raises:
        BadRecord: the template refuses these roles, does not show every message exactly once and in order, or
            shows a content otherwise than it is; or a message is more than a content.
    """
    messages = conversation.messages
    roles = ", ".join(m.role for m in messages)
    if not all(m.is_plain for m in messages):
        raise BadRecord("template", "has thoughts or calls, which marks do not reach")
    marks = [_MARK.format(i) for i in range(len(messages))]
    # re.split with one group: texts of the template at even places, numbers of messages at odd ones
    parts = _MARKS.split(template.render(conversation, awaits_response, contents=marks))
    if parts[1::2] != [str(i) for i in range(len(messages))]:
        raise BadRecord("template", f"is not shown by the chat template of {template.where} with each "
                                    f"message once and in order (roles: {roles}); "
                                    "change the chat or the template")
    segments = [ChatSegment(messages[int(part)].content if i % 2 else part, int(part) if i % 2 else None)
                for i, part in enumerate(parts) if i % 2 or part]
    # the marks showed where contents go; the real text shows whether the template leaves them as they are
    shown = template.render(conversation, awaits_response)
    start = 0
    for i, segment in enumerate(segments):
        if not shown.startswith(segment.text, start):
            number = next((s.message for s in segments[i:] if s.message is not None), len(messages) - 1)
            raise BadRecord("template", f"is changed by the chat template of {template.where} at message "
                                        f"{number + 1} ({messages[number].role}), which it shows otherwise "
                                        "than it is")
        start += len(segment.text)
    if start != len(shown):
        raise BadRecord("template", f"is changed by the chat template of {template.where}, which adds text "
                                    "for these contents")
    return list(_assign_openings(template, conversation, segments, learned)) if learned else segments


def _assign_openings(template: ChatTemplate, conversation: Conversation, segments: Segments,
                   learned: Collection[int]) -> Iterator[ChatSegment]:
    """Yield segments, with what stands between the text that asks for a learned turn and its content as the
    turn's own."""
    # hashable, so that the opening is rendered once for all chats with these roles, tools and variables
    beside = json.dumps([conversation.tools, dict(conversation.template_kwargs)], sort_keys=True)
    roles = tuple(m.role for m in conversation.messages)
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        if segment.message is None and following is not None and following.message in learned:
            ask: Callable[..., str] = _generation_prompt if len(beside) < MAX_CACHED_CONTEXT else _generation_prompt.__wrapped__
            asked = ask(template, roles[:following.message], beside)
            # what the template shows before a content and does not write when it asks is the model's to write
            if asked and segment.text.startswith(asked) and segment.text != asked:
                yield ChatSegment(asked, None)
                yield ChatSegment(segment.text[len(asked):], following.message, is_turn=True)
                continue
        yield segment


@lru_cache(maxsize=1024)
def _generation_prompt(template: ChatTemplate, roles: tuple[str, ...], context: str) -> str:
    """Return what the template writes behind the last of some messages when it asks for a response; nothing
    where it knows no asking, or refuses to ask behind these (none, say)."""
    tools, kwargs = json.loads(context)
    marks = [_MARK.format(i) for i in range(len(roles))]
    prompt = Conversation(tuple(Message(role) for role in roles), tuple(tools), kwargs)
    try:
        shown = template.render(prompt, awaits_response=True, contents=marks)
        # a template without `add_generation_prompt` asks for nothing
        if shown == template.render(prompt, contents=marks):
            return ""
    except BadRecord:
        return ""
    return shown.rpartition(marks[-1])[2] if marks else shown


def separate_thoughts(template: ChatTemplate, conversation: Conversation, awaits_response: bool = False
                      ) -> Conversation:
    """Move the thoughts that contents of the assistant begin with (`<think>...</think>`) into `reasoning`, if
    the template does so itself, that is, if it shows both forms as the same text.

    Returns:
        The conversation itself if its contents begin with no thoughts, or the template shows another text.
    """
    messages = tuple(map(_separate_thoughts, conversation.messages))
    if messages == conversation.messages:
        return conversation
    separated = replace(conversation, messages=messages)
    try:
        is_same = (template.render(separated, awaits_response)
                   == template.render(conversation, awaits_response))
    except BadRecord:
        return conversation
    return separated if is_same else conversation


def _separate_thoughts(message: Message) -> Message:
    content = message.content
    if (message.role != "assistant" or message.reasoning or END_THOUGHTS not in content
            or not content.lstrip().startswith(BEGIN_THOUGHTS)):
        return message
    thoughts, said = split_thoughts(content, False)
    return replace(message, reasoning=thoughts, content=said)


def split_at_turns(template: ChatTemplate, conversation: Conversation, learned: Collection[int],
                 ends: Sequence[str], awaits_response: bool = False) -> Segments:
    """Return the segments of a conversation by generation blocks or by prefixes, one for each learned turn.

    Args:
        template: shows it.
        conversation: whose contents spell no special token.
        learned: messages whose turns are learned.
        ends: special tokens with which turns end.
        awaits_response: open the assistant's turn at the end.

    Raises:
        BadRecord: the template refuses the conversation, or a learned turn cannot be found in what it shows.
    """
    text = template.render(conversation, awaits_response)
    # a prompt that the template drops or changes would be trained on without a word
    _check_contents_shown(template, conversation, text, learned)
    spans = _find_generation_spans(template, conversation, awaits_response, text, ends)
    if spans is None:
        spans = {i: _find_prefix_span(template, conversation, i, text, ends) for i in sorted(learned)}
    segments, start = [], 0
    for i in sorted(learned):
        first, end = spans[i]
        _check_turn_complete(template, conversation.messages[i], i, text[first:end])
        segments += [ChatSegment(text[start:first], None), ChatSegment(text[first:end], i, is_turn=True)]
        start = end
    segments = [s for s in (*segments, ChatSegment(text[start:], None)) if s.text]
    # overlapping turns would put characters twice, or in another order
    if "".join(s.text for s in segments) != text:
        raise BadRecord("template", f"is shown by the chat template of {template.where} with learned turns "
                                    "that overlap; give each turn a chat of its own")
    return segments


def _check_contents_shown(template: ChatTemplate, conversation: Conversation, text: str,
                   learned: Collection[int]) -> None:
    """Refuse a conversation of which a message's content is not shown, or not in order.  A turn that is not
    learned may lose the thoughts in its content."""
    place = 0
    for i, message in enumerate(conversation.messages):
        content = message.content.strip()
        if message.role == "assistant" and i not in learned:
            content = content.rpartition(END_THOUGHTS)[2].strip()
        found = text.find(content, place)
        if found < 0:
            raise BadRecord("template", f"has a message that the chat template of {template.where} does not "
                                        f"show as it is: {i + 1} ({message.role}); change it or the template")
        place = found + len(content)


def _check_turn_complete(template: ChatTemplate, message: Message, number: int, turn: str) -> None:
    """Refuse a learned turn of which the template leaves out the thoughts, the content or a call."""
    names = [call["function"]["name"] for call in message.tool_calls]
    for part, pieces in (("thoughts", [message.reasoning.strip()]), ("content", [message.content.strip()]),
                         ("calls", names)):
        if not _contains_in_order(pieces, turn):
            raise BadRecord("template", f"has {part} in message {number + 1} that the chat template of "
                                        f"{template.where} does not show there; mark the message \"train\": "
                                        f"false, or remove its {part}")


def _contains_in_order(pieces: Sequence[str], text: str) -> bool:
    """Return whether a text has pieces one after another: two calls may be of one function."""
    place = 0
    for piece in pieces:
        found = text.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    return True


def _find_generation_spans(template: ChatTemplate, conversation: Conversation, awaits_response: bool, text: str,
               ends: Sequence[str]) -> dict[int, tuple[int, int]] | None:
    """Return where each assistant's turn stands, by generation blocks; None where each has not its own."""
    parts = _GENERATED.split(template.render(conversation, awaits_response, marks_generation=True))
    turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    # a block for each turn of an assistant, and the text without the marks is the real one
    if parts[1::2] != [BEGIN, END] * len(turns) or "".join(parts[::2]) != text or not turns:
        return None
    places, start = [], 0
    for part in parts[:-1:2]:
        start += len(part)
        places.append(start)
    return {i: (_find_turn_begin(template, conversation, i, text, *places[2 * n:2 * n + 2]),
                _find_turn_end(text, places[2 * n], places[2 * n + 1], ends)) for n, i in enumerate(turns)}


def _find_turn_begin(template: ChatTemplate, conversation: Conversation, number: int, text: str, begin: int,
           end: int) -> int:
    """Return where a turn begins: where a model is asked for it, if that is inside of its block."""
    try:
        asked = template.render(replace(conversation, messages=conversation.messages[:number]),
                                awaits_response=True)
    except BadRecord:
        return begin
    return len(asked) if begin < len(asked) < end and text.startswith(asked) else begin


def _find_turn_end(text: str, begin: int, end: int, ends: Sequence[str]) -> int:
    """Return where a turn ends: at its special token, though its block holds white space behind it."""
    said = text[begin:end].rstrip()
    return begin + len(said) if said.endswith(tuple(ends)) and ends else end


def _find_prefix_span(template: ChatTemplate, conversation: Conversation, number: int, text: str,
               ends: Sequence[str]) -> tuple[int, int]:
    """Return where the turn of message `number` stands: from where a model is asked for it to its end."""
    messages = conversation.messages
    asked = template.render(replace(conversation, messages=messages[:number]), awaits_response=True)
    # templates that drop earlier thoughts show another prefix than the model was asked with at that turn
    if not text.startswith(asked):
        raise BadRecord("template", f"is shown by the chat template of {template.where} with turn "
                                    f"{number + 1} behind another text than a model is asked for it with; "
                                    "mark its earlier turns \"train\": false, give each turn a chat of its "
                                    "own, or change the template")
    header = _find_header(template, conversation, number, asked)
    begin = len(asked) + (len(header) if text.startswith(header, len(asked)) else 0)
    shown = template.render(replace(conversation, messages=messages[:number + 1]))
    # the last end after the turn's beginning: special tokens inside, of calls say, come before it
    places = [shown.rfind(end, begin) + len(end) for end in ends if end in shown[begin:]]
    is_last = number == len(messages) - 1
    end = max(places, default=len(shown) if is_last else len(shown.rstrip()))
    if text[:end] != shown[:end] or end <= begin:
        raise BadRecord("template", f"is shown by the chat template of {template.where} with turn "
                                    f"{number + 1} changed once others follow (its thoughts left out, say); "
                                    "mark its earlier turns \"train\": false, or give each turn a chat of "
                                    "its own")
    return begin, end


def _find_header(template: ChatTemplate, conversation: Conversation, number: int, asked: str) -> str:
    """Return what the template writes between a prompt and a response that is a content alone, where it knows
    no asking (`add_generation_prompt`): no more of a response is learned then than by marks."""
    if asked != template.render(replace(conversation, messages=conversation.messages[:number])):
        return ""
    plain = tuple(Message(m.role, "a") for m in conversation.messages[:number + 1])
    try:
        prompt, shown = (split_at_contents(template, replace(conversation, messages=messages))
                         for messages in (plain[:number], plain))
    except BadRecord:
        return ""
    before = _text_before(shown, number)
    said = "".join(s.text for s in prompt)
    return before[len(said):] if before.startswith(said) else ""


def _text_before(segments: Segments, number: int) -> str:
    """Return the text in front of the first segment of a message."""
    return "".join(s.text for s in itertools.takewhile(lambda s: s.message != number, segments))


def find_odd_opening(template: ChatTemplate) -> str | None:
    """Return a sentence where a model is asked behind another text than it is trained behind: the template
    opens an assistant's turn (`add_generation_prompt`) otherwise than it shows one; else None.

    A model of thoughts may mean that (it is asked to think, and shown without), so it is no error.
    """
    try:
        asked = split_at_contents(template, Conversation.of(("user", "a")), awaits_response=True)
        shown = split_at_contents(template, Conversation.of(("user", "a"), ("assistant", "b")))
    except BadRecord:  # no such chats: what the data has is checked one by one
        return None
    before = _text_before(shown, 1)
    opened = "".join(s.text for s in asked)
    if opened == before:
        return None
    return (f"{template.where}: its chat template asks for a response behind {opened[-40:]!r}, and shows "
            f"one behind {before[-40:]!r}: what is trained on chats is asked behind other tokens")
