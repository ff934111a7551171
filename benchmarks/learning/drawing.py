"""Names, wordings, conversations and fixed random numbers for the generators of this folder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NAMES = ("Mina", "Jun", "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kai",
         "Lea", "Max", "Noa")
THINGS = {"fruit": "apple banana cherry grape lemon mango peach plum",
          "colour": "amber black brown green indigo red violet white",
          "animal": "badger cat deer eagle fox goat heron lynx",
          "city": "Busan Cairo Dakar Hanoi Lima Oslo Perth Quito",
          "tool": "anvil bellows chisel drill file hammer saw wrench",
          "metal": "brass copper gold iron lead nickel silver tin"}


@dataclass(frozen=True)
class RandomRows:
    """Step of `megatron-sov map` that returns `count` random rows; the row that it gets is ignored."""

    seed: int
    count: int


def select_wordings(wordings: Sequence[str], part: str) -> Sequence[str]:
    """Return all wordings ("all"), the wordings of training ("learned"), or those of the evaluation
    ("held_out")."""
    return {"all": wordings, "learned": wordings[::2], "held_out": wordings[1::2]}[part]


def build_chat(question: str, answer: str) -> dict[str, Any]:
    """Return a conversation of one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def draw_fixed(text: str) -> float:
    """Map a text to a fixed number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
