"""The one seam to models that read more than tokens.

The core carries `EncoderInputs` beside the tokens of a row: it joins, slices and hashes them, and never looks
into a record.  What a picture or a sound is, is behind `Modality`, which the part `omni` implements and
`modality` finds.  Data, training, conversion and generation of text never load it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_sov.chat.encode import InlineTokens
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, VisionEncoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PICTURES, SOUNDS = "pictures", "sounds"
"""Kinds of records; a bank has records of one kind."""
ENCODERS = {PICTURES: "vision", SOUNDS: "audio"}
"""Kind -> the part of a model's settings that describes the encoder of its records."""


# What a row of tokens has for encoders.


@dataclass(frozen=True)
class EncoderInput:
    """The records of one kind in a row of tokens, on the host, and where their features go."""

    places: np.ndarray
    """[k] int64, ascending: row index of each placeholder."""
    features: np.ndarray
    """[k] int64: which feature replaces its embedding, as record * slots + slot."""
    records: tuple[np.ndarray, ...]
    """Raw pictures or spectrograms, those of the row alone: views of mapped banks, which are read by the
    process that encodes them and by no other."""
    slots: int
    """Features of a record."""


EncoderInputs = Mapping[str, EncoderInput]
"""Kind -> what a row has of it; a kind of which it has nothing is left out."""


