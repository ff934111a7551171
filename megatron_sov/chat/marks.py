"""Marks that models write around thoughts and calls of tools: which tokens stay in the text of a response,
and one form for all families.

The form is Hermes' (NousResearch/Hermes-Function-Calling): `<think>...</think>`, and
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.  Others are those of published templates, as vLLM
and llama.cpp read them: Solar Open, gpt-oss, DeepSeek, Kimi K2.  Qwen3-Coder's and GLM-4.5's calls do not say
what is a number and what a text, and Llama 3's have no mark: they are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"
BEGIN_THOUGHTS, END_THOUGHTS = "<think>", "</think>"
_HERMES = (BEGIN_THOUGHTS, END_THOUGHTS, BEGIN_CALL, END_CALL)
_SOLAR = ("<|think|>", "<|content|>", "<|tool_calls|>", "<|tool_call:begin|>", "<|tool_call:name|>",
          "<|tool_call:args|>", "<|tool_call:end|>", "<|begin|>", "<|end|>")
_GPT_OSS = ("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>")
_DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in (
    "calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_KIMI = tuple(f"<|tool_{name}|>" for name in (
    "calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end"))
FAMILIES = (_HERMES, _SOLAR, _GPT_OSS, _DEEPSEEK, _KIMI)
"""Marks of each, the first of which no other family has."""
MARKS = tuple(dict.fromkeys(mark for family in FAMILIES for mark in family))
BEGINS_OF_THOUGHTS = (BEGIN_THOUGHTS, "<|think|>")
"""With which a template may open them."""

_CALLS = tuple((re.compile(begin, re.DOTALL), end) for begin, end in (
    (r"<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>(?P<name>[^<]*)<\|tool_call:args\|>",
     "<|tool_call:end|>"),
    (r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]*)(?:<｜tool▁sep｜>|\n)(?:```json\n)?",
     "<｜tool▁call▁end｜>"),
    (r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^<:\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
     "<|tool_call_end|>"),
    (r"(?:<\|start\|>assistant)?(?:<\|channel\|>(?:commentary|analysis))? ?to=functions\.(?P<name>[\w.-]+)"
     r"(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>)?(?:json\s*)?<\|message\|>",
     "<|call|>")))
"""How a call begins, up to its arguments, and what ends it."""
_BROKEN = ("<|tool_call:begin|>", "<｜tool▁call▁begin｜>", "<|tool_call_begin|>")
_THOUGHTS = (
    re.compile(r"<\|think\|>(.*?)(<\|end\|>(?:<\|begin\|>\w*)?|\Z)", re.DOTALL),
    re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(.*?)"
               r"(<\|end\|>|(?=<\|start\|>)|\Z)", re.DOTALL))
_FRAMES = re.compile(
    r"<\|end\|>(?:<\|begin\|>\w*)?|<\|begin\|>assistant|<\|content\|>|<\|tool_calls\|>|<\|flush\|>|<\|calls\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>\w*)?<\|message\|>"
    r"|<\|start\|>\w*"
    r"|<｜tool▁calls▁(?:begin|end)｜>|<\|tool_calls_section_(?:begin|end)\|>")
_OWN = re.compile("|".join(re.escape(mark) for mark in (
    "<|think|>", "<|content|>", "<|tool_calls|>", "<|tool_call:begin|>", "<|channel|>", *_DEEPSEEK[:2],
    *_KIMI[:2])))


def plain_form(text: str, *, in_thoughts: bool = False) -> str:
    """Return a model's turn with its thoughts and calls in Hermes' form; a text without another family's
    marks stays as it is.  What is no whole call stays none.

    Args:
        text: of the turn, special tokens of `MARKS` spelled out.
        in_thoughts: the template has opened thoughts before it.
    """
    if in_thoughts and "<|think|>" not in text and "<|begin|>" in text:
        text = f"<|think|>{text}"
    if not _OWN.search(text):
        return text
    spans: list[str] = []
    place = 0
    for thoughts in _in_order(_THOUGHTS, text):
        if thoughts.start() < place:
            continue
        spans += [_said(text[place:thoughts.start()]), BEGIN_THOUGHTS, thoughts[1],
                  END_THOUGHTS if thoughts[2] or thoughts.end() < len(text) else ""]
        place = thoughts.end()
    return "".join([*spans, _said(text[place:])])


def _in_order(patterns: Collection[re.Pattern[str]], text: str) -> list[re.Match[str]]:
    return sorted((found for pattern in patterns for found in pattern.finditer(text)),
                  key=lambda found: found.start())


def _said(text: str) -> str:
    """Return what stands outside of thoughts, calls in Hermes' form, frames of turns left out."""
    found, place = [], 0
    begins = [(match, end) for pattern, end in _CALLS for match in pattern.finditer(text)]
    for match, end in sorted(begins, key=lambda item: item[0].start()):
        if match.start() < place:
            continue
        stop = text.find(end, match.end())
        is_whole = stop >= 0 or end == "<|call|>"  # which is the end of the turn, and not in its text
        inside = text[match.end():stop if stop >= 0 else len(text)].strip().removesuffix("```").strip()
        name = json.dumps(match["name"].strip(), ensure_ascii=False)
        found += [_without_frames(text[place:match.start()]), f'{BEGIN_CALL}{{"name": {name}, "arguments": ',
                  f"{inside}}}{END_CALL}" if is_whole else inside]
        place = stop + len(end) if stop >= 0 else len(text)
    return "".join([*found, _without_frames(text[place:])])


def _without_frames(text: str) -> str:
    for mark in _BROKEN:  # begins as a call and is none
        text = text.replace(mark, BEGIN_CALL)
    return _FRAMES.sub("", text)


def text_decoder(tokenizer: Path, end_ids: Collection[int], plain: Callable[[list[int]], str]
                 ) -> Callable[[list[int]], str]:
    """Return the one function that makes a response's text of its tokens: without special tokens, such as
    those that end and frame turns, but with the marks of thoughts and calls, whether they are special or not.

    Args:
        tokenizer: file tokenizer.json.
        end_ids: tokens that end a response; the last one is left out of the text.
        plain: decodes without any special token: what is used where no mark is one.
    """
    from tokenizers import Tokenizer

    spelled: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
    added = {token["content"]: token for token in spelled.get("added_tokens", [])}
    shown = {mark for family in FAMILIES if family[0] in added for mark in family}
    if not any(added[mark]["special"] for mark in shown & added.keys()):
        return plain
    for mark in shown & added.keys():
        added[mark]["special"] = False
    with_marks, ends = Tokenizer.from_str(json.dumps(spelled)), frozenset(end_ids)

    def decode(tokens: list[int]) -> str:
        whole = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        return str(with_marks.decode(list(whole), skip_special_tokens=True))

    return decode
