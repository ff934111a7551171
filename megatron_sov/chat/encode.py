"""Encode conversations as token ids and learning kinds.

Template text and contents are encoded together between special tokens, as in inference. A response starts its
own text, because the prompt was encoded before the response existed. Special tokens come only from the
template: a content that spells a special token encodes it as ordinary text.
"""

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
from megatron_sov.chat.segments import Segments, separate_thoughts, split_at_contents, split_at_turns
from megatron_sov.chat.tool_calls import FORMS, ToolCall, parse_turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_sov.chat.template import ChatTemplate

TYPE_TEXT, TYPE_PROMPT, TYPE_RESPONSE = 0, 1, 2
"""Token types: plain text, prompt (template, system, user, tools), response to learn."""
# table for `bytes.translate`: kind 0 is a prompt, every other kind a response
_KIND_TO_TYPE = bytes([TYPE_PROMPT, *[TYPE_RESPONSE] * 255])
SPLIT_CACHE_SIZE = 4096
"""Cache size: template texts split at their special tokens."""
MAX_CACHED_CHARS = 1000
"""Maximum length in characters of a cached template text; longer texts contain messages."""
MAX_MARK_TOKENS = 16
"""Maximum length of `<think>` with following blanks in tokens, if the tokenizer has no token for it."""
PROBES = (Conversation.of(("user", "a"), ("assistant", "b")),
          Conversation.of(("user", "a"), ("assistant", "b"), ("user", "c")))
"""Probe chats for a template's end of assistant turns: at the end, and before a user turn."""
SAMPLE_CALL: dict[str, Any] = {"type": "function",
                               "function": {"name": "probe_call", "arguments": {"number": 7}}}
CALL_PROBE = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(SAMPLE_CALL,)),
                           Message("tool", "c")))
"""Probe chat for a template's tool calls and end token (Solar Open ends calls with a separate token)."""
_NAME = re.compile(r"[\w.-]{1,64}")
"""Valid function name."""
_USER_MESSAGE, _ASSISTANT_MESSAGE = Message("user", "a"), Message("assistant", "b")
_REMEDY = "take a model whose chat template knows tools, such as Qwen3's"


@dataclass(frozen=True)
class EncodedChat:
    ids: list[int]
    kinds: bytearray
    """Learning kind per token (`chat.marks`); `KIND_NONE` marks prompt tokens."""
    is_open: bool
    """Whether the conversation ends in a response without final special token, which later text must end."""

    @property
    def types(self) -> bytes:
        return bytes(self.kinds.translate(_KIND_TO_TYPE))


@dataclass(frozen=True)
class _ChatPart:
    """Ordinary text, or a single special token."""

    text: str
    special: int | None
    kinds: bytes
    """Kind of each character."""
    begins_response: bool = False
    is_repeated_in_prompt: bool = False
    """Whether the part belongs to a response repeated in a later prompt."""


class InlineTokens(Protocol):
    """Special tokens allowed in contents, e.g. image and audio tokens."""

    @property
    def ids(self) -> frozenset[int]:
        ...

    def split(self, text: str) -> list[tuple[str, int | None]]:
        """Split a content into (text, None) and (token text, token id) pieces; never empty."""


class _JointTokenError(BadRecord):
    """A response merges with template text into a different first token in later prompts."""


