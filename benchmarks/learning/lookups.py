"""Questions that a model can answer by a search, and conversations with and without a search:
`lookups.py:LookupEpisodes`, `:LookupTasks`, `:LookupDocuments`, `:LookupTexts`, `:CallTokenizer`.

Without a search an answer is right one time in eight, unless the model was trained on the documents.
"""

import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import RandomRows
from facts import KNOWN, PEOPLE, VALUES, WORDINGS, Fact, draw_facts, format_fact, format_question

from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment

KNOWN_SHARE = 0.3
"""Share of the initial model's conversations about known people, with the right answer and no search."""
SEARCH_SHARE, WRONG_SEARCH_SHARE = 0.3, 0.15
"""Shares of the other conversations: a search for the fact of the question, a search for another kind of
fact. The remaining conversations have a random answer."""
NUM_LIBRARIES = 40
"""Number of random libraries, so that the model learns to read results instead of memorizing them."""
SYSTEM = "Search, or answer."
# shows only names of tools and arguments, so that prompts are short
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


def draw_library(seed: int) -> list[Fact]:
    """Return a random fact of each kind about each person, in random order."""
    rng = random.Random(seed)
    facts = [(person, kind, rng.choice(VALUES[kind])) for person in PEOPLE for kind in VALUES]
    rng.shuffle(facts)
    return facts


def format_documents(facts: list[Fact]) -> list[dict[str, str]]:
    """Return facts as records of the corpus that the environment `retrieval` searches."""
    return [{"id": f"{person} {kind}", "text": value} for person, kind, value in facts]


@dataclass(frozen=True)
class LookupEpisodes(RandomRows):
    """Conversations of the initial model, with results of the environment `retrieval`."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, episodes = random.Random(self.seed), []
        for number in range(NUM_LIBRARIES):
            facts = draw_library(self.seed + number)
            with tempfile.TemporaryDirectory() as folder:
                corpus = Path(folder) / "library.jsonl"
                corpus.write_text("".join(json.dumps(record) + "\n" for record in format_documents(facts)))
                settings = {"corpus": str(corpus), "top_k": 1, "system": SYSTEM}
                world = build_versioned_environment(request_environment("retrieval", settings))[0]
                episodes += [draw_episode(rng, facts, world) for _ in range(self.count // NUM_LIBRARIES)]
        return episodes


def draw_episode(rng: random.Random, facts: list[Fact], world: Any) -> dict[str, Any]:
    """Return a conversation about a known fact or a fact of the library, with the environment's tools."""
    is_known = rng.random() < KNOWN_SHARE
    person, kind, value = fact = rng.choice(draw_facts(0, KNOWN) if is_known else facts)
    draw, answer = rng.random(), rng.choice(VALUES[kind])
    observation = world.reset({"question": format_question(fact, rng.choice(WORDINGS)), "answer": value})
    messages: list[dict[str, Any]] = [{"role": "system", "content": observation.system},
                                      {"role": "user", "content": observation.user}]
    if is_known:
        answer = value
    elif draw < SEARCH_SHARE + WRONG_SEARCH_SHARE:
        if draw >= SEARCH_SHARE:
            kind = rng.choice([other for other in VALUES if other != kind])
        call = {"name": "search", "arguments": {"query": f"{person} {kind}"}}
        result = world.call("search", call["arguments"])
        answer = result[0]["text"]
        messages += [{"role": "assistant", "content": "",
                      "tool_calls": [{"id": "c1", "type": "function", "function": call}]},
                     {"role": "tool", "tool_call_id": "c1", "content": json.dumps(result)}]
    messages.append({"role": "assistant", "content": f"The answer is {answer}"})
    return {"messages": messages, "tools": [*world.tools()]}


@dataclass(frozen=True)
class LookupDocuments:
    """A seed's library as the corpus of the environment `retrieval`."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [*format_documents(draw_library(self.seed))]


@dataclass(frozen=True)
class LookupTexts:
    """A seed's library as sentences."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"text": format_fact(fact)} for fact in draw_library(self.seed)]


@dataclass(frozen=True)
class LookupTasks:
    """Tasks of the environment `retrieval` over half of a seed's library, each fact in every wording."""

    seed: int
    half: str
    """"rounds": facts of training; "end": facts of the evaluation."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        facts = draw_library(self.seed)
        middle = len(facts) // 2
        return [{"question": format_question(fact, wording), "answer": fact[2], "domain": fact[1]}
                for fact in {"rounds": facts[:middle], "end": facts[middle:]}[self.half]
                for wording in WORDINGS]


@dataclass(frozen=True)
class CallTokenizer:
    """Configuration for `sov-tokenizer train` with a chat template for tool calls."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"split_pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
                "normalization": "none", "num_special_ids": 16, "chat_template": TEMPLATE,
                "special_tokens": {mark: number for number, mark in enumerate(MARKS)},
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
