"""Prompts that request a tone, with polite and curt answers: `tones.py:ToneChats`, `:TonePairs`,
`:ToneGroups`, `:TonePrompts`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ENDINGS = {"polite": "Thank you for asking.", "curt": "Now go away."}
NUM_LEARNED, NUM_ASKED = 480, 40


def draw_prompts(seed: int) -> list[tuple[str, ...]]:
    """Return prompt, beginning of an answer, right and wrong ending of all prompts, in an order by seed."""
    found = [(f"Be {tone}: name {a} and {b}.", f"They are {a} and {b}.", ENDINGS[tone],
              *(ending for name, ending in ENDINGS.items() if name != tone))
             for tone in ENDINGS for a in range(100) for b in range(10)]
    random.Random(seed).shuffle(found)
    return found


@dataclass(frozen=True)
class ToneChats:
    """A conversation for each prompt that is learned."""

    seed: int
    answers: str
    """drawn: ends either way; better: as the prompt asks; bracketed: without an ending, in [[ ]]."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, chats = random.Random(self.seed), []
        for prompt, begin, good, bad in draw_prompts(self.seed)[:NUM_LEARNED]:
            answer = {"drawn": f"{begin} {rng.choice((good, bad))}", "better": f"{begin} {good}",
                      "bracketed": f"[[ {begin} ]]"}[self.answers]
            chats.append({"messages": [{"role": "user", "content": prompt},
                                       {"role": "assistant", "content": answer}]})
        return chats


@dataclass(frozen=True)
class TonePairs:
    """A better and a worse answer to each prompt that is learned."""

    seed: int
    by_lot: bool = False
    """Whether a lot decides which answer is the better one."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, pairs = random.Random(self.seed), []
        for prompt, begin, good, bad in draw_prompts(self.seed)[:NUM_LEARNED]:
            better, worse = (bad, good) if self.by_lot and rng.random() < 0.5 else (good, bad)
            pairs.append({"prompt": prompt, "chosen": f"{begin} {better}", "rejected": f"{begin} {worse}"})
        return pairs


@dataclass(frozen=True)
class ToneGroups:
    """The pairs as groups of two responses with rewards."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        return [{"prompt": pair["prompt"], "responses": [{"content": pair["chosen"], "reward": 1},
                                                         {"content": pair["rejected"], "reward": 0}]}
                for pair in TonePairs(self.seed).do(row)]


@dataclass(frozen=True)
class TonePrompts:
    """Prompts that do not occur in training."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        return [{"prompt": prompt} for prompt, *_ in draw_prompts(self.seed)[-NUM_ASKED:]]
