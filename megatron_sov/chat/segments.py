"""Split a rendered conversation into template text and messages.

The rendered text is always the template's output for the real messages. Learned turns are located by the
first method that works:

1. Marks in place of contents, for messages with content only: each character belongs to the template or to a
   message. Fails for templates that change contents (trim or inspect them).
2. The template's generation blocks.
3. Prefixes: a turn starts after the generation prompt and extends as far as the conversation up to the turn
   is a prefix of the whole text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.chat.marks import BEGIN_GENERATION, BEGIN_THOUGHTS, END_GENERATION, END_THOUGHTS
from megatron_sov.chat.tool_calls import split_thoughts

if TYPE_CHECKING:  # Jinja is slow to import, and `--help` renders nothing
    from megatron_sov.chat.template import ChatTemplate

_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")
_GENERATED = re.compile(f"({BEGIN_GENERATION}|{END_GENERATION})")
MAX_CACHED_CONTEXT = 10_000
"""Maximum characters of tools and variables in cached generation prompts; limits the memory."""


@dataclass(frozen=True)
class ChatSegment:
    text: str
    message: int | None
    """Index of the message; None: template text, not learned."""
    is_turn: bool = False
    """Whether the text is a whole turn from the template, where special tokens are real; otherwise a
    message's content, where they are text."""


Segments = list[ChatSegment]


def split_at_contents(template: ChatTemplate, conversation: Conversation, awaits_response: bool = False,
                      learned: Collection[int] = ()) -> Segments:
    """Split a rendered conversation at contents, located by marks.

    Args:
        template: the template.
        conversation: messages with contents only.
        awaits_response: open an assistant turn at the end.
        learned: indices of learned messages. Template text before their content that is not part of the
            generation prompt is the model's to write (such as an empty block of thoughts).

    Raises:
        BadRecord: the template refuses the roles, omits, repeats, reorders or changes a content, or a message
            has thoughts or calls.
    """
    messages = conversation.messages
    roles = ", ".join(m.role for m in messages)
    if not all(m.is_plain for m in messages):
        raise BadRecord("template", "has thoughts or calls, which marks do not reach")
    marks = [_MARK.format(i) for i in range(len(messages))]
    # re.split with a group: template texts at even indices, message numbers at odd ones
    parts = _MARKS.split(template.render(conversation, awaits_response, contents=marks))
    if parts[1::2] != [str(i) for i in range(len(messages))]:
        raise BadRecord("template", f"is not shown by the chat template of {template.where} with each "
                                    f"message once and in order (roles: {roles}); "
                                    "change the chat or the template")
    segments = []
    for i, part in enumerate(parts):
        if i % 2:
            segments.append(ChatSegment(messages[int(part)].content, int(part)))
        elif part:
            segments.append(ChatSegment(part, None))
    # the marks locate contents; the real text shows whether the template changes them
    rendered = template.render(conversation, awaits_response)
    start = 0
    for i, segment in enumerate(segments):
        if not rendered.startswith(segment.text, start):
            number = next((s.message for s in segments[i:] if s.message is not None), len(messages) - 1)
            raise BadRecord("template", f"is changed by the chat template of {template.where} at message "
                                        f"{number + 1} ({messages[number].role}), which it shows otherwise "
                                        "than it is")
        start += len(segment.text)
    if start != len(rendered):
        raise BadRecord("template", f"is changed by the chat template of {template.where}, which adds text "
                                    "for these contents")
    return list(_assign_openings(template, conversation, segments, learned)) if learned else segments


def _assign_openings(template: ChatTemplate, conversation: Conversation, segments: Segments,
                     learned: Collection[int]) -> Iterator[ChatSegment]:
    """Yield segments, assigning text between a generation prompt and a learned content to the turn."""
    # hashable, so that the prompt is rendered once for all chats with equal roles, tools and variables
    context = json.dumps([conversation.tools, dict(conversation.template_kwargs)], sort_keys=True)
    roles = tuple(m.role for m in conversation.messages)
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        if segment.message is None and following is not None and following.message in learned:
            render_prompt: Callable[..., str] = _generation_prompt
            if len(context) >= MAX_CACHED_CONTEXT:
                render_prompt = _generation_prompt.__wrapped__
            prompt = render_prompt(template, roles[:following.message], context)
            # the model writes template text before a content that is absent from the generation prompt
            if prompt and segment.text.startswith(prompt) and segment.text != prompt:
                yield ChatSegment(prompt, None)
                yield ChatSegment(segment.text[len(prompt):], following.message, is_turn=True)
                continue
        yield segment


