"""Conversations as token ids and types: the ids that a model is asked with, and which of them it learns.

What the template writes and what a content says is encoded together wherever no special token stands
between them, as the whole text is when a model is asked; only a response begins a text of its own, because
the prompt before it was encoded when there was no response yet.  Special tokens come from the template
alone: spelled out in a content they are ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.base.errors import UserError
from megatron_sov.chat.marks import (
    BEGIN_CALL, END_CALL, KIND_ANSWER, KIND_NONE, THOUGHT_MARKS, CallForm, build_marks_decoder, classify_turn)
from megatron_sov.chat.tool_calls import FORMS, ToolCall, parse_turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_sov.chat.template import ChatTemplate, Segments

TYPE_TEXT, TYPE_PROMPT, TYPE_RESPONSE = 0, 1, 2
"""What a token is: plain text, part of a prompt (template, system, user, tools),
or of a response to learn."""
# a table for `bytes.translate`: kind 0 is a prompt, every other kind a response
_KIND_TO_TYPE = bytes([TYPE_PROMPT, *[TYPE_RESPONSE] * 255])
SPLIT_CACHE_SIZE = 4096
"""Pieces of templates that are remembered, split at their special tokens."""
MAX_CACHED_CHARS = 1000
"""Characters of a piece that is remembered; longer ones hold messages."""
MAX_MARK_TOKENS = 16
"""`<think>` with the blanks behind it, where it is no token of its own."""
PROBES = (Conversation.of(("user", "a"), ("assistant", "b")),
          Conversation.of(("user", "a"), ("assistant", "b"), ("user", "c")))
"""Chats that show how a template ends the turn of an assistant: at the end, and before another turn."""
SAMPLE_CALL: dict[str, Any] = {"type": "function", "function": {"name": "probe_call", "arguments": {"number": 7}}}
CALL_PROBE = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(SAMPLE_CALL,)),
                           Message("tool", "c")))
"""One that shows how it writes and ends calls of tools: by a token of their own in Solar Open."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens."""

    ids: list[int]
    kinds: bytearray
    """What each is learned as (`chat.marks`); `KIND_NONE`: it is part of a prompt."""
    is_open: bool
    """Whether it ends in a response that no special token has ended: what is put behind it ends it."""

    @property
    def types(self) -> bytes:
        return bytes(self.kinds.translate(_KIND_TO_TYPE))


@dataclass(frozen=True)
class _ChatPart:
    """Ordinary text, or one special token."""

    text: str
    special: int | None
    kinds: bytes
    """Of each character, or of the special token."""
    begins_response: bool = False
    is_repeated_in_prompt: bool = False
    """Whether it is a response that a model sees again when it is asked for a later turn."""


