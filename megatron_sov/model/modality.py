"""Interface between text training and multimodal code (`megatron_sov.omni`).

Data, training, conversion and generation pass `EncoderInputs` along with token rows: they join, slice and
hash inputs without reading records. Images and audio are decoded by an implementation of `Modality`, which
`load_modality` imports on demand.
"""

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
"""Kinds of records; a bank holds a single kind."""
ENCODERS = {PICTURES: "vision", SOUNDS: "audio"}
"""Record kind -> encoder field in `ModelConfig`."""
Banks = Mapping[str, Any]
"""Kind -> description of a source's media bank, as defined by the `Modality` implementation."""
NO_BANKS: Banks = {}
Rows = Mapping[str, Sequence[tuple[int, int]]]
"""Kind -> (bank row, used slots) of a document's records, in placeholder order."""
PROVIDER = "megatron_sov.omni.modality"


@dataclass(frozen=True)
class EncoderInput:
    """Records of one kind in a token row, in host memory, and the placeholders their features replace."""

    places: np.ndarray
    """[k] int64, ascending: row index of each placeholder."""
    features: np.ndarray
    """[k] int64: feature for each placeholder, as record * slots + slot."""
    records: tuple[np.ndarray, ...]
    """Raw images or spectrograms of this row: views of memory-mapped banks, read only by the process that
    encodes them."""
    slots: int
    """Features per record."""


EncoderInputs = Mapping[str, EncoderInput]
"""Kind -> input; kinds without records are left out."""


