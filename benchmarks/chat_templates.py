"""Chat templates of published models against transformers: text, ids and what is learned.

Usage: python benchmarks/chat_templates.py FOLDER [--chats 200] > benchmarks/results/chat_templates.txt
       python benchmarks/chat_templates.py FOLDER --calls 200 > benchmarks/results/calls_of_templates.txt

FOLDER holds *.jinja files, such as `trl/chat_templates` of TRL's wheel.  For each template a tokenizer is
made whose special tokens are those that the template spells, and conversations are drawn: several turns,
thoughts, tools, white space around contents, spellings of special tokens.  Each one is either refused with a
reason, or its ids are compared with transformers' `apply_chat_template`, and the learned text with the turns
as the template shows them: where it has generation blocks, with transformers' own mask of assistant tokens.

With --calls a model's turns with calls of tools are rendered by transformers, and read back as episodes and
`serve` read them: names, and arguments with their types.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.documents.messages import read_messages
from megatron_sov.chat.encode import TYPE_RESPONSE, ChatEncoder
from megatron_sov.chat.template import ChatTemplate, odd_opening
from megatron_sov.chat.tool_calls import parse_turn

SPELLED = re.compile(r"<\|[^|<>\s]+\|>|<｜[^<>]+｜>|<(?:start|end)_of_[a-z_]+>|\[/?[A-Z_]{3,}\]|</?s>|<bos>"
                     r"|<eos>|<turn\|>|<\|turn>|<\|channel>|<channel\|>|<\|tool_call>|<tool_call\|>")
"""What looks like a special token in a template."""
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
"""How most of these models cut text."""
KINDS = ("plain", "system", "thoughts", "white space", "tools", "special tokens")
WORDS = ("yes", "no", "the answer is 4", "let me see", "안녕하세요", "a\nb", "{x: 1}", "<b>", "1 < 2",
         "```py\nx\n```")
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "description": "one"}}, "required": ["a"]}}}


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a template's special tokens, and some merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), (":", "Ġ"), ("Ġ", "Ġ")]
    vocab = {c: i for i, c in enumerate([*letters, *(a + b for a, b in merges)])}
    found = Tokenizer(models.BPE(vocab, merges))
    found.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    special = sorted({*SPELLED.findall(template), "<bos>", "<eos>"})
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<bos>", eos_token="<eos>",
                                   extra_special_tokens=[s for s in special if s not in ("<bos>", "<eos>")])


def conversation(draw: random.Random, kind: str, special: list[str]) -> dict[str, Any]:
    """Return a record of a chat."""
    def text() -> str:
        said = f"{draw.choice(WORDS)} {len(messages)}.{draw.randrange(10**6)} {draw.choice(WORDS)}"
        if kind == "white space":
            said = draw.choice(("", " ", "\n", "\n\n")) + said + draw.choice(("", " ", "\n"))
        if kind == "special tokens" and draw.random() < 0.5:
            said += draw.choice(special)
        return said

    messages: list[dict[str, Any]] = []
    if kind == "system" or draw.random() < 0.2:
        messages.append({"role": "system", "content": text()})
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if kind == "tools" and draw.random() < 0.7:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": draw.randint(0, 9)}}}
            messages += [{"role": "assistant", "content": draw.choice(("", text())), "tool_calls": [call]},
                         {"role": "tool", "content": str(draw.randint(0, 99)), "name": "add"}]
        answer: dict[str, Any] = {"role": "assistant", "content": text()}
        if kind == "thoughts":
            answer["reasoning_content"] = text()
        messages.append(answer)
    record: dict[str, Any] = {"messages": messages}
    return record | ({"tools": [TOOL]} if kind == "tools" else {})


def transformers_render(template: str, record: dict[str, Any], tokens: dict[str, str]) -> tuple[str, Any]:
    """Return the text that transformers shows, and its spans of generation blocks."""
    shown, spans = render_jinja_template(
        conversations=[record["messages"]], tools=record.get("tools"), chat_template=template,
        return_assistant_tokens_mask="{% generation" in template or "{%- generation" in template, **tokens)
    return shown[0], spans[0] if spans else None


def judge(encoder: ChatEncoder, tokenizer: PreTrainedTokenizerFast, template: str,
          record: dict[str, Any]) -> str:
    """Return what becomes of a conversation: "same", "refused: ..." or "DIFFERENT: ..."."""
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    try:
        text, spans = transformers_render(template, record, tokens)
    except Exception as e:
        return f"transformers itself: {type(e).__name__}"
    try:
        messages = read_messages(record["messages"], "messages")
        chat = encoder.encode(Conversation(messages, tuple(record.get("tools", ()))))
    except BadRecord as e:
        return f"refused: {e.code}"
    theirs = tokenizer(text, add_special_tokens=False).input_ids
    spelled = any(s in m["content"] for m in record["messages"] for s in tokenizer.all_special_tokens)
    if tokenizer.decode(chat.ids) != text:
        return "DIFFERENT: text"
    if chat.ids != theirs and not spelled and not _only_a_join(tokenizer, chat, theirs):
        return "DIFFERENT: ids"
    learned = tokenizer.decode([i for i, t in zip(chat.ids, chat.types, strict=True) if t == TYPE_RESPONSE])
    if record.get("tools"):  # where a call ends differs too much for the reference below
        lacks = [m for m in record["messages"] if m["role"] == "assistant" and (
            m["content"].strip() not in learned or (m.get("tool_calls") and "add" not in learned))]
        return "DIFFERENT: a turn with a call is not learned" if lacks else "same"
    expected = expected_turns(encoder, tokenizer, template, record, text, spans)
    if learned == expected:
        return "same"
    # pack tells of such a template: what it writes before an answer is then its own, and not learned
    told = odd_opening(ChatTemplate(template, "<bos>", "<eos>", "it", datetime.now())) is not None
    return "same, opening told" if told else f"DIFFERENT: learned {learned[-60:]!r} not {expected[-60:]!r}"


def expected_turns(encoder: ChatEncoder, tokenizer: PreTrainedTokenizerFast, template: str,
                   record: dict[str, Any], text: str, spans: Any) -> str:
    """Return the text of all turns with their ends, by transformers alone: generation blocks, or from where
    a model is asked for the turn (else from its content) to the first end behind its content."""
    ends = [tokenizer.decode([id_]) for id_ in encoder.end_ids()]
    found, place = "", 0
    turns = [i for i, m in enumerate(record["messages"]) if m["role"] == "assistant"]
    if spans and len(spans) != len(turns):
        spans = None
    for n, i in enumerate(turns):
        content = record["messages"][i]["content"].strip()
        try:
            asked, _ = render_jinja_template(
                conversations=[record["messages"][:i]], tools=record.get("tools"), chat_template=template,
                add_generation_prompt=True, bos_token="<bos>", eos_token="<eos>")
            begin = len(asked[0]) if text.startswith(asked[0]) else -1
        except Exception:
            begin = -1
        if begin < 0:
            begin = spans[n][0] if spans else text.find(record["messages"][i]["content"], place)
        said = text.find(content, begin) + len(content)
        is_last = i == len(record["messages"]) - 1
        behind = [text.find(end, said) + len(end) for end in ends if end in text[said:]]
        end = min(behind, default=len(text) if is_last else said)
        found, place = found + text[begin:end], end
    return found


def _only_a_join(tokenizer: PreTrainedTokenizerFast, chat: Any, theirs: list[int]) -> bool:
    """Return whether ids differ only where a learned turn begins: a model is asked with the text before it,
    encoded alone."""
    joined, start = [], 0
    types = chat.types
    starts = [i for i, t in enumerate(types) if t == TYPE_RESPONSE and (not i or types[i - 1] != t)]
    for stop in [*starts, len(chat.ids)]:
        joined += tokenizer(tokenizer.decode(chat.ids[start:stop]), add_special_tokens=False).input_ids
        start = stop
    return joined == chat.ids


VALUES: dict[str, tuple[Any, ...]] = {
    "string": ("7", "true", "null", "a\nb", "\n", "", '{"a": 1}', "<b> & \"q\" 'r'", "서울", " x ", "</x>"),
    "integer": (0, -7, 10**12), "number": (1.5, -0.25, 3.0e-7), "boolean": (True, False),
    "array": ([], [1, "a"], [[True]]), "object": ({}, {"a": {"b": [1]}}, {"k": "it's"})}
CALLED = {"type": "function", "function": {"name": "call_me", "description": "calls", "parameters": {
    "type": "object", "properties": {kind: {"type": kind, "description": "one"} for kind in VALUES}}}}


def reads_back(encoder: ChatEncoder, template: str, draw: random.Random) -> str:
    """Return what becomes of a turn with calls: "read", "MISREAD", or why there is none."""
    arguments = [{kind: draw.choice(VALUES[kind]) for kind in draw.sample(list(VALUES), draw.randint(0, 6))}
                 for _ in range(draw.randint(1, 2))]
    asked = [{"role": "user", "content": "go"}]
    # some templates want arguments as JSON, some have but one call in a turn
    for written, wanted in ((arguments, arguments), (arguments[:1], arguments[:1]),
                            (list(map(json.dumps, arguments)), arguments)):
        calls = [{"id": "a1b2c3d4e", "type": "function", "function": {"name": "call_me", "arguments": one}}
                 for one in written]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            before, text = (render_jinja_template(
                conversations=[chat], tools=[CALLED], chat_template=template, add_generation_prompt=is_asked,
                bos_token="<bos>", eos_token="<eos>")[0][0] for chat, is_asked in ((asked, True),
                                                                                   ([*asked, turn], False)))
        except Exception:
            continue
        if "call_me" not in text.removeprefix(before):
            return "no calls"
        while not text.startswith(before):  # what is asked for, such as thoughts, and not shown
            before = before[:-1]
        said = text[len(before):].rstrip()
        wanted = wanted[:said.count("call_me")]  # gpt-oss shows the first call of a turn alone
        end = next((end for id_ in encoder.end_ids() if said.endswith(end := encoder.decode([id_]))), "")
        form, shown = encoder.form_of_calls()
        if form is None and shown:
            return "form not read, refused"
        found = parse_turn(said.removesuffix(end), form=form, tools=[CALLED]).calls
        same = json.dumps([getattr(call, "arguments", None) for call in found]) == json.dumps(wanted)
        return "read" if same and all(getattr(call, "name", "") == "call_me" for call in found) else "MISREAD"
    return "transformers itself refuses"


def tell_calls(files: list[Path], count: int) -> None:
    """Print what becomes of calls, by template."""
    totals: Counter[str] = Counter()
    for file in files:
        template, draw = file.read_text(encoding="utf-8"), random.Random(file.name)
        encoder = ChatEncoder(ChatTemplate(template, "<bos>", "<eos>", file.stem, datetime.now()),
                              tokenizer_for(template).backend_tokenizer)
        outcomes = Counter(reads_back(encoder, template, draw) for _ in range(count))
        form = encoder.form_of_calls()[0] or "not told"
        print(f"{file.stem:<36} {form:<12} " + "   ".join(f"{o} {n}" for o, n in sorted(outcomes.items())),
              flush=True)
        totals[" and ".join(sorted(outcomes))] += 1
    print(f"\n{len(files)} templates, {count} turns each: "
          + ", ".join(f"{n} {what}" for what, n in totals.most_common()))
    sys.exit("MISREAD" in " ".join(totals))


def main() -> None:
    """Judge every template."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chats", type=int, default=200, help="conversations of each template")
    parser.add_argument("--calls", type=int, default=0, help="turns with calls of each template, instead")
    args = parser.parse_args()
    files = sorted(args.folder.glob("*.jinja"))
    if args.calls:
        return tell_calls(files, args.calls)
    print(f"{len(files)} templates, {args.chats} conversations each; Python {platform.python_version()}, "
          f"load {os.getloadavg()[0]:.1f}\n")
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    reasons: Counter[str] = Counter()
    different = wholly = 0
    for file in files:
        template, draw = file.read_text(encoding="utf-8"), random.Random(file.name)
        tokenizer = tokenizer_for(template)
        encoder = ChatEncoder(ChatTemplate(template, "<bos>", "<eos>", file.stem, datetime.now()),
                              tokenizer.backend_tokenizer)
        special = [s for s in tokenizer.all_special_tokens if s not in ("<bos>", "<eos>")] or ["<eos>"]
        outcomes: Counter[str] = Counter()
        for n in range(args.chats):
            kind = KINDS[n % len(KINDS)]
            outcome = judge(encoder, tokenizer, template, conversation(draw, kind, special))
            outcomes[f"{kind}: {outcome}"] += 1
            totals[kind][outcome.partition(":")[0]] += 1
            reasons[outcome] += 1
        wrong = sum(n for o, n in outcomes.items() if "DIFFERENT" in o)
        taken = {o: n for o, n in outcomes.items() if o.partition(": ")[2].startswith("same")}
        different += wrong > 0
        wholly += not taken
        print(f"{file.stem:<36} same {sum(taken.values()):>4}   "
              + "   ".join(f"{o} {n}" for o, n in sorted(outcomes.items()) if o not in taken), flush=True)
    print(f"\ntemplates with a silent difference: {different}; templates of which nothing is taken: {wholly}")
    for kind, counts in totals.items():
        print(f"  {kind:<16}" + "   ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print("reasons: " + ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
