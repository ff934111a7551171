"""A tokenizer that does what a test says: 256 bytes, longer tokens by greedy matching,
faults planted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tokenizer.formats.loaders import Opened


class Toy(Opened):
    """Takes the longest token at every place; special tokens stand behind all others and stay text."""

    library = "toy"

    def __init__(self, longer: tuple[bytes, ...], special: tuple[str, ...],
                 change: Callable[[str], str]) -> None:
        """Take the tokens.

        Args:
            longer: tokens of several bytes, from id 256 on.
            special: special tokens, behind them.
            change: what is done to text before it is encoded, and not told as normalization.
        """
        super().__init__(Path("toy"), Path("toy"))
        self.tokens = dict(enumerate([*(bytes([b]) for b in range(256)), *longer]))
        self.special = dict(enumerate(special, len(self.tokens)))
        self.added: dict[int, str] = {}
        self.change = change
        self._ids = {token: id_ for id_, token in self.tokens.items()}
        self._longest = max(map(len, self._ids))

    def encode(self, text: str) -> list[int]:
        raw, ids, at = self.change(text).encode(), [], 0
        while at < len(raw):
            size = next(n for n in range(self._longest, 0, -1) if raw[at:at + n] in self._ids)
            ids.append(self._ids[raw[at:at + size]])
            at += size
        return ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_special(self, text: str) -> list[int]:
        for id_, token in self.special.items():
            if token in text:
                before, _, after = text.partition(token)
                return [*self.encode_special(before), id_, *self.encode_special(after)]
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", errors="replace")


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Return `toy(*longer, special=(), change=same)`, which makes one."""

    def made(*longer: str | bytes, special: tuple[str, ...] = (),
             change: Callable[[str], str] = lambda t: t) -> Toy:
        return Toy(tuple(t.encode() if isinstance(t, str) else t for t in longer), special, change)

    return made
