"""Marks that models write around thoughts and calls of tools: which tokens stay in the text of a response,
one form for all families, and which characters of a turn are thoughts, calls or its answer.

The form is Hermes' (NousResearch/Hermes-Function-Calling): `<think>...</think>`, and
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.  Others are those of published templates, as vLLM
and llama.cpp read them: Solar Open, DeepSeek, Kimi K2.  Llama 3's calls have none: `chat.tool_calls` reads
them.

A mark that a model only quotes is text.  A decoder knows it by its tokens and writes a word joiner (U+2060)
behind its first character, so that no reader takes it for a mark; `as_written` takes the joiner away again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_sov.base.documents import Message

CallForm = Literal["marked", "llama-3"]
"""How a template writes calls, see `tool_calls.FORMS`."""
LLAMA: CallForm = "llama-3"
BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
"""Before a call, by Llama 3's own choice."""
BEGIN_THOUGHTS, END_THOUGHTS = "<think>", "</think>"
_HERMES = (BEGIN_THOUGHTS, END_THOUGHTS, BEGIN_CALL, END_CALL)
_SOLAR = ("<|think|>", "<|content|>", "<|tool_calls|>", "<|tool_call:begin|>", "<|tool_call:name|>",
          "<|tool_call:args|>", "<|tool_call:end|>", "<|begin|>", "<|end|>")
_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in (
    "calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_KIMI = tuple(f"<|tool_{name}|>" for name in (
    "calls_section_begin", "call_begin", "call_argument_begin", "call_end", "call_section_begin",
    "call_section_end", "calls_section_end"))
FAMILIES = (_HERMES, _SOLAR, _DEEPSEEK, _KIMI)
"""Marks of each, the first of which no other family has."""
MARKS = (*dict.fromkeys(mark for family in FAMILIES for mark in family), PYTHON_TAG)
THOUGHT_MARKS = (BEGIN_THOUGHTS, "<|think|>")
"""With which a template may open them."""

_JOINER = "\u2060"


def _build_mark_pattern(marks: Collection[str], more: str = f"{_JOINER}*") -> re.Pattern[str]:
    """Return what finds marks, quoted ones too: a quote of a quote is another text than a quote."""
    return re.compile(f"<(?={more}(?:{'|'.join(re.escape(mark[1:]) for mark in marks)}))")


# the look-ahead leaves the mark itself unmatched, so that only `<` is replaced
_ALL_MARKS = _build_mark_pattern(MARKS)
_QUOTED = re.compile(_ALL_MARKS.pattern.replace("(?=", f"{_JOINER}(?=", 1))


def quote_marks(text: str, marks: re.Pattern[str] = _ALL_MARKS) -> str:
    """Return a text whose marks are no marks; `as_written` gives it back."""
    return marks.sub(f"<{_JOINER}", text)


def unquote_marks(text: str) -> str:
    """Return a text with the marks that it quotes as the model wrote them."""
    return _QUOTED.sub("<", text) if _JOINER in text else text


def prepend_mark(text: str, mark: str) -> str:
    """Return a turn with the mark of the thoughts that the template has opened before it, without which the
    text alone does not show that it begins with thoughts; `mark`: that mark, empty: it has opened none."""
    return text if text.lstrip().startswith(mark) else mark + text


