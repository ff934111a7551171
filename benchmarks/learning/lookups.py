"""Facts that a model must look up, and conversations that search or answer at once:
`lookups.py:LookupEpisodes`, `:LookupTasks`, `:LookupDocuments`, `:LookupTexts`, `:CallTokenizer`.

Who does not search is right one time in eight, or has read the documents.
"""

import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts import KNOWN, PEOPLE, VALUES, WORDINGS, Fact, draw_facts, format_fact, format_question

from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment

ANSWERED, CALLS, WRONG_CALLS = 0.3, 0.3, 0.15
"""Shares of a start's conversations that are about known people, who are answered at once and rightly; of the
others, shares that search for what is asked and for another kind.  The rest guesses."""
NUM_LIBRARIES = 40
"""Of values by lot, so that results are read and not known by heart."""
SYSTEM = "Search, or answer."
TEMPLATE = (
    "{% if tools %}<|system|>{{ messages[0].content }}{% for tool in tools %}"
    " {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }})"
    "{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if not (tools and m.role == 'system') %}"
    "{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
MARKS = ("<|startoftext|>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
         "<tool_call>", "</tool_call>")
"""Names tools and their arguments alone, so that prompts are short."""


def library(seed: int) -> list[Fact]:
    """Return a fact of each person and kind."""
    rng = random.Random(seed)
    found = [(person, kind, rng.choice(VALUES[kind])) for person in PEOPLE for kind in VALUES]
    rng.shuffle(found)
    return found


def documents(facts: list[Fact]) -> list[dict[str, str]]:
    """Return them as the environment `retrieval` has them."""
    return [{"id": f"{person} {kind}", "text": value} for person, kind, value in facts]


@dataclass(frozen=True)
class LookupEpisodes:
    """Conversations of a start, whose results are the environment's own."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, found = random.Random(self.seed), []
        known = draw_facts(0, KNOWN)
        for number in range(NUM_LIBRARIES):
            facts = library(self.seed + number)
            with tempfile.TemporaryDirectory() as folder:
                corpus = Path(folder) / "library.jsonl"
                corpus.write_text("".join(json.dumps(one) + "\n" for one in documents(facts)))
                settings = {"corpus": str(corpus), "top_k": 1, "system": SYSTEM}
                world = build_versioned_environment(request_environment("retrieval", settings))[0]
                for _ in range(self.count // NUM_LIBRARIES):
                    guessed = rng.random() < ANSWERED
                    fact = rng.choice(known if guessed else facts)
                    lot, kind, said = rng.random(), fact[1], rng.choice(VALUES[fact[1]])
                    question = format_question(fact, rng.choice(WORDINGS))
                    seen = world.reset({"question": question, "answer": fact[2]})
                    messages: list[dict[str, Any]] = [{"role": "system", "content": seen.system},
                                                      {"role": "user", "content": seen.user}]
                    if guessed:
                        said = fact[2]
                    elif lot < CALLS + WRONG_CALLS:
                        if lot >= CALLS:
                            kind = rng.choice([other for other in VALUES if other != kind])
                        arguments = {"query": f"{fact[0]} {kind}"}
                        call = {"name": "search", "arguments": arguments}
                        result = world.call("search", arguments)
                        said = result[0]["text"]
                        messages += [{"role": "assistant", "content": "",
                                      "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
                                     {"role": "tool", "tool_call_id": "c1", "content": json.dumps(result)}]
                    messages.append({"role": "assistant", "content": f"The answer is {said}"})
                    found.append({"messages": messages, "tools": [*world.tools()]})
        return found


@dataclass(frozen=True)
class LookupDocuments:
    """A seed's library."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        return [*documents(library(self.seed))]


@dataclass(frozen=True)
class LookupTexts:
    """A seed's library as sentences."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        return [{"text": format_fact(fact)} for fact in library(self.seed)]


@dataclass(frozen=True)
class LookupTasks:
    """Tasks of the environment `retrieval` over half of a seed's library, each fact in every wording."""

    seed: int
    half: str
    """rounds or end."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        facts = library(self.seed)
        middle = len(facts) // 2
        return [{"question": format_question(fact, wording), "answer": fact[2], "domain": fact[1]}
                for fact in {"rounds": facts[:middle], "end": facts[middle:]}[self.half]
                for wording in WORDINGS]


@dataclass(frozen=True)
class CallTokenizer:
    """Configuration of a tokenizer whose chat template shows calls, for `sov-tokenizer train`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return all items; the input row is ignored."""
        return {"split_pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
                "normalization": "none", "num_special_ids": 16, "chat_template": TEMPLATE,
                "special_tokens": {mark: number for number, mark in enumerate(MARKS)},
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