class InlineTokens(Protocol):
    """Special tokens that are meant where a content spells them, such as those of pictures and sounds."""

    @property
    def ids(self) -> frozenset[int]:
        ...

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Return a content as ordinary texts and such tokens with their ids, in order; never nothing."""
        ...


class _JointTokenError(BadRecord):
    """A response that other ids begin when it is asked again than when it is written."""


Run = list[_ChatPart]
"""Texts that are encoded as one, or one special token."""


class ChatEncoder:
    """A tokenizer with its chat template."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer,
                 encode_plain: Callable[[str], list[int]] | None = None,
                 inline: InlineTokens | None = None) -> None:
        """Take both.

        Args:
            template: of this tokenizer.
            tokenizer: finds special tokens in text.
            encode_plain: gives the ids of ordinary text, in which special tokens are text, where something is
                faster than the tokenizer itself.
            inline: special tokens that contents may spell and then mean; None: none.
        """
        from tokenizers import Tokenizer

        self._inline = inline
        self._template, self._with_special = template, tokenizer
        # a copy of its own, since the switch below changes the tokenizer for all who hold it
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._encode_plain = encode_plain or self._plain_ids
        special = {id_: token for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special = {id_: token.content for id_, token in special.items()}
        # such tokens swallow white space around them, so that pieces encoded apart differ from the whole text
        self._takes_spaces = any(t.lstrip or t.rstrip or t.single_word for t in special.values())
        # the template's own texts are few and come again in every chat
        self._split = lru_cache(SPLIT_CACHE_SIZE)(self._split_at_special)

    def __reduce__(self) -> tuple[Any, ...]:  # what is kept of earlier texts stays in its process
        own = None if self._encode_plain == self._plain_ids else self._encode_plain
        return ChatEncoder, (self._template, self._with_special, own, self._inline)

    def encode(self, chat: Conversation, num_prompt: int = 0, awaits_response: bool = False) -> EncodedChat:
        """Return a conversation as tokens.

        A response is an assistant's turn (its thoughts, content and calls as the template shows them) and
        what the template ends it with: white space and a special token, or, behind the last message, all up
        to the first special token.

        Args:
            chat: the conversation.
            num_prompt: so many messages are the prompt, whoever speaks.
            awaits_response: open the assistant's turn at the end.

        Raises:
            BadRecord: the template refuses the chat or does not show where a learned turn stands, or a model
                that is asked with the earlier turns would see other ids than these.
        """
        # not above: it imports Jinja, which no help needs
        from megatron_sov.chat.template import split_at_contents

        wanted = {i for i, m in enumerate(chat.messages)
                  if i >= num_prompt and m.role == "assistant" and m.is_learned}
        self._check_extra_texts(chat)
        try:
            return self._encode_segments(*self._split_segments(chat, wanted, awaits_response), wanted)
        except _JointTokenError as joined:
            # with the template's own text before it left to the template, as `odd_opening` tells
            try:
                segments = split_at_contents(self._template, chat, awaits_response)
            except BadRecord:
                raise joined from None
            return self._encode_segments(segments, chat, wanted)

    def _check_extra_texts(self, chat: Conversation) -> None:
        """Refuse a chat whose tools, variables or names would bring special tokens into the template's
        text."""
        beside = "\n".join(chat.beside())
        if beside and (spelled := self._find_special_token([beside])):
            raise BadRecord("special_token", f"spells the special token {spelled!r} in its tools, its "
                                             "chat_template_kwargs or a name, where it would become one; "
                                             "remove it")

    def _encode_segments(self, segments: Segments, chat: Conversation, wanted: set[int]) -> EncodedChat:
        parts, is_open = self._split_parts(segments, chat, wanted)
        ids: list[int] = []
        kinds = bytearray()
        before: Run = []
        for run in _group_runs(parts):
            new_ids, new_kinds = self._encode_run(run)
            # a special token before the response keeps the two apart by itself
            if run[0].is_repeated_in_prompt and before and before[0].special is None:
                self._check_joint(before, run, new_ids)
            ids += new_ids
            kinds += new_kinds
            before = run
        if self._takes_spaces:
            self._check_spaces(segments, chat, ids)
        return EncodedChat(ids, kinds, is_open)

    def _split_segments(self, chat: Conversation, wanted: set[int], awaits_response: bool
                  ) -> tuple[Segments, Conversation]:
        """Return a conversation's segments, and the conversation with thoughts where they were found."""
        from megatron_sov.chat.template import separate_thoughts, split_at_contents, split_at_turns

        try:
            return split_at_contents(self._template, chat, awaits_response, wanted), chat
        except BadRecord as marked:
            if (separated := separate_thoughts(self._template, chat, awaits_response)) is not chat:
                return self._split_segments(separated, wanted, awaits_response)
            # prefixes find turns in the text alone, so a content must not spell what could end a turn there
            means: Collection[int] = self._inline.ids if self._inline else ()
            spelled = self._find_special_token((text for message in chat.messages for text in message.texts()), means)
            if spelled is None:
                return split_at_turns(self._template, chat, wanted, self._end_texts, awaits_response), chat
            raise BadRecord("special_token", f"spells the special token {spelled!r}, which would become one: "
                                             f"where the chat template of {self._template.where} shows "
                                             "messages otherwise than they are, or with thoughts and calls, "
                                             "the contents cannot be told from it") from marked

    def _find_special_token(self, texts: Iterable[str], allowed: Collection[int] = ()) -> str | None:
        """Return the first special token that texts spell, besides those that are allowed; None: none."""
        for text in texts:
            ids = self._with_special.encode(text, add_special_tokens=False).ids
            for id_ in ids:
                if id_ in self._special and id_ not in allowed:
                    return self._special[id_]
        return None

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        return tuple(self._special[id_] for id_ in self._find_end_tokens())

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._with_special.decode(list(ids), skip_special_tokens=False)
        return text

    def text_after_turn(self, before: Conversation, chat: Conversation) -> str:
        """Return what the template shows of a chat behind the end of the last turn of its beginning, up to
        where a model is asked; nothing where that cannot be told.

        Raises:
            BadRecord: the template refuses one of them.
        """
        begun, whole = self._template.render(before), self._template.render(chat, awaits_response=True)
        ends = [self._special[id_] for id_ in self.end_ids()]
        cut = max((begun.rfind(end) + len(end) for end in ends if end in begun), default=0)
        return whole[cut:] if cut and whole.startswith(begun[:cut]) else ""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens that are spelled out are meant."""
        ids: list[int] = self._with_special.encode(text, add_special_tokens=False).ids
        return ids

    def opened_thoughts(self, asked: Sequence[int]) -> str:
        """Return the mark in which what a model is asked with ends, where it begins its thoughts; else
        nothing."""
        end = self.decode(asked[-MAX_MARK_TOKENS:]).rstrip()
        return next((mark for mark in THOUGHT_MARKS if end.endswith(mark)), "")

    def added_ids(self) -> dict[str, int]:
        """Return the ids of added tokens, special or not, by how they are spelled."""
        return {token.content: id_ for id_, token in self._with_special.get_added_tokens_decoder().items()}

    def find_call_form(self, template_kwargs: Mapping[str, Any] | None = None) -> tuple[CallForm | None, str]:
        """Return in which form the template writes calls of tools, and how it shows one.

        The form is the first in which the call that the template is given is read back; None where it is read
        in none, and where the template shows no calls (which it then shows as nothing).
        """
        chat = replace(CALL_PROBE, template_kwargs=dict(template_kwargs or {}))
        try:
            encoded = self.encode(chat)
            # the whole text: with contents that cannot be told from it, a template's calls may be no response
            shown = self.decode(encoded.ids)
            ids = [i for i, kind in zip(encoded.ids, encoded.types, strict=True) if kind == TYPE_RESPONSE]
            said = self.decode(ids[:-1] if ids and ids[-1] in self.end_ids() else ids)
        except BadRecord:
            # one that shows an earlier turn otherwise than it was written may show its call all the same
            try:
                shown = self._template.render(chat)
            except BadRecord:
                return None, ""
            form = _find_form(shown)
            return form, shown if form else ""
        seen = said if SAMPLE_CALL["function"]["name"] in said else shown
        return (_find_form(seen), seen) if SAMPLE_CALL["function"]["name"] in seen else (None, "")

    def special_texts(self) -> tuple[str, ...]:
        return tuple(self._special.values())

    def end_ids(self) -> tuple[int, ...]:
        """Return the special tokens with which the template ends an assistant's turn, in the middle of a
        chat, at its end, and behind calls of tools; none where it shows no such chat, or ends turns with
        text."""
        # a dict and not a set: the first one is what `TurnEncoder.encode` writes
        found = dict.fromkeys(self._find_end_tokens())
        try:
            encoded = self.encode(CALL_PROBE)
        except BadRecord:
            return tuple(found)
        last = encoded.types.rfind(bytes([TYPE_RESPONSE]))
        if found and last >= 0 and encoded.ids[last] in self._special:
            found[encoded.ids[last]] = None
        return tuple(found)

    def _find_end_tokens(self) -> tuple[int, ...]:
        from megatron_sov.chat.template import split_at_contents

        found: dict[int, None] = {}
        # the probes' contents are single letters, so every special token in a learned part is the template's
        for chat in PROBES:
            try:
                segments = split_at_contents(self._template, chat)
            except BadRecord:
                continue
            parts, _ = self._split_parts(segments, chat, {1})
            found |= {p.special: None for p in parts
                      if p.special is not None and p.kinds[0] != KIND_NONE}
        return tuple(found)

    def _split_parts(self, segments: Segments, chat: Conversation, wanted: set[int]) -> tuple[list[_ChatPart],
                                                                                        bool]:
        """Return a chat as texts and special tokens, and whether it ends in an open response."""
        parts: list[_ChatPart] = []
        learned = [s.message in wanted for s in segments]
        last, is_open = len(segments) - 1, False
        last_message = max((i for i, s in enumerate(segments) if s.message is not None), default=-1)
        for i, segment in enumerate(segments):
            later = i < last_message
            # one turn may be two segments, an opening and a content; only the first begins a text of its own
            begins = learned[i] and not (i and learned[i - 1] and segments[i - 1].message == segment.message)
            kinds = bytes(len(segment.text))
            if segment.message is not None and learned[i]:
                kinds = classify_turn(segment.text, chat.messages[segment.message])
            # a whole turn as the template shows it: special tokens in it are the template's and are meant
            if segment.is_turn:
                split, place = self._split_at_special(segment.text), 0
                for n, (text, special) in enumerate(split):
                    parts.append(_ChatPart(text, special, kinds[place:place + len(text)], n == 0,
                                           n == 0 and later and special is None))
                    place += len(text)
                is_open = split[-1][1] is None
                continue
            if segment.message is not None:
                place = 0
                for n, (text, special) in enumerate(self._split_content(segment.text)):
                    first = begins and n == 0
                    parts.append(_ChatPart(text, special, kinds[place:place + len(text)], first,
                                           first and later and special is None))
                    place += len(text)
                # a content has no end of its own; the template's text after it may bring one
                is_open = learned[i]
                continue
            split = (self._split if len(segment.text) < MAX_CACHED_CHARS else self._split_at_special)(segment.text)
            # a turn that already has its end is not given what the template writes behind it
            ends_here = i > 0 and learned[i - 1] and (is_open or not segments[i - 1].is_turn)
            end = _find_turn_end(split, i == last) if ends_here else 0
            ended = (parts[-1].kinds[-1:] or bytes([KIND_ANSWER])) if end else b""
            parts += [_ChatPart(text, special, (ended if n < end else bytes([KIND_NONE])) * len(text))
                      for n, (text, special) in enumerate(split)]
            is_open = is_open and all(special is None for _, special in split[:end])
        return parts, is_open

    def _split_content(self, text: str) -> list[tuple[str, int | None]]:
        return [(text, None)] if self._inline is None else self._inline.split(text)

    def _encode_run(self, run: Run) -> tuple[list[int], bytes]:
        if run[0].special is not None:
            return [run[0].special], run[0].kinds[:1]
        # texts of the template and of a content are joined before encoding: tokens may reach over the border,
        # as they do when the model is asked with the whole text
        text, kinds = "".join(p.text for p in run), b"".join(p.kinds for p in run)
        # one kind for all: the fast encoder, which gives no offsets, is enough
        if len(found := set(kinds)) <= 1:
            ids = self._encode_plain(text)
            return ids, bytes(found or {KIND_NONE}) * len(ids)
        encoding = self._plain.encode(text, add_special_tokens=False)
        # a token that reaches over an end counts with what it begins, and with a response rather than not
        return encoding.ids, bytes((kinds[start:max(end, start + 1)].lstrip(bytes([KIND_NONE]))
                                    or bytes([KIND_NONE]))[0] for start, end in encoding.offsets)

    def _check_joint(self, before: Run, run: Run, ids: list[int]) -> None:
        """Refuse a response whose first token would be another one together with what the template writes
        before it: later turns would be trained behind other ids than a model is asked with."""
        # asked again, the prompt and the response are one text; written, the prompt was encoded alone
        text = "".join(p.text for p in before)
        if self._encode_plain(text + "".join(p.text for p in run)) != self._encode_plain(text) + ids:
            raise _JointTokenError("template", f"has a response ({run[0].text[:20]!r}...) that joins the template's "
                                        f"{text[-20:]!r} before it in one token when it is asked again, and "
                                        "does not when it is written; remove the white space it begins "
                                        "with, or let the template put a special token there")

    def _check_spaces(self, segments: Segments, chat: Conversation, ids: list[int]) -> None:
        """Refuse a chat whose white space a special token takes when the whole text is encoded."""
        if self._find_special_token(text for message in chat.messages for text in message.texts()):
            return
        if self._with_special.encode("".join(s.text for s in segments), add_special_tokens=False).ids != ids:
            raise BadRecord("template", "has white space that a special token of this tokenizer takes when a "
                                        "model is asked; strip the contents")

    def _split_at_special(self, text: str) -> tuple[tuple[str, int | None], ...]:
        """Return a template's text as ordinary texts and special tokens with their texts, in order."""
        found: list[tuple[str, int | None]] = []
        # offsets count characters of the text; what is between two special tokens is ordinary
        start = 0
        encoding = self._with_special.encode(text, add_special_tokens=False)
        for id_, (first, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ in self._special:
                found += [(text[start:first], None)] if start < first else []
                found.append((text[first:end], id_))
                start = end
        return tuple(found + ([(text[start:], None)] if start < len(text) else []))

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids


def _find_turn_end(split: tuple[tuple[str, int | None], ...], is_last: bool) -> int:
    """Return how many parts of what the template writes behind a response end its turn."""
    first = next((n for n, (_, special) in enumerate(split) if special is not None), None)
    if first is None:
        return len(split) if is_last else 0
    return first + 1 if is_last or not "".join(text for text, _ in split[:first]).strip() else 0


def _find_form(text: str) -> CallForm | None:
    call = ToolCall(**SAMPLE_CALL["function"])
    return next((form for form in FORMS if call in parse_turn(text, form=form).calls), None)


def _group_runs(parts: list[_ChatPart]) -> Iterator[Run]:
    """Yield texts that stand together, up to where a response begins, and special tokens one by one."""
    run: Run = []
    for part in parts:
        if run and (part.special is not None or part.begins_response or run[0].special is not None):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


_NAME = re.compile(r"[\w.-]{1,64}")
"""Of a function."""
_USER_MESSAGE, _ASSISTANT_MESSAGE = Message("user", "a"), Message("assistant", "b")
_REMEDY = "take a model whose chat template knows tools, such as Qwen3's"


class TurnEncoder:
    """A chat encoder for conversations with tools, which grow turn by turn: what a model wrote is kept as it
    is, and what the template puts behind it is appended.

    Encoding the whole conversation again for each turn would give a model other ids than it wrote (many texts
    have several spellings in tokens), and train it on tokens that it never sampled.
    """

    def __init__(self, encoder: ChatEncoder, where: str,
                 template_kwargs: Mapping[str, Any] | None = None) -> None:
        """Take the encoder of a model.

        Args:
            encoder: of its tokenizer and template.
            where: names it in messages.
            template_kwargs: variables of the template, such as `enable_thinking`.

        Raises:
            UserError: its template ends no turn with a special token, or shows no results of tools.
        """
        self._encoder, self._where = encoder, where
        self._template_kwargs = dict(template_kwargs or {})
        self.end_ids = encoder.end_ids()
        """Special tokens with which a model ends its turn."""
        if not self.end_ids:
            raise UserError(f"{where}: its chat template ends no turn with a special token, so nothing tells "
                            f"where a turn ends; {_REMEDY}")
        # both raise now, at the start of a run, what would else meet the first conversation with tools
        self.encode_after_turn(["c"])
        self.call_form, shown = encoder.find_call_form(self._template_kwargs)
        """In which the model is to call tools; None: its template shows none, and any form is read."""
        if shown and self.call_form is None:  # its calls would be taken for answers
            raise UserError(f"{where}: its chat template writes calls of tools in a form that is not "
                            f"read here ({shown.strip()[:80]!r}); {_REMEDY}")
        added = encoder.added_ids()
        # a tokenizer of another family has no tokens for what the template writes as text: it is meant
        meant = [mark for mark in (BEGIN_CALL, END_CALL) if mark in shown and mark not in added]
        self._text = build_marks_decoder(added, self.end_ids, encoder.decode, meant)

    def opening(self, chat: Conversation) -> list[int]:
        """Return the ids with which a model is asked first.

        Raises:
            BadRecord: the template refuses the conversation.
        """
        asked = replace(chat, template_kwargs={**chat.template_kwargs, **self._template_kwargs})
        return self._encoder.encode(asked, awaits_response=True).ids

    def encode_after_turn(self, results: Sequence[str], names: Sequence[str] = (),
                    user: str | None = None) -> list[int]:
        """Return the ids behind the end of a model's turn: results of tools, what a user says, and the
        opening of the next one.

        Special tokens that a result spells out are text; where the template does not let them be told from
        its own, a space breaks them.

        Args:
            results: in the order of the calls.
            names: of the functions that were called, which some templates show beside results.
            user: said behind the results; None: nothing.

        Raises:
            UserError: the template does not show results of tools.
        """
        said = (() if user is None else (Message("user", user),))
        behind = (*(Message("tool", result) for result in results), *said)
        try:
            encoded = self._encode_messages(behind)
        except BadRecord:
            plain = tuple(replace(message, content=self._break_special_tokens(message.content)) for message in behind)
            try:
                encoded = self._encode_messages(plain)
            except BadRecord as e:
                found = self._encode_rendered(plain, names or ["unknown"] * len(results))
                if found is None:
                    raise UserError(f"{self._where}: its chat template shows no results of tools (a "
                                    f"conversation with one {e.reason}); {_REMEDY}") from None
                return found
        # the last learned token is the end of the assistant's turn; the rest is results and the next opening
        end = encoded.types.rfind(bytes([TYPE_RESPONSE])) + 1
        if not end or encoded.ids[end - 1] not in self.end_ids or end == len(encoded.ids):
            raise UserError(f"{self._where}: its chat template does not show where a turn before a tool's "
                            f"result ends; {_REMEDY}")
        return encoded.ids[end:]

    def _encode_messages(self, behind: tuple[Message, ...]) -> EncodedChat:
        chat = Conversation((_USER_MESSAGE, _ASSISTANT_MESSAGE, *behind), (), self._template_kwargs)
        return self._encoder.encode(chat, awaits_response=True)

    def _encode_rendered(self, messages: tuple[Message, ...], names: Sequence[str]) -> list[int] | None:
        """Return what stands behind a turn, of a template that shows results as JSON (Llama 3), or only
        behind a turn that has called their functions; None where it shows none.

        Args:
            messages: which spell no special tokens, for in the template's text they would become some.
            names: of the results' functions; what a model wrote may be no name.
        """
        calls = tuple({"type": "function", "function": {"name": name if _NAME.fullmatch(name) else "unknown",
                                                        "arguments": {}}}
                      for name in names)
        for said in (_ASSISTANT_MESSAGE, Message("assistant", "", tool_calls=calls)):
            before = Conversation((_USER_MESSAGE, said), (), self._template_kwargs)
            behind = replace(before, messages=(*before.messages, *messages))
            try:
                shown = self._encoder.text_after_turn(before, behind)
            except BadRecord:
                continue
            texts = [message.content for message in messages]
            if shown and all(any(said in shown for said in (
                    text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]))
                    for text in texts):
                return self._encoder.encode_text(shown)
        return None

    def _break_special_tokens(self, result: str) -> str:
        # a blank after the first character: the text reads the same and is no special token any more
        for special in self._encoder.special_texts():
            result = result.replace(special, f"{special[0]} {special[1:]}")
        return result.strip()

    def opened_thoughts(self, asked: Sequence[int]) -> str:
        return self._encoder.opened_thoughts(asked)

    def text(self, written: Sequence[int]) -> str:
        """Return what a model wrote, without the token that ends its turn."""
        return self._text(list(written))

    def encode(self, text: str) -> list[int]:
        """Return a text as a turn of a model, with the token that ends it."""
        return [*self._encoder.encode_text(text), self.end_ids[0]]

    def differs(self, written: Sequence[int]) -> bool:
        """Return whether the text of what a model wrote has other ids when it is encoded again."""
        return self._encoder.encode_text(self._encoder.decode(written)) != list(written)