_CALLS = tuple((re.compile(begin, re.DOTALL), end) for begin, end in (
    (r"<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>(?P<name>[^<]*)<\|tool_call:args\|>",
     "<|tool_call:end|>"),
    (r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]*)(?:<｜tool▁sep｜>|\n)(?:```json\n)?",
     "<｜tool▁call▁end｜>"),
    (r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^<:\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
     "<|tool_call_end|>")))
"""How a call begins, up to its arguments, and what ends it."""
_CALL_MARKS = ("<|tool_call:begin|>", "<｜tool▁call▁begin｜>", "<|tool_call_begin|>")
_THOUGHTS = re.compile(r"<\|think\|>(.*?)(<\|end\|>(?:<\|begin\|>\w*)?|\Z)", re.DOTALL)
_FRAMES = re.compile(
    r"<\|end\|>(?:<\|begin\|>\w*)?|<\|begin\|>assistant|<\|content\|>|<\|tool_calls\|>|<\|flush\|>|<\|calls\|>"
    r"|<｜tool▁calls▁(?:begin|end)｜>|<\|tool_calls?_section_(?:begin|end)\|>")
_FIRST_MARK = re.compile("|".join(re.escape(mark) for mark in (
    BEGIN_CALL, "<|think|>", "<|content|>", "<|tool_calls|>", "<|tool_call:begin|>",
    *_DEEPSEEK[:2], *_KIMI[:2], "<|tool_call_section_begin|>", PYTHON_TAG)))
_SECTIONS = ("<|tool_calls|>", _DEEPSEEK[0], _KIMI[0], "<|tool_call_section_begin|>")
"""What opens calls."""
_FOREIGN_MARKS: dict[str, re.Pattern[str]] = {}
"""Mark -> what is text in a turn of its form: the marks of other families."""
for _family in (_SOLAR, _DEEPSEEK, _KIMI, (PYTHON_TAG,)):
    # DeepSeek and Kimi write thoughts as Hermes does
    _own = {*_family, *(_HERMES[:2] if _family in (_DEEPSEEK, _KIMI) else ())}
    _FOREIGN_MARKS |= dict.fromkeys(_family, _build_mark_pattern([mark for mark in MARKS if mark not in _own], ""))
_FOREIGN = _build_mark_pattern([mark for mark in MARKS if mark not in _HERMES], "")


def to_hermes_form(text: str, *, in_thoughts: bool = False, form: CallForm | None = None) -> str:
    """Return a model's turn with its thoughts and calls in Hermes' form; a text without another family's
    marks stays as it is.  What is no whole call stays none, and marks of Hermes' form in another family's
    turn are text.

    Args:
        text: of the turn, special tokens of `MARKS` spelled out.
        in_thoughts: the template has opened thoughts before it.
        form: of calls; None: that of the text's marks.
    """
    if form == LLAMA and _is_bare_call(text):
        return f"{BEGIN_CALL}{quote_marks(text)}{END_CALL}"
    # Solar's template wrote the opening mark into the prompt; the turn begins after it
    if in_thoughts and "<|think|>" not in text and "<|begin|>" in text:
        text = f"<|think|>{text}"
    place = 0
    if text.lstrip().startswith(BEGIN_THOUGHTS) or (in_thoughts and not text.startswith("<|think|>")):
        # thoughts in Hermes' form are ready; only what follows them may have another family's form
        place = text.find(END_THOUGHTS)
        place = len(text) if place < 0 else place + len(END_THOUGHTS)
    first = _FIRST_MARK.search(text, place)
    if first is None or first[0] == BEGIN_CALL:  # a turn has the form of its first mark
        return text
    # a mark of another family in this turn was typed, not meant: it must not open anything below
    text = text[:place] + quote_marks(text[place:], _FOREIGN_MARKS[first[0]])
    if first[0] == PYTHON_TAG:  # the call reaches to the end of the turn
        tag = text.index(PYTHON_TAG, place)
        return f"{text[:tag]}{BEGIN_CALL}{quote_marks(text[tag + len(PYTHON_TAG):])}{END_CALL}"
    spans = [text[:place]]
    for thoughts in _THOUGHTS.finditer(text):
        if thoughts.start() < place:
            continue
        spans += [_convert_outside_thoughts(text[place:thoughts.start()]), BEGIN_THOUGHTS, quote_marks(thoughts[1], _FOREIGN),
                  END_THOUGHTS if thoughts[2] or thoughts.end() < len(text) else ""]
        place = thoughts.end()
    return "".join([*spans, _convert_outside_thoughts(text[place:])])


_BARE_CALL = re.compile(r'\s*\{\s*"(?:type"\s*:\s*"function"\s*,\s*")?name"\s*:')


def _is_bare_call(text: str) -> bool:
    """Return whether a turn without marks is a call of Llama 3, whole or broken, and no object that it
    answers with."""
    if not _BARE_CALL.match(text):
        return False
    try:
        return set(json.loads(text)) <= {"type", "name", "parameters", "arguments"}
    except (ValueError, RecursionError):
        return True


def _convert_outside_thoughts(text: str) -> str:
    """Return what stands outside of thoughts, calls in Hermes' form, frames of turns left out."""
    found, place = [], 0
    begins = [(match, end) for pattern, end in _CALLS for match in pattern.finditer(text)]
    for match, end in sorted(begins, key=lambda item: item[0].start()):
        # a call inside the arguments of another one is text of those
        if match.start() < place:
            continue
        stop = text.find(end, match.end())
        is_whole = stop >= 0
        inside = text[match.end():stop if stop >= 0 else len(text)].strip().removesuffix("```").strip()
        name = json.dumps(match["name"].strip(), ensure_ascii=False)
        inside = quote_marks(inside, _FOREIGN) or ("{}" if is_whole else "")
        found += [_remove_frames(text[place:match.start()]), f'{BEGIN_CALL}{{"name": {name}, "arguments": ',
                  f"{inside}}}{END_CALL}" if is_whole else inside]
        place = stop + len(end) if stop >= 0 else len(text)
    return "".join([*found, _remove_frames(text[place:])])


def _remove_frames(text: str) -> str:
    for mark in _CALL_MARKS:  # begins as a call and is none
        text = text.replace(mark, BEGIN_CALL)
    return quote_marks(_FRAMES.sub("", text), _FOREIGN)


def build_text_decoder(tokenizer: Path, end_ids: Collection[int], plain: Callable[[list[int]], str]
                 ) -> Callable[[list[int]], str]:
    """Return the one function that makes a response's text of its tokens: without special tokens, such as
    those that end and frame turns, but with the marks of thoughts and calls, whether they are special or not.

    Args:
        tokenizer: file tokenizer.json.
        end_ids: tokens that end a response; the last one is left out of the text.
        plain: decodes without any special token.
    """
    spelled: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = {str(token["content"]): int(token["id"]) for token in spelled.get("added_tokens", [])}
    return build_marks_decoder(ids, end_ids, plain)


def build_marks_decoder(added: Mapping[str, int], end_ids: Collection[int], plain: Callable[[list[int]], str],
                  intended_marks: Collection[str] = ()) -> Callable[[list[int]], str]:
    """Return what makes a turn's text of its tokens, in which a mark that is written in ordinary tokens is
    quoted wherever the tokenizer has tokens for such marks.

    Args:
        added: the tokenizer's added tokens, special or not -> id.
        end_ids: tokens that end a turn; the last one is left out of the text.
        plain: decodes tokens that are no marks.
        intended_marks: marks that are meant in ordinary tokens, whatever the tokenizer has tokens for.
    """
    # a family is there when the tokenizer has its first or last mark as a token
    has = [family for family in FAMILIES if family[0] in added or family[-1] in added]
    # Llama's mark decides nothing about the others: models of all forms are trained from its tokenizer
    shown = {added[mark]: mark for family in (*has, (PYTHON_TAG,)) for mark in family if mark in added}
    # Hermes' marks may be plain text for a tokenizer without tokens for them; there they are meant
    text_marks = set(MARKS) - set(_HERMES)
    if BEGIN_CALL in added or any(family is not _HERMES for family in has):
        text_marks |= set(_HERMES[2:])
    if BEGIN_THOUGHTS in added or _SOLAR in has:
        text_marks |= set(_HERMES[:2])
    text_marks -= set(intended_marks)
    quotable, ends = _build_mark_pattern([mark for mark in MARKS if mark in text_marks]), frozenset(end_ids)
    # in the section of calls that a token opens, the marks of its family that have no token are in text
    own = {mark for family in has for mark in family if mark not in added}
    in_calls = _build_mark_pattern([mark for mark in MARKS if mark in text_marks - own])

    def decode(tokens: list[int]) -> str:
        whole = list(tokens[:-1] if tokens and tokens[-1] in ends else tokens)
        # what the model wrote in ordinary tokens is quoted, what it wrote as tokens of marks is meant
        parts, start, marks = [], 0, quotable
        for place in [*(n for n, id_ in enumerate(whole) if id_ in shown), len(whole)]:
            if place > start:
                parts.append(quote_marks(plain(whole[start:place]), marks))
            if place < len(whole):
                parts.append(shown[whole[place]])
                marks = in_calls if parts[-1] in _SECTIONS else quotable
            start = place + 1
        return "".join(parts)

    return decode


KIND = "kind"
"""Column of chats: what each token is learned as."""
KIND_NONE, KIND_THOUGHT, KIND_CALL, KIND_ANSWER = 0, 1, 2, 3
"""What a token can be learned as: nothing, since no learned turn holds it, or a part of one."""
KINDS = {"thought": KIND_THOUGHT, "call": KIND_CALL, "answer": KIND_ANSWER}
"""Name in events and the report -> kind."""
_END_TAG = re.compile(r"\s*(?:<[^<>\s]{1,60}>|\[/?[A-Z_]{1,60}\])")
# a template may have opened the thoughts that a turn begins with
_THOUGHT = (f"(?P<thought>\\A(?:(?!{BEGIN_THOUGHTS}).)*?{END_THOUGHTS}|"
            f"{BEGIN_THOUGHTS}.*?(?:{END_THOUGHTS}|\\Z))")
_CALL = f"(?P<call>{BEGIN_CALL}.*?(?:{END_CALL}|\\Z))"


def classify_turn(text: str, message: Message) -> bytes:
    """Return the kind of each character of a learned turn.

    Opening marks count with what they open, and what ends a part counts with it: the tag behind the thoughts
    (`</think>`, `<|end|>`), and the end of the turn behind its last part.  A message that is a content alone
    may spell thoughts and calls in it, in the marks that `tool_calls.parse_turn` reads.

    Args:
        text: the turn as the template shows it, or the content of a message that is nothing else.
        message: what it shows.
    """
    # stripped, since templates trim what they show; searched in order, since one text may occur twice
    answer = _find_thoughts_end(text, message.reasoning.strip())
    content = message.content.strip()
    place = text.find(content, answer)
    calls = _find_calls_begin(text, message, place + len(content) if place >= 0 else answer)
    said = text[answer:calls]
    return (bytes([KIND_THOUGHT]) * answer + _classify_text(said, message)
            + bytes([KIND_CALL]) * (len(text) - answer - len(said)))


def _find_thoughts_end(text: str, thoughts: str) -> int:
    """Return where a turn goes on behind its thoughts and the tag that ends them; 0 where it shows none."""
    begin = text.find(thoughts) if thoughts else -1
    if begin < 0:
        return 0
    end = begin + len(thoughts)
    tag = _END_TAG.match(text, end)
    return tag.end() if tag else end


def _find_calls_begin(text: str, message: Message, start: int) -> int:
    """Return where the calls of a turn begin: behind what it says; its end where it has none, or they are
    not shown there."""
    names = [call["function"]["name"] for call in message.tool_calls]
    return start if names and text.find(names[0], start) >= 0 else len(text)


def _classify_text(said: str, message: Message) -> bytes:
    """Return the kinds of what is said, in which a message without thoughts or calls of its own may spell
    them; a call inside of thoughts is a thought, and the other way round."""
    found = bytearray([KIND_ANSWER]) * len(said)
    sought = [*([] if message.reasoning.strip() else [_THOUGHT]), *([] if message.tool_calls else [_CALL])]
    # one pattern with both parts: whichever begins first wins, so a call inside thoughts stays thoughts
    for part in re.finditer("|".join(sought), said, re.DOTALL) if sought else ():
        begin, end = part.span()
        found[begin:end] = bytes([KINDS[str(part.lastgroup)]]) * (end - begin)
    return bytes(found)
