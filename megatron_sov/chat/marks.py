"""Decode marks around thoughts and tool calls, convert model families to Hermes' form, and classify a turn's
characters as thought, call or answer.

The common form is Hermes' (NousResearch/Hermes-Function-Calling): `<think>...</think>` and
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Further families follow published templates as
read by vLLM and llama.cpp: Solar Open, DeepSeek, Kimi K2. Llama 3 calls have no marks; `chat.tool_calls`
parses them.

A mark that a model quotes is text. The decoder recognizes quotes by their tokens and inserts a word joiner
(U+2060) after the first character, so that no parser takes them for marks; `unquote_marks` removes the
joiner.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_sov.base.documents import Message

CallForm = Literal["marked", "llama-3"]
"""Form of tool calls, see `tool_calls.FORMS`."""
LLAMA: CallForm = "llama-3"
BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
"""Optional mark before a Llama 3 call."""
BEGIN_THOUGHTS, END_THOUGHTS = "<think>", "</think>"
BEGIN_GENERATION, END_GENERATION = "\ue002", "\ue003"
"""Marks around generation blocks of a rendered template, if `marks_generation` is set."""
_HERMES = (BEGIN_THOUGHTS, END_THOUGHTS, BEGIN_CALL, END_CALL)
_SOLAR = ("<|think|>", "<|content|>", "<|tool_calls|>", "<|tool_call:begin|>", "<|tool_call:name|>",
          "<|tool_call:args|>", "<|tool_call:end|>", "<|begin|>", "<|end|>")
_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in (
    "calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_KIMI = tuple(f"<|tool_{name}|>" for name in (
    "calls_section_begin", "call_begin", "call_argument_begin", "call_end", "call_section_begin",
    "call_section_end", "calls_section_end"))
FAMILIES = (_HERMES, _SOLAR, _DEEPSEEK, _KIMI)
"""Marks per model family; each first mark is unique to the family."""
MARKS = (*dict.fromkeys(mark for family in FAMILIES for mark in family), PYTHON_TAG)
THOUGHT_MARKS = (BEGIN_THOUGHTS, "<|think|>")
"""Marks with which a template may open thoughts."""

_JOINER = "\u2060"
_CALL_MARKS = ("<|tool_call:begin|>", "<｜tool▁call▁begin｜>", "<|tool_call_begin|>")
_THOUGHTS = re.compile(r"<\|think\|>(.*?)(<\|end\|>(?:<\|begin\|>\w*)?|\Z)", re.DOTALL)
_FRAMES = re.compile(
    r"<\|end\|>(?:<\|begin\|>\w*)?|<\|begin\|>assistant|<\|content\|>|<\|tool_calls\|>|<\|flush\|>|<\|calls\|>"
    r"|<｜tool▁calls▁(?:begin|end)｜>|<\|tool_calls?_section_(?:begin|end)\|>")
_FIRST_MARK = re.compile("|".join(re.escape(mark) for mark in (
    BEGIN_CALL, "<|think|>", "<|content|>", "<|tool_calls|>", "<|tool_call:begin|>",
    *_DEEPSEEK[:2], *_KIMI[:2], "<|tool_call_section_begin|>", PYTHON_TAG)))
_SECTIONS = ("<|tool_calls|>", _DEEPSEEK[0], _KIMI[0], "<|tool_call_section_begin|>")
"""Marks at the start of call sections."""
_FOREIGN_MARKS: dict[str, re.Pattern[str]] = {}
"""First mark of a turn -> pattern of foreign marks, which count as text."""
_BARE_CALL = re.compile(r'\s*\{\s*"(?:type"\s*:\s*"function"\s*,\s*")?name"\s*:')
KIND = "kind"
"""Token table column: learning kind per token."""
KIND_NONE, KIND_THOUGHT, KIND_CALL, KIND_ANSWER = 0, 1, 2, 3
"""Learning kinds: outside learned turns, or a part of a turn."""
KINDS = {"thought": KIND_THOUGHT, "call": KIND_CALL, "answer": KIND_ANSWER}
"""Name in events and reports -> kind."""
_END_TAG = re.compile(r"\s*(?:<[^<>\s]{1,60}>|\[/?[A-Z_]{1,60}\])")
# a template may have opened the thoughts before the turn
_THOUGHT = (f"(?P<thought>\\A(?:(?!{BEGIN_THOUGHTS}).)*?{END_THOUGHTS}|"
            f"{BEGIN_THOUGHTS}.*?(?:{END_THOUGHTS}|\\Z))")
_CALL = f"(?P<call>{BEGIN_CALL}.*?(?:{END_CALL}|\\Z))"


def _build_mark_pattern(marks: Collection[str], more: str = f"{_JOINER}*") -> re.Pattern[str]:
    """Return a pattern for marks, including quoted ones: a quote of a quote differs from a quote."""
    return re.compile(f"<(?={more}(?:{'|'.join(re.escape(mark[1:]) for mark in marks)}))")


# the look-ahead consumes only `<`, so that substitution keeps the rest of the mark
_ALL_MARKS = _build_mark_pattern(MARKS)
_QUOTED = re.compile(_ALL_MARKS.pattern.replace("(?=", f"{_JOINER}(?=", 1))


def quote_marks(text: str, marks: re.Pattern[str] = _ALL_MARKS) -> str:
    """Quote the marks in a text; inverse of `unquote_marks`."""
    return marks.sub(f"<{_JOINER}", text)


def unquote_marks(text: str) -> str:
    """Remove the word joiners from quoted marks."""
    return _QUOTED.sub("<", text) if _JOINER in text else text


def prepend_mark(text: str, mark: str) -> str:
    """Prepend the thought mark opened by the template before a turn, if any."""
    return text if text.lstrip().startswith(mark) else mark + text


_CALLS = tuple((re.compile(begin, re.DOTALL), end) for begin, end in (
    (r"<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>(?P<name>[^<]*)<\|tool_call:args\|>",
     "<|tool_call:end|>"),
    (r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]*)(?:<｜tool▁sep｜>|\n)(?:```json\n)?",
     "<｜tool▁call▁end｜>"),
    (r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^<:\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
     "<|tool_call_end|>")))
"""Pattern of a call up to the arguments, and the end mark."""
for _family in (_SOLAR, _DEEPSEEK, _KIMI, (PYTHON_TAG,)):
    # DeepSeek and Kimi use Hermes' thought marks
    _own = {*_family, *(_HERMES[:2] if _family in (_DEEPSEEK, _KIMI) else ())}
    _FOREIGN_MARKS |= dict.fromkeys(_family,
                                    _build_mark_pattern([mark for mark in MARKS if mark not in _own], ""))
_FOREIGN = _build_mark_pattern([mark for mark in MARKS if mark not in _HERMES], "")


def to_hermes_form(text: str, *, in_thoughts: bool = False, form: CallForm | None = None) -> str:
    """Convert a turn from any model family to Hermes' form; Hermes turns stay unchanged. Incomplete calls
    stay incomplete, and Hermes marks in other families' turns become text.

    Args:
        text: of the turn, special tokens of `MARKS` spelled out.
        in_thoughts: the template has opened thoughts before it.
        form: of calls; None: that of the text's marks.
    """
    if form == LLAMA and _is_bare_call(text):
        return f"{BEGIN_CALL}{quote_marks(text)}{END_CALL}"
    # Solar's template opened the thoughts in the prompt; the turn starts inside them
    if in_thoughts and "<|think|>" not in text and "<|begin|>" in text:
        text = f"<|think|>{text}"
    index = 0
    if text.lstrip().startswith(BEGIN_THOUGHTS) or (in_thoughts and not text.startswith("<|think|>")):
        # thoughts already have Hermes' form; only the rest may have another family's
        index = text.find(END_THOUGHTS)
        index = len(text) if index < 0 else index + len(END_THOUGHTS)
    first_mark = _FIRST_MARK.search(text, index)
    # the first mark determines the turn's form
    if first_mark is None or first_mark[0] == BEGIN_CALL:
        return text
    # marks of other families in this turn are text and must not open anything below
    text = text[:index] + quote_marks(text[index:], _FOREIGN_MARKS[first_mark[0]])
    if first_mark[0] == PYTHON_TAG:  # the call extends to the end of the turn
        tag = text.index(PYTHON_TAG, index)
        return f"{text[:tag]}{BEGIN_CALL}{quote_marks(text[tag + len(PYTHON_TAG):])}{END_CALL}"
    spans = [text[:index]]
    for thoughts in _THOUGHTS.finditer(text):
        if thoughts.start() < index:
            continue
        spans += [_convert_outside_thoughts(text[index:thoughts.start()]), BEGIN_THOUGHTS,
                  quote_marks(thoughts[1], _FOREIGN),
                  END_THOUGHTS if thoughts[2] or thoughts.end() < len(text) else ""]
        index = thoughts.end()
    return "".join([*spans, _convert_outside_thoughts(text[index:])])


def _is_bare_call(text: str) -> bool:
    """Return whether a turn without marks is a Llama 3 call, complete or malformed: no JSON answer."""
    if not _BARE_CALL.match(text):
        return False
    try:
        return set(json.loads(text)) <= {"type", "name", "parameters", "arguments"}
    except (ValueError, RecursionError):
        return True


def _convert_outside_thoughts(text: str) -> str:
    """Convert text outside thoughts: calls to Hermes' form, without turn frames."""
    parts, index = [], 0
    begins = [(match, end) for pattern, end in _CALLS for match in pattern.finditer(text)]
    for match, end in sorted(begins, key=lambda item: item[0].start()):
        # a call inside another call's arguments is text
        if match.start() < index:
            continue
        stop = text.find(end, match.end())
        is_complete = stop >= 0
        inside = text[match.end():stop if stop >= 0 else len(text)].strip().removesuffix("```").strip()
        name = json.dumps(match["name"].strip(), ensure_ascii=False)
        inside = quote_marks(inside, _FOREIGN) or ("{}" if is_complete else "")
        parts += [_remove_frames(text[index:match.start()]), f'{BEGIN_CALL}{{"name": {name}, "arguments": ',
                  f"{inside}}}{END_CALL}" if is_complete else inside]
        index = stop + len(end) if stop >= 0 else len(text)
    return "".join([*parts, _remove_frames(text[index:])])


