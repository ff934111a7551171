"""Which features of which pictures and sounds stand at which places of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PlacedMedia:
    """The media of one kind in a row of tokens, on the host."""

    places: np.ndarray
    """[k] int64, ascending: row index of each placeholder."""
    features: np.ndarray
    """[k] int64: what stands over it, as record * slots + slot."""
    records: tuple[np.ndarray, ...]
    """Raw pictures or spectrograms, those of the row alone: views of mapped banks, which are read by the
    process that encodes them and by no other."""
    slots: int
    """Features of a record."""


Media = Mapping[str, PlacedMedia]
"""Kind of bank (`media.banks.KINDS`) -> what of it a row has; a kind of which it has nothing is left out."""


def place_media(places: np.ndarray, numbers: np.ndarray, records: Sequence[np.ndarray] | np.ndarray,
           slots: int) -> PlacedMedia:
    """Return the media of a row.

    Args:
        places: [k] of the placeholders, ascending.
        numbers: [k] of their features in the bank.
        records: the bank.
        slots: features of a record.
    """
    rows, index = np.unique(numbers // slots, return_inverse=True)
    return PlacedMedia(places.astype(np.int64), index * slots + numbers % slots,
                       tuple(records[row] for row in rows.tolist()), slots)


def joined(parts: Iterable[tuple[int, Media | None]]) -> dict[str, PlacedMedia]:
    """Return the media of parts of a row: (row index of the part's first token, its media)."""
    by_kind: dict[str, list[tuple[int, PlacedMedia]]] = {}
    for first, media in parts:
        for kind, part in (media or {}).items():
            by_kind.setdefault(kind, []).append((first, part))
    return {kind: _joined(found) for kind, found in by_kind.items()}


def _joined(parts: list[tuple[int, PlacedMedia]]) -> PlacedMedia:
    if len(parts) == 1 and parts[0][0] == 0:
        return parts[0][1]
    starts = np.cumsum([0, *(len(part.records) for _, part in parts[:-1])])
    return PlacedMedia(np.concatenate([part.places + first for first, part in parts]),
                       np.concatenate([part.features + start * part.slots
                                       for (_, part), start in zip(parts, starts, strict=True)]),
                       tuple(record for _, part in parts for record in part.records), parts[0][1].slots)


def cut(media: Media | None, start: int, count: int) -> dict[str, PlacedMedia]:
    """Return the media of `count` tokens from `start` on, placed from the first of them."""
    found = {}
    for kind, part in (media or {}).items():
        inside = (part.places >= start) & (part.places < start + count)
        if inside.any():
            found[kind] = chosen(part, inside, part.places[inside] - start)
    return found


def chosen(part: PlacedMedia, which: np.ndarray, places: np.ndarray) -> PlacedMedia:
    """Return some of the placeholders with new places, and the records that they need."""
    return place_media(places, part.features[which], part.records, part.slots)


def fingerprint(media: Media) -> bytes:
    """Return a hash of what stands where; the same only for the same."""
    digest = hashlib.blake2b()
    for kind, part in sorted(media.items()):
        digest.update(f"{kind} {part.slots} {len(part.places)} {len(part.records)}\n".encode())
        for values in (part.places, part.features, *part.records):
            digest.update(f"{values.dtype} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()