@lru_cache(maxsize=1024)
def _generation_prompt(template: ChatTemplate, roles: tuple[str, ...], context: str) -> str:
    """Return the template's generation prompt after messages with given `roles`, or ""."""
    tools, kwargs = json.loads(context)
    marks = [_MARK.format(i) for i in range(len(roles))]
    prompt = Conversation(tuple(Message(role) for role in roles), tuple(tools), kwargs)
    try:
        rendered = template.render(prompt, awaits_response=True, contents=marks)
        # templates without `add_generation_prompt` add nothing
        if rendered == template.render(prompt, contents=marks):
            return ""
    except BadRecord:
        return ""
    return rendered.rpartition(marks[-1])[2] if marks else rendered


def separate_thoughts(template: ChatTemplate, conversation: Conversation, awaits_response: bool = False
                      ) -> Conversation:
    """Move thoughts at the start of assistant contents (`<think>...</think>`) into `reasoning`.

    Returns the conversation unchanged without such thoughts, or if the template renders the two forms
    differently.
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
    thoughts, content = split_thoughts(content, False)
    return replace(message, reasoning=thoughts, content=content)


def split_at_turns(template: ChatTemplate, conversation: Conversation, learned: Collection[int],
                   ends: Sequence[str], awaits_response: bool = False) -> Segments:
    """Split a rendered conversation at learned turns, located by generation blocks or prefixes.

    Args:
        template: the template.
        conversation: conversation whose contents spell no special tokens.
        learned: indices of learned messages.
        ends: special tokens that end turns.
        awaits_response: open an assistant turn at the end.

    Raises:
        BadRecord: the template refuses the conversation, or a learned turn cannot be located.
    """
    text = template.render(conversation, awaits_response)
    # a prompt dropped or changed by the template would silently enter training
    _check_contents_shown(template, conversation, text, learned)
    spans = _find_generation_spans(template, conversation, awaits_response, text, ends)
    if spans is None:
        spans = {i: _find_prefix_span(template, conversation, i, text, ends) for i in sorted(learned)}
    segments, start = [], 0
    for i in sorted(learned):
        begin, end = spans[i]
        _check_turn_complete(template, conversation.messages[i], i, text[begin:end])
        segments += [ChatSegment(text[start:begin], None), ChatSegment(text[begin:end], i, is_turn=True)]
        start = end
    segments = [s for s in (*segments, ChatSegment(text[start:], None)) if s.text]
    # overlapping turns would duplicate or reorder characters
    if "".join(s.text for s in segments) != text:
        raise BadRecord("template", f"is shown by the chat template of {template.where} with learned turns "
                                    "that overlap; give each turn a chat of its own")
    return segments


def _check_contents_shown(template: ChatTemplate, conversation: Conversation, text: str,
                          learned: Collection[int]) -> None:
    """Raise `BadRecord` if a content is missing or out of order; unlearned turns may lose thoughts."""
    start = 0
    for i, message in enumerate(conversation.messages):
        content = message.content.strip()
        if message.role == "assistant" and i not in learned:
            content = content.rpartition(END_THOUGHTS)[2].strip()
        begin = text.find(content, start)
        if begin < 0:
            raise BadRecord("template", f"has a message that the chat template of {template.where} does not "
                                        f"show as it is: {i + 1} ({message.role}); change it or the template")
        start = begin + len(content)


def _check_turn_complete(template: ChatTemplate, message: Message, number: int, turn: str) -> None:
    """Raise `BadRecord` if a learned turn lacks its thoughts, content or a call."""
    names = [call["function"]["name"] for call in message.tool_calls]
    for part, pieces in (("thoughts", [message.reasoning.strip()]), ("content", [message.content.strip()]),
                         ("calls", names)):
        if not _contains_in_order(pieces, turn):
            raise BadRecord("template", f"has {part} in message {number + 1} that the chat template of "
                                        f"{template.where} does not show there; mark the message \"train\": "
                                        f"false, or remove its {part}")


def _contains_in_order(pieces: Sequence[str], text: str) -> bool:
    """Return whether a text contains pieces in order; two calls may name the same function."""
    start = 0
    for piece in pieces:
        begin = text.find(piece, start)
        if begin < 0:
            return False
        start = begin + len(piece)
    return True


def _find_generation_spans(template: ChatTemplate, conversation: Conversation, awaits_response: bool,
                           text: str, ends: Sequence[str]) -> dict[int, tuple[int, int]] | None:
    """Return message index -> (begin, end) by generation blocks; None: an assistant turn has none."""
    parts = _GENERATED.split(template.render(conversation, awaits_response, marks_generation=True))
    turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    # each assistant turn needs a block, and the text without marks must equal the real text
    is_complete = parts[1::2] == [BEGIN_GENERATION, END_GENERATION] * len(turns)
    if not turns or not is_complete or "".join(parts[::2]) != text:
        return None
    # an index in the real text for each mark, which has no length there; marks alternate begin, end
    indices = list(itertools.accumulate(map(len, parts[:-1:2])))
    spans = {}
    for turn, begin, end in zip(turns, indices[::2], indices[1::2], strict=True):
        spans[turn] = (_find_turn_begin(template, conversation, number=turn, text=text, begin=begin, end=end),
                       _find_turn_end(text, begin, end, ends))
    return spans


def _find_turn_begin(template: ChatTemplate, conversation: Conversation, number: int, text: str, begin: int,
                     end: int) -> int:
    """Return a turn's begin: the end of the generation prompt if inside the block, else the block's begin."""
    try:
        prompt = template.render(replace(conversation, messages=conversation.messages[:number]),
                                 awaits_response=True)
    except BadRecord:
        return begin
    return len(prompt) if begin < len(prompt) < end and text.startswith(prompt) else begin


def _find_turn_end(text: str, begin: int, end: int, ends: Sequence[str]) -> int:
    """Return a turn's end: after the end token, without the block's trailing white space."""
    turn = text[begin:end].rstrip()
    return begin + len(turn) if turn.endswith(tuple(ends)) and ends else end


def _find_prefix_span(template: ChatTemplate, conversation: Conversation, number: int, text: str,
                      ends: Sequence[str]) -> tuple[int, int]:
    """Return (begin, end) of a message's turn by prefixes."""
    messages = conversation.messages
    prompt = template.render(replace(conversation, messages=messages[:number]), awaits_response=True)
    # templates that drop earlier thoughts change the prefix of later turns
    if not text.startswith(prompt):
        raise BadRecord("template", f"is shown by the chat template of {template.where} with turn "
                                    f"{number + 1} after a text that differs from its generation prompt; "
                                    "mark its earlier turns \"train\": false, give each turn a chat of its "
                                    "own, or change the template")
    header = _find_header(template, conversation, number, prompt)
    begin = len(prompt) + (len(header) if text.startswith(header, len(prompt)) else 0)
    rendered = template.render(replace(conversation, messages=messages[:number + 1]))
    # the last end token after the turn's begin: end tokens of calls inside come before it
    token_ends = [rendered.rfind(token, begin) + len(token) for token in ends if token in rendered[begin:]]
    is_last = number == len(messages) - 1
    end = max(token_ends, default=len(rendered) if is_last else len(rendered.rstrip()))
    if text[:end] != rendered[:end] or end <= begin:
        raise BadRecord("template", f"is shown by the chat template of {template.where} with turn "
                                    f"{number + 1} changed once others follow (its thoughts left out, say); "
                                    "mark its earlier turns \"train\": false, or give each turn a chat of "
                                    "its own")
    return begin, end