Run = list[_ChatPart]
"""Texts to encode as a unit, or a single special token."""


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template."""

    def __init__(self, template: "ChatTemplate", tokenizer: "Tokenizer",
                 encode_plain: Callable[[str], list[int]] | None = None,
                 inline: InlineTokens | None = None) -> None:
        """Args:
            template: chat template of the tokenizer.
            tokenizer: finds special tokens in text.
            encode_plain: faster encoder of ordinary text without special tokens; default: the tokenizer.
            inline: special tokens that contents may contain; None: none.
        """
        self._inline = inline
        self._template, self._with_special = template, tokenizer
        # private copy: `encode_special_tokens` would change the tokenizer for other users
        self._plain = type(tokenizer).from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._encode_plain = encode_plain or self._plain_ids
        special = {id_: token for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special = {id_: token.content for id_, token in special.items()}
        # Such tokens absorb surrounding white space, so texts encoded separately differ from the whole text.
        self._takes_spaces = any(t.lstrip or t.rstrip or t.single_word for t in special.values())
        # template texts are few and recur in every chat
        self._split = lru_cache(SPLIT_CACHE_SIZE)(self._split_at_special)

    def __reduce__(self) -> tuple[Any, ...]:  # pickle without caches
        encode_plain = None if self._encode_plain == self._plain_ids else self._encode_plain
        return ChatEncoder, (self._template, self._with_special, encode_plain, self._inline)

    def encode(self, chat: Conversation, num_prompt: int = 0, awaits_response: bool = False) -> EncodedChat:
        """Encode a conversation.

        A response consists of an assistant turn (thoughts, content and calls as shown by the template) and
        its end: white space plus a special token, or after the last message all text up to the first special
        token.

        Args:
            chat: the conversation.
            num_prompt: number of leading messages that belong to the prompt regardless of role.
            awaits_response: open an assistant turn at the end.

        Raises:
            BadRecord: the template refuses the chat or hides the position of a learned turn, or a model
                prompted with earlier turns would see other ids.
        """
        learned = {i for i, m in enumerate(chat.messages)
                   if i >= num_prompt and m.role == "assistant" and m.is_learned}
        self._check_extra_texts(chat)
        try:
            return self._encode_segments(*self._split_segments(chat, learned, awaits_response), learned)
        except _JointTokenError as joined:
            # leave the template's text before the response to the template, see `find_odd_opening`
            try:
                segments = split_at_contents(self._template, chat, awaits_response)
            except BadRecord:
                raise joined from None
            return self._encode_segments(segments, chat, learned)

    def _check_extra_texts(self, chat: Conversation) -> None:
        """Raise `BadRecord` if tools, variables or names would insert special tokens into the text."""
        extra_text = "\n".join(chat.extra_texts())
        if extra_text and (spelled := self._find_special_token([extra_text])):
            raise BadRecord("special_token", f"spells the special token {spelled!r} in its tools, its "
                                             "chat_template_kwargs or a name, where it would become one; "
                                             "remove it")

    def _encode_segments(self, segments: Segments, chat: Conversation, learned: set[int]) -> EncodedChat:
        parts, is_open = self._split_parts(segments, chat, learned)
        ids: list[int] = []
        kinds = bytearray()
        previous: Run = []
        for run in _group_runs(parts):
            new_ids, new_kinds = self._encode_run(run)
            # a preceding special token separates the texts
            if run[0].is_repeated_in_prompt and previous and previous[0].special is None:
                self._check_joint(previous, run, new_ids)
            ids += new_ids
            kinds += new_kinds
            previous = run
        if self._takes_spaces:
            self._check_spaces(segments, chat, ids)
        return EncodedChat(ids, kinds, is_open)

    def _split_segments(self, chat: Conversation, learned: set[int], awaits_response: bool
                        ) -> tuple[Segments, Conversation]:
        """Return a conversation's segments, and the conversation with thoughts separated from contents."""
        try:
            return split_at_contents(self._template, chat, awaits_response, learned), chat
        except BadRecord as error:
            if (separated := separate_thoughts(self._template, chat, awaits_response)) is not chat:
                return self._split_segments(separated, learned, awaits_response)
            # prefixes locate turns by text alone, so contents must not spell a turn's end
            allowed: Collection[int] = self._inline.ids if self._inline else ()
            spelled = self._find_special_token((text for message in chat.messages
                                                for text in message.texts()), allowed)
            if spelled is None:
                return split_at_turns(self._template, chat, learned, self._end_texts, awaits_response), chat
            raise BadRecord("special_token", f"spells the special token {spelled!r}, which would become one: "
                                             f"where the chat template of {self._template.where} "
                                             "changes messages or adds thoughts and calls, contents cannot "
                                             "be located in its text") from error

    def _find_special_token(self, texts: Iterable[str], allowed: Collection[int] = ()) -> str | None:
        """Return the first special token in texts outside `allowed`, or None."""
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

    def text_after_turn(self, beginning: Conversation, chat: Conversation) -> str:
        """Return the template's text of `chat` after the last turn end in its `beginning`, up to the
        generation prompt; "": the position is unknown. Raises `BadRecord`: the template refuses a chat."""
        prefix = self._template.render(beginning)
        full_text = self._template.render(chat, awaits_response=True)
        ends = [self._special[id_] for id_ in self.end_ids()]
        position = max((prefix.rfind(end) + len(end) for end in ends if end in prefix), default=0)
        return full_text[position:] if position and full_text.startswith(prefix[:position]) else ""

    def encode_text(self, text: str) -> list[int]:
        """Encode a text, interpreting spelled special tokens as special."""
        ids: list[int] = self._with_special.encode(text, add_special_tokens=False).ids
        return ids

    def opened_thoughts(self, prompt_ids: Sequence[int]) -> str:
        """Return the thought mark (`<think>`) at the end of a prompt, or ""."""
        end = self.decode(prompt_ids[-MAX_MARK_TOKENS:]).rstrip()
        return next((mark for mark in THOUGHT_MARKS if end.endswith(mark)), "")

    def added_ids(self) -> dict[str, int]:
        """Return text -> id for `added_tokens` in `tokenizer.json`, special or not."""
        return {token.content: id_ for id_, token in self._with_special.get_added_tokens_decoder().items()}

    def find_call_form(self, template_kwargs: Mapping[str, Any] | None = None) -> tuple[CallForm | None, str]:
        """Return the template's tool call form, and the text of a sample call.

        The form is the first that parses the sample call back. It is None if none does, or if the template
        ignores calls, in which case the text is empty.
        """
        chat = replace(CALL_PROBE, template_kwargs=dict(template_kwargs or {}))
        try:
            encoded = self.encode(chat)
            # Use the whole text: if contents cannot be located in it, calls may lie outside the response.
            full_text = self.decode(encoded.ids)
            ids = [i for i, kind in zip(encoded.ids, encoded.types, strict=True) if kind == TYPE_RESPONSE]
            response = self.decode(ids[:-1] if ids and ids[-1] in self.end_ids() else ids)
        except BadRecord:
            # a template that shows earlier turns differently may still show its call
            try:
                full_text = self._template.render(chat)
            except BadRecord:
                return None, ""
            form = _find_form(full_text)
            return form, full_text if form else ""
        name = SAMPLE_CALL["function"]["name"]
        visible = response if name in response else full_text
        return (_find_form(visible), visible) if name in visible else (None, "")

    def special_texts(self) -> tuple[str, ...]:
        return tuple(self._special.values())

    def end_ids(self) -> tuple[int, ...]:
        """Return the end tokens of assistant turns: within a chat, at the end, and after tool calls.

        Empty if the template refuses such chats or ends turns with text.
        """
        # a dict keeps order: `TurnEncoder.encode` writes the first id
        end_tokens = dict.fromkeys(self._find_end_tokens())
        try:
            encoded = self.encode(CALL_PROBE)
        except BadRecord:
            return tuple(end_tokens)
        last = encoded.types.rfind(bytes([TYPE_RESPONSE]))
        if end_tokens and last >= 0 and encoded.ids[last] in self._special:
            end_tokens[encoded.ids[last]] = None
        return tuple(end_tokens)

    def _find_end_tokens(self) -> tuple[int, ...]:
        end_tokens: dict[int, None] = {}
        # probe contents are single letters, so special tokens in a learned part come from the template
        for chat in PROBES:
            try:
                segments = split_at_contents(self._template, chat)
            except BadRecord:
                continue
            parts, _ = self._split_parts(segments, chat, {1})
            end_tokens |= {p.special: None for p in parts
                           if p.special is not None and p.kinds[0] != KIND_NONE}
        return tuple(end_tokens)

    def _split_parts(self, segments: Segments, chat: Conversation, learned_messages: set[int]
                     ) -> tuple[list[_ChatPart], bool]:
        """Split a chat into texts and special tokens; return whether it ends in an open response."""
        parts: list[_ChatPart] = []
        learned = [s.message in learned_messages for s in segments]
        last, is_open = len(segments) - 1, False
        last_message = max((i for i, s in enumerate(segments) if s.message is not None), default=-1)
        for i, segment in enumerate(segments):
            is_repeated = i < last_message  # a later message's prompt contains the segment
            # A turn may be two segments, an opening and a content; only the first starts its own text.
            begins = learned[i] and not (i and learned[i - 1] and segments[i - 1].message == segment.message)
            kinds = bytes(len(segment.text))
            if segment.message is not None and learned[i]:
                kinds = classify_turn(segment.text, chat.messages[segment.message])
            # a complete turn from the template: its special tokens are real
            if segment.is_turn:
                split, start = self._split_at_special(segment.text), 0
                for n, (text, special) in enumerate(split):
                    parts.append(_ChatPart(text, special, kinds[start:start + len(text)], n == 0,
                                           n == 0 and is_repeated and special is None))
                    start += len(text)
                is_open = split[-1][1] is None
                continue
            if segment.message is not None:
                start = 0
                for n, (text, special) in enumerate(self._split_content(segment.text)):
                    is_first = begins and n == 0
                    parts.append(_ChatPart(text, special, kinds[start:start + len(text)], is_first,
                                           is_first and is_repeated and special is None))
                    start += len(text)
                # a content has no end token; the following template text may contain an end
                is_open = learned[i]
                continue
            is_cached = len(segment.text) < MAX_CACHED_CHARS
            split = self._split(segment.text) if is_cached else self._split_at_special(segment.text)
            # a turn that already contains its end does not receive the template's following text
            follows_response = i > 0 and learned[i - 1] and (is_open or not segments[i - 1].is_turn)
            end = _find_turn_end(split, i == last) if follows_response else 0
            # the turn's end has the kind of its last character
            end_kind = (parts[-1].kinds[-1:] or bytes([KIND_ANSWER])) if end else b""
            parts += [_ChatPart(text, special, (end_kind if n < end else bytes([KIND_NONE])) * len(text))
                      for n, (text, special) in enumerate(split)]
            is_open = is_open and all(special is None for _, special in split[:end])
        return parts, is_open

    def _split_content(self, text: str) -> list[tuple[str, int | None]]:
        return [(text, None)] if self._inline is None else self._inline.split(text)

    def _encode_run(self, run: Run) -> tuple[list[int], bytes]:
        if run[0].special is not None:
            return [run[0].special], run[0].kinds[:1]
        # Join template and content text before encoding: tokens may cross the border, as in the whole prompt.
        text, kinds = "".join(p.text for p in run), b"".join(p.kinds for p in run)
        # a single kind: use the fast encoder, which returns no offsets
        if len(distinct_kinds := set(kinds)) <= 1:
            ids = self._encode_plain(text)
            return ids, bytes(distinct_kinds or {KIND_NONE}) * len(ids)
        encoding = self._plain.encode(text, add_special_tokens=False)
        token_kinds = bytearray()
        for start, end in encoding.offsets:
            # a token across a border takes the kind of its first learned character
            learned_kinds = kinds[start:max(end, start + 1)].lstrip(bytes([KIND_NONE]))
            token_kinds.append(learned_kinds[0] if learned_kinds else KIND_NONE)
        return encoding.ids, bytes(token_kinds)

    def _check_joint(self, previous: Run, run: Run, ids: list[int]) -> None:
        """Raise `_JointTokenError` if the response's first token would merge with preceding template text.

        Later turns would then be trained after other ids than the model sees in inference.
        """
        # in a later prompt both are one text; in generation the prompt was encoded alone
        text = "".join(p.text for p in previous)
        if self._encode_plain(text + "".join(p.text for p in run)) != self._encode_plain(text) + ids:
            raise _JointTokenError("template",
                                   f"has a response ({run[0].text[:20]!r}...) that joins the template's "
                                   f"{text[-20:]!r} before it in one token when it is asked again, and "
                                   "does not when it is written; remove the white space it begins "
                                   "with, or let the template put a special token there")

    def _check_spaces(self, segments: Segments, chat: Conversation, ids: list[int]) -> None:
        """Raise `BadRecord` if a special token absorbs white space when the whole text is encoded."""
        if self._find_special_token(text for message in chat.messages for text in message.texts()):
            return
        if self._with_special.encode("".join(s.text for s in segments), add_special_tokens=False).ids != ids:
            raise BadRecord("template", "has white space that a special token of this tokenizer takes when a "
                                        "model is asked; strip the contents")

    def _split_at_special(self, text: str) -> tuple[tuple[str, int | None], ...]:
        """Split a template's text into ordinary texts and special tokens with ids."""
        pieces: list[tuple[str, int | None]] = []
        # offsets count characters; text between special tokens is ordinary
        start = 0
        encoding = self._with_special.encode(text, add_special_tokens=False)
        for id_, (first, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ in self._special:
                pieces += [(text[start:first], None)] if start < first else []
                pieces.append((text[first:end], id_))
                start = end
        return tuple(pieces + ([(text[start:], None)] if start < len(text) else []))

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids


def _find_turn_end(split: tuple[tuple[str, int | None], ...], is_last: bool) -> int:
    """Return how many leading parts of the template text after a response belong to the turn."""
    first_special = next((n for n, (_, special) in enumerate(split) if special is not None), None)
    if first_special is None:
        return len(split) if is_last else 0
    is_blank = not "".join(text for text, _ in split[:first_special]).strip()
    return first_special + 1 if is_last or is_blank else 0


def _find_form(text: str) -> CallForm | None:
    call = ToolCall(**SAMPLE_CALL["function"])
    return next((form for form in FORMS if call in parse_turn(text, form=form).calls), None)


def _group_runs(parts: list[_ChatPart]) -> Iterator[Run]:
    """Yield groups of adjacent texts, split at responses, and separate special tokens."""
    run: Run = []
    for part in parts:
        if run and (part.special is not None or part.begins_response or run[0].special is not None):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _contains_result(text: str, rendered: str) -> bool:
    """Return whether a rendered text contains a result verbatim or as a JSON string."""
    spellings = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(spelling in rendered for spelling in spellings)


class TurnEncoder:
    """Encodes conversations with tools turn by turn: keeps the model's token ids and appends the template's
    text.

    Encoding the whole conversation again would replace the model's ids (many texts have several
    tokenizations) and train on tokens that were never sampled.
    """

    def __init__(self, encoder: ChatEncoder, where: str,
                 template_kwargs: Mapping[str, Any] | None = None) -> None:
        """Check the template and find its call form.

        Args:
            encoder: encoder of the model's tokenizer and template.
            where: name of the model in messages.
            template_kwargs: template variables, such as `enable_thinking`.

        Raises:
            UserError: the template ends no turn with a special token, or shows no tool results.
        """
        self._encoder, self._where = encoder, where
        self._template_kwargs = dict(template_kwargs or {})
        self.end_ids = encoder.end_ids()
        """Special tokens that end a model's turn."""
        if not self.end_ids:
            raise UserError(f"{where}: its chat template ends no turn with a special token, so nothing tells "
                            f"where a turn ends; {_REMEDY}")
        # fail now, at the start of a run, instead of in the first conversation with tools
        self.encode_after_turn(["c"])
        self.call_form, call_text = encoder.find_call_form(self._template_kwargs)
        """Form of tool calls; None: no calls in the template, parse every form."""
        if call_text and self.call_form is None:  # calls would be mistaken for answers
            raise UserError(f"{where}: its chat template writes calls of tools in a form that is not "
                            f"read here ({call_text.strip()[:80]!r}); {_REMEDY}")
        added = encoder.added_ids()
        # If the tokenizer (of another family) has no tokens for the template's marks, text marks count.
        text_marks = [mark for mark in (BEGIN_CALL, END_CALL) if mark in call_text and mark not in added]
        self._decode_turn = build_marks_decoder(added, self.end_ids, encoder.decode, text_marks)

    def opening(self, chat: Conversation) -> list[int]:
        """Encode the first prompt for the model. Raises `BadRecord`: refused by the template."""
        prompt = replace(chat, template_kwargs={**chat.template_kwargs, **self._template_kwargs})
        return self._encoder.encode(prompt, awaits_response=True).ids

    def encode_after_turn(self, results: Sequence[str], names: Sequence[str] = (),
                          user: str | None = None) -> list[int]:
        """Encode the text after a model's turn: tool results, a user message and the next generation prompt.

        Special tokens spelled by a result remain text; if the template mixes both, a space breaks them.

        Args:
            results: results in the order of calls.
            names: function names of the calls, which some templates show with results.
            user: user message after the results; None: none.

        Raises:
            UserError: the template does not show tool results.
        """
        user_messages = (() if user is None else (Message("user", user),))
        following = (*(Message("tool", result) for result in results), *user_messages)
        try:
            encoded = self._encode_messages(following)
        except BadRecord:
            plain = tuple(replace(message, content=self._break_special_tokens(message.content))
                          for message in following)
            try:
                encoded = self._encode_messages(plain)
            except BadRecord as e:
                rendered_ids = self._encode_rendered(plain, names or ["unknown"] * len(results))
                if rendered_ids is None:
                    raise UserError(f"{self._where}: its chat template shows no results of tools (a "
                                    f"conversation with one {e.reason}); {_REMEDY}") from None
                return rendered_ids
        # the last learned token ends the assistant turn; results and the next opening follow
        end = encoded.types.rfind(bytes([TYPE_RESPONSE])) + 1
        if not end or encoded.ids[end - 1] not in self.end_ids or end == len(encoded.ids):
            raise UserError(f"{self._where}: its chat template does not show where a turn before a tool's "
                            f"result ends; {_REMEDY}")
        return encoded.ids[end:]

    def _encode_messages(self, following: tuple[Message, ...]) -> EncodedChat:
        chat = Conversation((_USER_MESSAGE, _ASSISTANT_MESSAGE, *following), (), self._template_kwargs)
        return self._encoder.encode(chat, awaits_response=True)

    def _encode_rendered(self, messages: tuple[Message, ...], names: Sequence[str]) -> list[int] | None:
        """Encode messages for templates with JSON results (Llama 3) or with results only after calls.

        Args:
            messages: messages without special tokens, which would become real in the template's text.
            names: function names from the model, possibly invalid.

        Returns:
            The ids after the turn, or None if the template shows no results.
        """
        valid_names = [name if _NAME.fullmatch(name) else "unknown" for name in names]
        calls = tuple({"type": "function", "function": {"name": name, "arguments": {}}}
                      for name in valid_names)
        for turn in (_ASSISTANT_MESSAGE, Message("assistant", "", tool_calls=calls)):
            prefix = Conversation((_USER_MESSAGE, turn), (), self._template_kwargs)
            extended = replace(prefix, messages=(*prefix.messages, *messages))
            try:
                rendered = self._encoder.text_after_turn(prefix, extended)
            except BadRecord:
                continue
            texts = [message.content for message in messages]
            if rendered and all(_contains_result(text, rendered) for text in texts):
                return self._encoder.encode_text(rendered)
        return None

    def _break_special_tokens(self, result: str) -> str:
        # a blank after the first character keeps the text readable and breaks the special token
        for special in self._encoder.special_texts():
            result = result.replace(special, f"{special[0]} {special[1:]}")
        return result.strip()

    def opened_thoughts(self, prompt_ids: Sequence[int]) -> str:
        return self._encoder.opened_thoughts(prompt_ids)

    def text(self, turn_ids: Sequence[int]) -> str:
        """Decode a model's turn without the end token."""
        return self._decode_turn(list(turn_ids))

    def encode(self, text: str) -> list[int]:
        """Encode a text followed by the end token `end_ids[0]`."""
        return [*self._encoder.encode_text(text), self.end_ids[0]]

    def differs(self, turn_ids: Sequence[int]) -> bool:
        """Return whether the turn's text has other ids than the model sampled."""
        return self._encoder.encode_text(self._encoder.decode(turn_ids)) != list(turn_ids)
