"""Held-out texts by name, one for each language or domain; of a large one,
parts spread evenly over its files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_sov.documents import Document, Reading, cut_text, list_files, plan_units, read_span
from megatron_sov.errors import UserError

CHUNK_BYTES = 100_000
"""Longer documents are cut at blank lines, so that one of them does not hold up all others."""
UNIT_BYTES = 1 << 20
DEFAULT_MB = 10.0
"""Most text of each name that is read, in MB."""
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Thai, Lao, Burmese, Khmer, kana, Han."""


@dataclass(frozen=True)
class NamedText:
    """Text of one language or domain."""

    name: str
    path: str
    chunks: list[str]
    """Documents, long ones in pieces."""
    whole: bool
    """Whether this is all the text there is at the path."""

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes."""
        return sum(len(chunk.encode()) for chunk in self.chunks)

    @cached_property
    def num_chars(self) -> int:
        """Unicode scalar values."""
        return sum(map(len, self.chunks))

    @cached_property
    def num_words(self) -> int:
        """Runs of characters between white space."""
        return sum(len(chunk.split()) for chunk in self.chunks)

    @cached_property
    def has_words(self) -> bool:
        """Whether spaces part words: at most half of the letters belong to scripts without them."""
        without = sum(len(_WITHOUT_SPACES.findall(chunk)) for chunk in self.chunks)
        return 2 * without <= sum(c.isalpha() for chunk in self.chunks for c in chunk)

    def part(self, num_bytes: int) -> list[str]:
        """Return chunks from all over the text, of about so many bytes together, at least one."""
        step = max(1, round(self.num_bytes / num_bytes))
        return self.chunks[::step]


def read_texts(arguments: Sequence[str], max_mb: float) -> list[NamedText]:
    """Read the texts of `--text [NAME=]PATH ...`.

    Raises:
        UserError: a name stands twice, a path is missing, or a file is no text or holds none.
    """
    texts: list[NamedText] = []
    for argument in arguments:
        name, path = parse_text(argument)
        if name in (text.name for text in texts):
            raise UserError(f"--text {argument!r}: the name {name!r} is taken by another text; name it, "
                            f"e.g. other={path}")
        texts.append(read_text(name, path, round(1e6 * max_mb)))
    return texts


def parse_text(argument: str) -> tuple[str, Path]:
    """Split `[NAME=]PATH`; without a name, the file's or folder's own is taken.

    Raises:
        UserError: the name or the path is empty.
    """
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return Path(argument).name.partition(".")[0] or argument, Path(argument)
    if not name or not path:
        raise UserError(f"--text {argument!r}: must be a path or NAME=PATH, e.g. korean=heldout/ko.jsonl")
    return name, Path(path)


def read_text(name: str, path: Path, max_bytes: int) -> NamedText:
    """Read text at a path, at most about `max_bytes`.

    Raises:
        UserError: the path is missing, or a file is no text or holds none.
    """
    units = list(plan_units(list_files(path, print), UNIT_BYTES))
    on_disk = sum(span.size_bytes for unit in units for span in unit)
    step = max(1, round(on_disk / max_bytes))
    chunks: list[str] = []
    left = max_bytes
    whole = step == 1
    for unit in units[::step]:
        for chunk in _chunks(unit):
            chunks.append(chunk)
            left -= len(chunk.encode())
            if left <= 0:
                return NamedText(name, str(path), chunks, False)
    if not chunks:
        raise UserError(f"--text {path}: holds no text; pass files with text in them")
    return NamedText(name, str(path), chunks, whole)


def _chunks(unit: tuple) -> Iterator[str]:
    """Yield the text of some spans.

    Raises:
        UserError: a record is damaged.
    """
    for span in unit:
        for item in read_span(span, Reading()):
            if isinstance(item, Document):
                for text in item.texts():
                    yield from cut_text(text, CHUNK_BYTES)
            elif item.code != "empty":
                raise UserError(f"{span.file}: {item.reason}")