def _remove_frames(text: str) -> str:
    for mark in _CALL_MARKS:  # call marks without a parsable call
        text = text.replace(mark, BEGIN_CALL)
    return quote_marks(_FRAMES.sub("", text), _FOREIGN)


def build_text_decoder(tokenizer: Path, end_ids: Collection[int], plain: Callable[[list[int]], str]
                       ) -> Callable[[list[int]], str]:
    """Build the decoder for responses: removes special tokens that end or frame turns, keeps thought and call
    marks.

    Args:
        tokenizer: `tokenizer.json`.
        end_ids: tokens that end a response; a final one is dropped.
        plain: decoder that skips special tokens.
    """
    spelled: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = {str(token["content"]): int(token["id"]) for token in spelled.get("added_tokens", [])}
    return build_marks_decoder(ids, end_ids, plain)


def build_marks_decoder(added: Mapping[str, int], end_ids: Collection[int], plain: Callable[[list[int]], str],
                        intended_marks: Collection[str] = ()) -> Callable[[list[int]], str]:
    """Build a decoder for turns; marks spelled in ordinary tokens are quoted if the tokenizer has mark
    tokens.

    Args:
        added: text -> id of the tokenizer's added tokens, special or not.
        end_ids: tokens that end a turn; a final one is dropped.
        plain: decoder for tokens other than marks.
        intended_marks: marks that count even in ordinary tokens.
    """
    # a tokenizer supports a family if its first or last mark is a token
    families = [family for family in FAMILIES if family[0] in added or family[-1] in added]
    # Llama's mark implies no family: models of all forms use its tokenizer
    family_marks = (*itertools.chain.from_iterable(families), PYTHON_TAG)
    id_to_mark = {added[mark]: mark for mark in family_marks if mark in added}
    # if the tokenizer has no tokens for Hermes' marks, text marks count
    text_marks = set(MARKS) - set(_HERMES)
    if BEGIN_CALL in added or any(family is not _HERMES for family in families):
        text_marks |= set(_HERMES[2:])
    if BEGIN_THOUGHTS in added or _SOLAR in families:
        text_marks |= set(_HERMES[:2])
    text_marks -= set(intended_marks)
    quotable, ends = _build_mark_pattern([mark for mark in MARKS if mark in text_marks]), frozenset(end_ids)
    # inside a call section opened by a token, marks of its family without tokens count as text marks
    text_only_marks = {mark for family in families for mark in family if mark not in added}
    in_calls = _build_mark_pattern([mark for mark in MARKS if mark in text_marks - text_only_marks])

    def decode(tokens: list[int]) -> str:
        ids = list(tokens[:-1] if tokens and tokens[-1] in ends else tokens)
        # quote ordinary tokens, keep mark tokens
        parts, start, marks = [], 0, quotable
        for index in [*(n for n, id_ in enumerate(ids) if id_ in id_to_mark), len(ids)]:
            if index > start:
                parts.append(quote_marks(plain(ids[start:index]), marks))
            if index < len(ids):
                parts.append(id_to_mark[ids[index]])
                marks = in_calls if parts[-1] in _SECTIONS else quotable
            start = index + 1
        return "".join(parts)

    return decode