def _find_header(template: ChatTemplate, conversation: Conversation, number: int, prompt: str) -> str:
    """Return the text between prompt and response for templates without `add_generation_prompt`.

    It is computed for messages with contents only, so that prefixes learn as much as marks do.
    """
    # a template with `add_generation_prompt` has put the header into the prompt
    if prompt != template.render(replace(conversation, messages=conversation.messages[:number])):
        return ""
    plain = tuple(Message(m.role, "a") for m in conversation.messages[:number + 1])
    try:
        prompt_segments = split_at_contents(template, replace(conversation, messages=plain[:number]))
        segments = split_at_contents(template, replace(conversation, messages=plain))
    except BadRecord:
        return ""
    text_before = _text_before(segments, number)
    prompt_text = "".join(s.text for s in prompt_segments)
    return text_before[len(prompt_text):] if text_before.startswith(prompt_text) else ""


def _text_before(segments: Segments, number: int) -> str:
    return "".join(s.text for s in itertools.takewhile(lambda s: s.message != number, segments))


def find_odd_opening(template: ChatTemplate) -> str | None:
    """Return a warning if the template's generation prompt differs from the text before a learned response,
    else None.

    Templates of reasoning models may intend the difference (prompted to think, trained without), so it is no
    error.
    """
    try:
        prompt = split_at_contents(template, Conversation.of(("user", "a")), awaits_response=True)
        segments = split_at_contents(template, Conversation.of(("user", "a"), ("assistant", "b")))
    except BadRecord:  # no plain chats; each record is checked later
        return None
    text_before = _text_before(segments, 1)
    prompt_text = "".join(s.text for s in prompt)
    if prompt_text == text_before:
        return None
    return (f"{template.where}: its chat template prompts for a response with {prompt_text[-40:]!r}, but "
            f"shows responses after {text_before[-40:]!r}: prompts differ between training and inference")
