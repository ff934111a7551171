"""The text that a tokenizer learns from: inputs, their weights, and chunks in a fixed order.

Weights change how often text is seen, never in which order: a chunk is passed on as often as the running total of bytes
asks (Bresenham's line over bytes), so the same input always gives the same chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_sov.documents import cut_text, list_files, read_documents
from megatron_sov.errors import UserError

CHUNK_BYTES = 20_000
SAMPLE_BYTES = 1_000_000
"""Text of each input on which bytes per token are measured, at most."""


@dataclasses.dataclass(frozen=True)
class TextInput:
    """One `--input`: where its text lies and how much of the whole it shall be."""

    path: Path
    """File or folder."""
    weight: float | None = None
    """Share relative to the other weighted inputs; None: as it is."""


def parse_input(argument: str) -> TextInput:
    """Read `PATH[:weight]`.

    Raises:
        UserError: the weight is not a positive number.
    """
    head, colon, tail = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return TextInput(Path(argument))
    try:
        weight = float(tail)
    except ValueError:
        return TextInput(Path(argument))
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"--input {argument!r}: weight {tail} must be a positive number, e.g. {head}:2")
    return TextInput(Path(head), weight)


def chunks(source: TextInput) -> Iterator[str]:
    """Yield an input's text in chunks of at most `CHUNK_BYTES`, cut at blank lines.

    Raises:
        UserError: as `read_documents`.
    """
    for document in read_documents(list_files(source.path)):
        for text in document.texts():
            yield from cut_text(text, CHUNK_BYTES)


def count_bytes(source: TextInput) -> int:
    """Return the UTF-8 bytes of an input's text.

    Raises:
        UserError: there is none.
    """
    total = sum(len(text.encode()) for document in read_documents(list_files(source.path)) for text in document.texts())
    if not total:
        raise UserError(f"{source.path}: holds no text; pass files with text in them")
    return total


def repeats(sources: list[TextInput], num_bytes: list[int]) -> list[float]:
    """Return how often each input's text is seen, from the weights and the inputs' bytes.

    Inputs without a weight are seen once.  The weighted ones share their own total of bytes in proportion to their weights,
    so the amount of text stays the same.
    """
    weighted = [(s.weight, n) for s, n in zip(sources, num_bytes, strict=True) if s.weight is not None]
    total_weight, total_bytes = sum(w for w, _ in weighted), sum(n for _, n in weighted)
    return [1.0 if s.weight is None else total_bytes * (s.weight / total_weight) / n
            for s, n in zip(sources, num_bytes, strict=True)]


def resampled(texts: Iterator[str], factor: float) -> Iterator[str]:
    """Yield each text 0, 1 or more times so that bytes out stay nearest to `factor` times bytes in, all along the way."""
    bytes_in = bytes_out = 0
    for text in texts:
        size_bytes = len(text.encode())
        bytes_in += size_bytes
        while bytes_out + size_bytes / 2 <= factor * bytes_in:
            bytes_out += size_bytes
            yield text


def training_text(sources: list[TextInput], factors: list[float], progress: Callable[[int], object]) -> Iterator[str]:
    """Yield all chunks to train on, input after input; `progress` is told the bytes of each."""
    for source, factor in zip(sources, factors, strict=True):
        for text in resampled(chunks(source), factor):
            progress(len(text.encode()))
            yield text


def sample(source: TextInput, num_bytes: int) -> list[str]:
    """Return chunks spread evenly over an input, about `SAMPLE_BYTES` of text."""
    return list(resampled(chunks(source), min(1.0, SAMPLE_BYTES / num_bytes))) or [next(chunks(source))]