def classify_turn(text: str, message: Message) -> bytes:
    """Classify each character of a learned turn.

    Opening marks belong to the part they open, closing tags to the part they close (`</think>`, `<|end|>`,
    end of turn). A message with content alone may spell thoughts and calls in the marks of
    `tool_calls.parse_turn`.

    Args:
        text: the turn as shown by the template, or a message's content.
        message: the message of the turn.
    """
    # strip because templates trim; search in order because texts may repeat
    num_thought = _find_thoughts_end(text, message.reasoning.strip())
    content = message.content.strip()
    content_begin = text.find(content, num_thought)
    content_end = content_begin + len(content) if content_begin >= 0 else num_thought
    calls_begin = _find_calls_begin(text, message, content_end)
    return (bytes([KIND_THOUGHT]) * num_thought + _classify_text(text[num_thought:calls_begin], message)
            + bytes([KIND_CALL]) * (len(text) - calls_begin))


def _find_thoughts_end(text: str, thoughts: str) -> int:
    """Return the index after thoughts and their closing tag, 0 without thoughts."""
    begin = text.find(thoughts) if thoughts else -1
    if begin < 0:
        return 0
    end = begin + len(thoughts)
    tag = _END_TAG.match(text, end)
    return tag.end() if tag else end


def _find_calls_begin(text: str, message: Message, start: int) -> int:
    """Return the begin of the calls at or after `start`; without visible calls, the text's length."""
    names = [call["function"]["name"] for call in message.tool_calls]
    return start if names and text.find(names[0], start) >= 0 else len(text)


def _classify_text(text: str, message: Message) -> bytes:
    """Classify an answer with spelled thoughts or calls; the outer one of nested ones counts."""
    kinds = bytearray([KIND_ANSWER]) * len(text)
    patterns = [*([] if message.reasoning.strip() else [_THOUGHT]), *([] if message.tool_calls else [_CALL])]
    # a joint pattern: the earlier begin wins, and a call inside thoughts stays a thought
    for part in re.finditer("|".join(patterns), text, re.DOTALL) if patterns else ():
        begin, end = part.span()
        kinds[begin:end] = bytes([KINDS[str(part.lastgroup)]]) * (end - begin)
    return bytes(kinds)