def take_records(places: np.ndarray, feature_numbers: np.ndarray, records: Sequence[np.ndarray] | np.ndarray,
                 slots: int) -> EncoderInput:
    """Return a row's input with the records of a bank that its placeholders need.

    Args:
        places: [k] placeholder positions, ascending.
        feature_numbers: [k] feature numbers in the bank.
        records: the bank.
        slots: features per record.
    """
    rows, index = np.unique(feature_numbers // slots, return_inverse=True)
    return EncoderInput(places.astype(np.int64), index * slots + feature_numbers % slots,
                        tuple(records[row] for row in rows.tolist()), slots)


def select_placeholders(encoder_input: EncoderInput, mask: np.ndarray, places: np.ndarray) -> EncoderInput:
    """Return selected placeholders at new positions, with the records they need."""
    return take_records(places, encoder_input.features[mask], encoder_input.records, encoder_input.slots)


def join_inputs(parts: Iterable[tuple[int, EncoderInputs | None]]) -> dict[str, EncoderInput]:
    """Join the inputs for parts in a row, given as (row index of the part's first token, inputs)."""
    by_kind: dict[str, list[tuple[int, EncoderInput]]] = {}
    for first, inputs in parts:
        for kind, encoder_input in (inputs or {}).items():
            by_kind.setdefault(kind, []).append((first, encoder_input))
    return {kind: _join_kind(kind_parts) for kind, kind_parts in by_kind.items()}


def _join_kind(parts: list[tuple[int, EncoderInput]]) -> EncoderInput:
    if len(parts) == 1 and parts[0][0] == 0:
        return parts[0][1]
    starts = np.cumsum([0, *(len(encoder_input.records) for _, encoder_input in parts[:-1])])
    return EncoderInput(np.concatenate([encoder_input.places + first for first, encoder_input in parts]),
                        np.concatenate([encoder_input.features + start * encoder_input.slots
                                        for (_, encoder_input), start in zip(parts, starts, strict=True)]),
                        tuple(record for _, encoder_input in parts for record in encoder_input.records),
                        parts[0][1].slots)


def slice_inputs(inputs: EncoderInputs | None, start: int, count: int) -> dict[str, EncoderInput]:
    """Return the inputs for `count` tokens from `start`, with positions relative to `start`."""
    sliced = {}
    for kind, encoder_input in (inputs or {}).items():
        is_inside = (encoder_input.places >= start) & (encoder_input.places < start + count)
        if is_inside.any():
            sliced[kind] = select_placeholders(encoder_input, is_inside,
                                               encoder_input.places[is_inside] - start)
    return sliced


def hash_inputs(inputs: EncoderInputs) -> bytes:
    digest = hashlib.blake2b()
    for kind, encoder_input in sorted(inputs.items()):
        digest.update(f"{kind} {encoder_input.slots} {len(encoder_input.places)} "
                      f"{len(encoder_input.records)}\n".encode())
        for values in (encoder_input.places, encoder_input.features, *encoder_input.records):
            digest.update(f"{values.dtype} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.digest()


def get_banks(documents: Any) -> Banks:
    """Return the banks of documents; {} for documents without the attribute."""
    banks: Banks = getattr(documents, "banks", NO_BANKS)
    return banks


def get_encoder_inputs(documents: Any, document: int, start: int, count: int) -> EncoderInputs:
    """Return the encoder inputs for `count` tokens in a document, with positions relative to `start`."""
    if not get_banks(documents):
        return {}
    inputs: EncoderInputs = documents.encoder_inputs(document, start, count)
    return inputs


def read_banks(record: Any, where: str) -> Banks:
    """Return the banks described by a source's record in a manifest.

    Args:
        record: the record; None: no banks.
        where: name of the source for error messages.

    Raises:
        UserError: the record is malformed, or the code that reads banks is not installed.
    """
    return NO_BANKS if record is None else load_modality().read_banks(record, where)


def check_encoders(model: ModelConfig, sources: Sequence[Any]) -> None:
    """Check that a model has encoders for the images and audio of its data. Raises `UserError`: encoders are
    missing or do not fit; the message names all sources."""
    if banks := {source.name: source.banks for source in sources if source.banks}:
        load_modality().check_banks(model, banks)


class BankReader(Protocol):
    """Open media banks of a token shard."""

    def inputs(self, tokens: np.ndarray, features: np.ndarray, where: str) -> EncoderInputs:
        """Return the encoder inputs for a range of the shard, with positions relative to its first token.

        Args:
            tokens: token ids.
            features: the range of the shard's sidecar file (`shard_files.FEATURES`).
            where: name of the document for error messages.

        Raises:
            UserError: a placeholder has no feature, or a feature that the bank does not have.
        """


@dataclass(frozen=True)
class MediaEncoding:
    """Settings, besides the tokenizer, that determine the token ids of multimodal documents."""

    slots: tuple[tuple[str, int], ...] = ()
    """(kind, features per record)."""


class FeatureTokens(InlineTokens, Protocol):
    """Image and audio tokens of a tokenizer; some are placeholders for features."""

    def placeholder_ids(self, kind: str) -> tuple[int, ...]:
        """Return the token ids that features of a kind replace."""

    def refuse_lost(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Reject a document whose encoding lost media tokens. Raises `BadRecord`: tokens are missing."""

    def numbers(self, ids: Sequence[int], rows: Rows) -> np.ndarray:
        """Return the feature numbers of a document's tokens, for the sidecar file (`shard_files.FEATURES`).
        Raises `BadRecord`: the numbers of placeholders and features differ."""


class Modality(Protocol):
    """Multimodal operations that text code needs."""

    def read_banks(self, record: Any, where: str) -> Banks:
        """Return the banks described by a manifest record. Raises `UserError`: the record is malformed;
        `where` names it."""

    def open_banks(self, prefix: Path, banks: Banks) -> BankReader:
        """Open the banks of the token shard at `prefix`. Raises `UserError`: a file is damaged or missing."""

    def check_banks(self, model: ModelConfig, banks: Mapping[str, Banks]) -> None:
        """Check that a model has encoders for the banks of sources, by source name. Raises `UserError`:
        encoders are missing or do not fit; the message names all sources."""

    def encoder(self, config: VisionEncoderConfig | AudioEncoderConfig, hidden_size: int) -> Any:
        """Return an `nn.Module` from raw records to features [records, slots, hidden_size]; None gives no
        features. Its `trains` is true if any parameter is trained."""

    def feature_tokens(self, tokenizer: "Tokenizer", encoding: MediaEncoding) -> FeatureTokens:
        """Return the image and audio tokens of a tokenizer."""

    def processor_files(self, model: ModelConfig, tokenizer: Path,
                        data: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return file name -> content of the processor files in a Hugging Face folder.

        Args:
            model: architecture.
            tokenizer: tokenizer folder.
            data: token shard folders of the model's training data.

        Raises:
            UserError: the tokenizer cannot be read.
        """


@cache
def load_modality() -> Modality:
    """Import and return the implementation of `Modality`."""
    implementation: Modality = import_module(PROVIDER).OmniModality()
    return implementation
