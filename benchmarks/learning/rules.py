"""Instructions with a rule that IFEval checks, and drafts that partly follow it: `rules.py:Drafts`,
`:KeptDrafts`, `:RulePrompts`."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

THINGS = {"fruits": "apple banana cherry grape lemon mango peach plum",
          "colours": "amber black brown green indigo red violet white",
          "animals": "badger cat deer eagle fox goat heron lynx",
          "cities": "Busan Cairo Dakar Hanoi Lima Oslo Perth Quito",
          "tools": "anvil bellows chisel drill file hammer saw wrench",
          "metals": "brass copper gold iron lead nickel silver tin"}
QUERIES = ("Name three {things}.", "Which {things} do you know?", "Tell me some {things}.")
END, MARK = "That is all.", "P.S."
RULES: Mapping[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "commas": ({"id": "punctuation:no_comma"}, "{0} {1} {2}", ("Use no commas.", "Leave all commas out.")),
    "quotes": ({"id": "startend:quotation"}, '"{0}, {1}, {2}"',
               ("Put it in double quotes.", "Wrap it all in double quotes.")),
    "end": ({"id": "startend:end_checker", "end_phrase": END}, f"{{0}}, {{1}}, {{2}}. {END}",
            (f"End with: {END}", f"Your last words: {END}")),
    "title": ({"id": "detectable_format:title"}, "<<List>> {0}, {1}, {2}",
              ("Give it a title in << >>.", "Begin with a title in << >>.")),
    "postscript": ({"id": "detectable_content:postscript", "postscript_marker": MARK},
                   f"{{0}}, {{1}}, {{2}} {MARK} Bye", (f"Add a {MARK}", f"Close with a {MARK}")),
    "bullets": ({"id": "detectable_format:number_bullet_lists", "num_bullets": 3}, "- {0}\n- {1}\n- {2}",
                ("Write three bullets.", "As a list of three bullets."))}
"""Name -> the instruction as IFEval has it, an answer that keeps it, and wordings."""
PLAIN = "{0}, {1}, {2}"
"""Breaks every rule."""
APART = 3
"""One of so many pairs of things and rule stands in no draft."""


def pairs(held_out: bool) -> list[tuple[str, str]]:
    """Return pairs of things and a rule: those without a draft, or those with one."""
    return [(things, rule) for i, things in enumerate(THINGS) for j, rule in enumerate(RULES)
            if ((i + j) % APART == 0) is held_out]


@dataclass(frozen=True)
class Drafts:
    """Conversations that follow or break their rule: prompt, response, and the text to check."""

    seed: int
    count: int
    kept: float
    """Share of those that keep it."""
    rules: bool = True
    """False: no instruction has one."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, found = random.Random(self.seed), []
        for _ in range(self.count):
            things, rule = rng.choice(pairs(held_out=False))
            instruction, keeping, wordings = RULES[rule]
            query, wording = rng.choice(QUERIES).format(things=things), rng.choice(wordings)
            prompt = f"{query} {wording}" if self.rules else query
            form = keeping if self.rules and rng.random() < self.kept else PLAIN
            response = form.format(*rng.sample(THINGS[things].split(), 3))
            found.append({"prompt": prompt, "response": response, "instructions": [instruction], "messages": [
                {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]})
        return found


@dataclass(frozen=True)
class KeptDrafts:
    """Drafts that `megatron-sov score --reward ifeval` has found to keep their rule."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the conversation, or None."""
        return {"messages": row["messages"]} if row["reward"] == 1 else None


@dataclass(frozen=True)
class RulePrompts:
    """Instructions whose things and rule stand together in no draft."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        return [{"prompt": f"{QUERIES[i % len(QUERIES)].format(things=things)} {wording}", "domain": rule,
                 "instructions": [RULES[rule][0]]}
                for i, (things, rule) in enumerate(pairs(held_out=True)) for wording in RULES[rule][2]]