def take_records(places: np.ndarray, numbers: np.ndarray, records: Sequence[np.ndarray] | np.ndarray,
                 slots: int) -> EncoderInput:
    """Return a row's input, with those records of a bank that its placeholders name.

    Args:
        places: [k] of the placeholders, ascending.
        numbers: [k] of their features in the bank.
        records: the bank.
        slots: features of a record.
    """
    rows, index = np.unique(numbers // slots, return_inverse=True)
    return EncoderInput(places.astype(np.int64), index * slots + numbers % slots,
                        tuple(records[row] for row in rows.tolist()), slots)


def select_placeholders(part: EncoderInput, which: np.ndarray, places: np.ndarray) -> EncoderInput:
    """Return some of the placeholders with new places, and the records that they need."""
    return take_records(places, part.features[which], part.records, part.slots)


def join_inputs(parts: Iterable[tuple[int, EncoderInputs | None]]) -> dict[str, EncoderInput]:
    """Return the inputs of parts of a row: (row index of the part's first token, its inputs)."""
    by_kind: dict[str, list[tuple[int, EncoderInput]]] = {}
    for first, inputs in parts:
        for kind, part in (inputs or {}).items():
            by_kind.setdefault(kind, []).append((first, part))
    return {kind: _join(found) for kind, found in by_kind.items()}


def _join(parts: list[tuple[int, EncoderInput]]) -> EncoderInput:
    if len(parts) == 1 and parts[0][0] == 0:
        return parts[0][1]
    starts = np.cumsum([0, *(len(part.records) for _, part in parts[:-1])])
    return EncoderInput(np.concatenate([part.places + first for first, part in parts]),
                        np.concatenate([part.features + start * part.slots
                                        for (_, part), start in zip(parts, starts, strict=True)]),
                        tuple(record for _, part in parts for record in part.records), parts[0][1].slots)


def slice_inputs(inputs: EncoderInputs | None, start: int, count: int) -> dict[str, EncoderInput]:
    """Return the inputs of `count` tokens from `start` on, placed from the first of them."""
    found = {}
    for kind, part in (inputs or {}).items():
        inside = (part.places >= start) & (part.places < start + count)
        if inside.any():
            found[kind] = select_placeholders(part, inside, part.places[inside] - start)
    return found


def hash_inputs(inputs: EncoderInputs) -> bytes:
    """Return a hash of the records and of their places; the same only for the same."""
    digest = hashlib.blake2b()
    for kind, part in sorted(inputs.items()):
        digest.update(f"{kind} {part.slots} {len(part.places)} {len(part.records)}\n".encode())
        for values in (part.places, part.features, *part.records):
            digest.update(f"{values.dtype} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()


# What documents have for encoders.

Banks = Mapping[str, Any]
"""Kind -> what the records of a source's bank are, in the terms of the part that reads them."""
NO_BANKS: Banks = {}


def banks_of(documents: Any) -> Banks:
    """Return the banks of documents; those that are made on the fly may know nothing of banks."""
    found: Banks = getattr(documents, "banks", NO_BANKS)
    return found


def inputs_of(documents: Any, document: int, start: int, count: int) -> EncoderInputs:
    """Return what some tokens have for encoders, placed from the first of them."""
    if not banks_of(documents):
        return {}
    found: EncoderInputs = documents.encoder_inputs(document, start, count)
    return found


def read_banks(record: Any, where: str) -> Banks:
    """Return the banks that a source's record in a manifest describes.

    Args:
        record: what the manifest says of them; None: there are none.
        where: names the source in a message.

    Raises:
        UserError: it is no such record, or the part that reads banks is not installed.
    """
    return NO_BANKS if record is None else modality().read_banks(record, where)


def check_encoders(model: ModelConfig, sources: Sequence[Any]) -> None:
    """Check that a model can read the pictures and sounds of its data.

    Raises:
        UserError: it has no encoder of such records, or one of others; all of them at once.
    """
    if banks := {source.name: source.banks for source in sources if source.banks}:
        modality().check_banks(model, banks)


# The seam.


class BankReader(Protocol):
    """The banks of one token shard, open."""

    def inputs(self, tokens: np.ndarray, features: np.ndarray, where: str) -> EncoderInputs:
        """Return what a stretch of the shard has for encoders, placed from its first token.

        Args:
            tokens: its ids.
            features: what the shard's sidecar says of each (`shard_files.FEATURES`).
            where: names the document in a message.

        Raises:
            UserError: a placeholder names no feature, or one that the bank does not have.
        """
        ...


Rows = Mapping[str, Sequence[tuple[int, int]]]
"""Kind -> row and used slots of each of a document's records, in the order of the placeholders."""


@dataclass(frozen=True)
class MediaEncoding:
    """What ids of documents with pictures and sounds depend on besides the tokenizer."""

    slots: tuple[tuple[str, int], ...] = ()
    """Kind and features of its records."""


class FeatureTokens(InlineTokens, Protocol):
    """The tokens of pictures and sounds of a tokenizer, some of which are placeholders of features."""

    def placeholder_ids(self, kind: str) -> tuple[int, ...]:
        """Return the tokens that a feature of a kind of record replaces."""
        ...

    def refuse_lost(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Refuse a document whose tokens are not all among its ids.

        Raises:
            BadRecord: some are not.
        """
        ...

    def numbers(self, ids: Sequence[int], rows: Rows) -> np.ndarray:
        """Return the sidecar of a document's tokens (`shard_files.FEATURES`).

        Raises:
            BadRecord: placeholders and features are not as many.
        """
        ...


class Modality(Protocol):
    """What the core asks of the part that knows pictures and sounds."""

    def read_banks(self, record: Any, where: str) -> Banks:
        """Return the banks that a manifest's record describes.

        Raises:
            UserError: it is no such record; `where` names it.
        """
        ...

    def open_banks(self, prefix: Path, banks: Banks) -> BankReader:
        """Open the banks of a token shard, whose files lie at `prefix`.

        Raises:
            UserError: a file is damaged or missing.
        """
        ...

    def check_banks(self, model: ModelConfig, banks: Mapping[str, Banks]) -> None:
        """Check that a model can read the banks of sources, by name.

        Raises:
            UserError: it has no encoder of such records, or one of others; all of them at once.
        """
        ...

    def encoder(self, config: VisionEncoderConfig | AudioEncoderConfig, hidden_size: int) -> Any:
        """Return an `nn.Module` from raw records to features [records, slots, hidden_size]; of None, the
        features of nothing.  Its `trains` tells whether anything of it learns."""
        ...

    def feature_tokens(self, tokenizer: Tokenizer, encoding: MediaEncoding) -> FeatureTokens:
        """Return the tokens of pictures and sounds that a tokenizer has."""
        ...

    def processor_files(self, model: ModelConfig, tokenizer: Path,
                        data: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return file -> content of what goes beside a model's weights in a Hugging Face folder.

        Args:
            model: the architecture.
            tokenizer: its folder.
            data: folders of the token shards that the model has learned from.

        Raises:
            UserError: the tokenizer cannot be read.
        """
        ...


PROVIDER = "megatron_sov.omni.modality"


@cache
def modality() -> Modality:
    """Return the part that knows pictures and sounds."""
    found: Modality = import_module(PROVIDER).Omni()
    return found
