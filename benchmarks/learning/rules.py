"""Instructions with a rule that IFEval checks, and drafts of which a share follows the rule:
`rules.py:Drafts`, `:PassedDrafts`, `:RulePrompts`."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import THINGS, RandomRows, build_chat

PLURALS = {"fruits": "fruit", "colours": "colour", "animals": "animal", "cities": "city", "tools": "tool",
           "metals": "metal"}
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
"""Name -> instruction of IFEval, form of an answer that follows it, wordings."""
PLAIN = "{0}, {1}, {2}"
"""Form of an answer that follows no rule."""
HELD_OUT_OF = 3
"""One in three pairs of things and a rule is held out: it occurs in no draft."""


def list_pairs(held_out: bool) -> list[tuple[str, str]]:
    """Return the held-out pairs of things and a rule, or the others."""
    return [(things, rule) for i, things in enumerate(PLURALS) for j, rule in enumerate(RULES)
            if ((i + j) % HELD_OUT_OF == 0) is held_out]


@dataclass(frozen=True)
class Drafts(RandomRows):
    """Conversations whose answer follows or breaks the rule of the prompt, with the fields that `ifeval`
    scores."""

    follow_share: float
    """Share of answers that follow the rule."""
    rules: bool = True
    """False: prompts without a rule."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, drafts = random.Random(self.seed), []
        for _ in range(self.count):
            things, rule = rng.choice(list_pairs(held_out=False))
            instruction, following, wordings = RULES[rule]
            query, wording = rng.choice(QUERIES).format(things=things), rng.choice(wordings)
            prompt = f"{query} {wording}" if self.rules else query
            form = following if self.rules and rng.random() < self.follow_share else PLAIN
            response = form.format(*rng.sample(THINGS[PLURALS[things]].split(), 3))
            drafts.append({"prompt": prompt, "response": response, "instructions": [instruction],
                           **build_chat(prompt, response)})
        return drafts


@dataclass(frozen=True)
class PassedDrafts:
    """Conversations of drafts with the reward 1 from `megatron-sov score --reward ifeval`."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"messages": row["messages"]} if row["reward"] == 1 else None


@dataclass(frozen=True)
class RulePrompts:
    """Prompts of the held-out pairs of things and a rule."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"prompt": f"{QUERIES[i % len(QUERIES)].format(things=things)} {wording}", "domain": rule,
                 "instructions": [RULES[rule][0]]}
                for i, (things, rule) in enumerate(list_pairs(held_out=True)) for wording in RULES[rule][2]]
