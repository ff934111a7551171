"""Sums for a calculator, and conversations in which it is called or not: what the commands of claims name as
`sums.py:SumEpisodes`, `:SumTasks` and `:CallTokenizer`."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.judge.tools.registry import make, order

SIGNS = {"plus": "+", "minus": "-", "times": "*"}
ASKED_SHARE = 0.25
"""Of all sums, which no conversation and no round has."""
CALLS, WRONG_CALLS = 0.3, 0.1
"""Shares of conversations that call for the sum and for another one; the others answer at once, and half of
them know it."""
TEMPLATE = (
    "{% if tools %}<|begin|>system<|content|>{{ messages[0].content }}{% for tool in tools %}"
    " {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}): "
    "{{ tool.function.description }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if not (tools and m.role == 'system') %}"
    "<|begin|>{{ m.role }}<|content|>{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant<|content|>{% endif %}")
"""Names the tools without the types of their arguments, so that prompts are short."""


def sums(asked: bool) -> list[tuple[int, str, int]]:
    """Return those that are asked at the end, or the others."""
    found = [(a, sign, b) for a in range(10) for sign in SIGNS for b in range(10)]
    random.Random(0).shuffle(found)
    middle = int(ASKED_SHARE * len(found))
    return found[:middle] if asked else found[middle:]


def value(a: int, sign: str, b: int) -> int:
    """Return what a sum comes to."""
    return {"plus": a + b, "minus": a - b, "times": a * b}[sign]


@dataclass(frozen=True)
class SumEpisodes:
    """Conversations with a calculator, whose results are its own."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return them all, whatever the row is."""
        world, rng, found = make(order("calculator", {}))[0], random.Random(self.seed), []
        for _ in range(self.count):
            a, sign, b = rng.choice(sums(asked=False))
            seen, lot = world.reset({"question": f"What is {a} {sign} {b}?", "answer": "0"}), rng.random()
            messages: list[dict[str, Any]] = [{"role": "system", "content": seen.system},
                                              {"role": "user", "content": seen.user}]
            answer = str(value(a, sign, b) if rng.random() < 0.5 else rng.randrange(-9, 82))
            if lot < CALLS + WRONG_CALLS:
                called = sign if lot < CALLS else rng.choice([other for other in SIGNS if other != sign])
                call = {"name": "calculate", "arguments": {"expression": f"{a} {SIGNS[called]} {b}"}}
                result = world.call(call["name"], call["arguments"])
                answer = result if isinstance(result, str) else json.dumps(result)
                messages += [{"role": "assistant", "content": "",
                              "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
                             {"role": "tool", "tool_call_id": "c1", "content": answer}]
            messages.append({"role": "assistant", "content": f"The answer is {answer}"})
            found.append({"messages": messages, "tools": [*world.tools()]})
        return found


@dataclass(frozen=True)
class SumTasks:
    """Tasks of the environment `calculator`."""

    asked: bool

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return them all, whatever the row is."""
        return [{"question": f"What is {a} {sign} {b}?", "answer": str(value(a, sign, b)), "domain": sign}
                for a, sign, b in sums(self.asked)]


@dataclass(frozen=True)
class CallTokenizer:
    """Configuration of a tokenizer whose chat template shows calls, for `sov-tokenizer train`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return it, whatever the row is."""
        return {"split_pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
                "normalization": "none", "num_special_ids": 8, "chat_template": TEMPLATE,
                "special_tokens": {"<|startoftext|>": 0, "<|endoftext|>": 1, "<|begin|>": 2, "<|content|>": 3,
                                   "<|end|>": 4},
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
