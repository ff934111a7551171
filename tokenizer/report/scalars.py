"""Every Unicode scalar value, encoded and decoded: side by side and, in planes with characters, behind a
letter and a space."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_sov.pages.page import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.check import Check

BLOCK = 2048
NUM_EXAMPLES = 20
END = 0x110000
EMPTY_PLANES = range(0x40000, 0xE0000)
"""No character of any writing stands there; they are tried side by side only."""
SEPARATORS = {"side by side": "", "behind a letter": "a", "behind a space": " "}


@dataclass
class Scalars:
    """What became of all of Unicode."""

    seen: NDArray[np.bool_]
    """Ids that came up, [vocab]."""
    num_tried: int = 0
    changed: list[int] = field(default_factory=list)
    """Code points that the normalizer writes in another, equivalent way (NFC)."""
    lost: list[int] = field(default_factory=list)
    """Code points that come back as other text, or not at all."""
    lost_blocks: list[str] = field(default_factory=list)
    """Blocks that do not come back although each of their characters does."""


def try_scalars(tokenizer: Opened, progress: Callable[[int], object], end: int = END) -> Scalars:
    """Encode and decode all 1,112,064 scalar values, or those below `end`;
    `progress` is told of each block."""
    found = Scalars(np.zeros(tokenizer.vocab_size, np.bool_))
    for codes in _blocks(end):
        found.num_tried += len(codes)
        names = list(SEPARATORS)[:1] if codes[0] in EMPTY_PLANES else list(SEPARATORS)
        texts = [SEPARATORS[name].join(map(chr, codes)) for name in names]
        encoded = tokenizer.encode_many(texts)
        for ids in encoded:
            found.seen[ids] = True
        same = [tokenizer.decode(ids) == text for text, ids in zip(texts, encoded, strict=True)]
        if not all(same):
            before = len(found.lost)
            _look_closer(tokenizer, codes, found)
            explained = len(found.lost) > before
            for name, text, ids in zip(names, texts, encoded, strict=True):
                if not explained and not _equivalent(tokenizer.decode(ids), text):
                    found.lost_blocks.append(f"U+{codes[0]:04X} to U+{codes[-1]:04X}, {name}")
        progress(1)
    return found


def _look_closer(tokenizer: Opened, codes: list[int], found: Scalars) -> None:
    """Try each character of a block on its own, between letters."""
    texts = [f"a{chr(code)}a" for code in codes]
    for code, text, ids in zip(codes, texts, tokenizer.encode_many(texts), strict=True):
        back = tokenizer.decode(ids)
        if back != text:
            (found.changed if _equivalent(back, text) else found.lost).append(code)


def _equivalent(a: str, b: str) -> bool:
    """Return whether two texts are canonically equivalent (Unicode Standard Annex 15)."""
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def num_blocks() -> int:
    """Return how often `try_scalars` tells of its progress."""
    return sum(1 for _ in _blocks(END))


def _blocks(end: int) -> Iterator[list[int]]:
    for start in range(0, end, BLOCK):
        if not 0xD800 <= start < 0xE000:
            yield list(range(start, min(start + BLOCK, end)))


def check_scalars(found: Scalars) -> Check:
    """Say whether all of Unicode survives."""
    bad = bool(found.lost or found.lost_blocks)
    summary = f"{found.num_tried:,} characters tried"
    if found.lost:
        summary += f", {len(found.lost):,} lost, the first U+{found.lost[0]:04X}"
    if found.lost_blocks:
        summary += f", {len(found.lost_blocks):,} blocks do not come back"
    if found.changed:
        summary += f", {len(found.changed):,} written in another, equivalent way (normalization)"
    if not bad and not found.changed:
        summary += ", all come back"
    numbers = {"num_tried": found.num_tried, "num_lost": len(found.lost),
               "lost": [f"U+{c:04X}" for c in found.lost[:1000]], "num_normalized": len(found.changed),
               "normalized": [f"U+{c:04X}" for c in found.changed[:NUM_EXAMPLES]],
               "lost_blocks": found.lost_blocks}
    rows = [[f"U+{c:04X}", unicodedata.name(chr(c), "–"), chr(c) if chr(c).isprintable() else "–"]
            for c in found.lost[:NUM_EXAMPLES]]
    tables = [Table(["lost", "name", "character"], rows)] if rows else []
    return Check("scalars", "All of Unicode", "bad" if bad else "note" if found.changed else "good", summary,
                 numbers, tables)
