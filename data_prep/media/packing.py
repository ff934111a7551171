"""Pack media corpora with `sov-data pack`: a shard gets banks with the records that its documents name."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.files import MEDIA_CORPUS, find_media_corpus
from megatron_sov.base.documents.shard_files import FEATURE_DTYPE, FEATURES, NO_FEATURE
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import MEDIA, read_blocks
from megatron_sov.model.modality import FeatureTokens, MediaEncoding
from megatron_sov.omni.media.banks import BankShape, open_bank, read_bank_shapes


@dataclass(frozen=True)
class SourceBanks:
    folder: Path
    """Media corpus."""
    shapes: Mapping[str, BankShape]
    """Bank kind -> shape."""

    def to_record(self) -> dict[str, Any]:
        """Return the manifest record."""
        return {kind: shape.to_record() for kind, shape in self.shapes.items()}

    def open_shard(self, prefix: Path) -> "ShardBanks":
        return ShardBanks(self, prefix)


class ShardBanks:
    """Banks of a shard under construction; each record is written once."""

    def __init__(self, source: SourceBanks, prefix: Path) -> None:
        self._shapes = source.shapes
        self._records = {kind: open_bank(source.folder / f"{kind}.bin", shape)
                         for kind, shape in source.shapes.items()}
        self._files: dict[str, IO[bytes]] = {
            kind: open(f"{prefix}.{kind}", "wb") for kind in source.shapes}  # noqa: SIM115  (closed in close)
        self._rows: dict[str, dict[int, int]] = {kind: {} for kind in source.shapes}

    def renumber_features(self, ids: NDArray[np.generic], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the shard's `FEATURES` sidecar, and append new records to the shard's banks. `ids`:
        [tokens]; `numbers`: int64 [tokens], the source's sidecar (row * slots + slot). Raises `UserError`: a
        record missing in the source's bank."""
        renumbered = numbers.copy()
        for kind, shape in self._shapes.items():
            # a shard numbers rows from 0
            places = np.flatnonzero(np.isin(ids, shape.placeholder_ids) & (numbers >= 0))
            rows, slots = np.divmod(numbers[places], shape.slots)
            records, shard_rows = self._records[kind], self._rows[kind]
            for row in dict.fromkeys(rows.tolist()):
                if row in shard_rows:
                    continue
                if row >= len(records):
                    raise UserError(f"{kind}: a document names record {row} of {len(records)}; encode the "
                                    "media again")
                shard_rows[row] = len(shard_rows)
                self._files[kind].write(records[row].tobytes())
            new_rows = np.array([shard_rows[row] for row in rows.tolist()], np.int64)
            renumbered[places] = new_rows * shape.slots + slots
        return renumbered

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class MediaCorpora:
    """Media corpora packed together."""

    def __init__(self, sources: Mapping[str, Path], kind: str | None) -> None:
        """Open media corpora; `sources`: name -> path. Raises `UserError`: a path inside or outside a media
        corpus, or corpora with another format than `kind` or with different slots."""
        self._folders = {name: folder for name, path in sources.items()
                         if (folder := find_media_corpus(path)) is not None}
        for name, folder in self._folders.items():
            if sources[name].is_file():
                raise UserError(f"--input {sources[name]}: belongs to the media corpus {folder}, and its "
                                "media would be lost; pass the folder")
            if (format_ := read_manifest(folder, MEDIA_CORPUS).content["format"]) != kind:
                raise UserError(f"--input {folder}: holds media in records of format {format_}; pack it with "
                                f"--format {format_}")
        if len(self._folders) < len(sources):
            other = next(path for name, path in sources.items() if name not in self._folders)
            raise UserError(f"--input {other}: is no media corpus, and {next(iter(self._folders.values()))} "
                            "is one; pack each on its own (training takes several --data, and `sov-data mix` "
                            "joins them)")
        self.encoding = _merge_slots(self.folders)

    @property
    def folders(self) -> list[Path]:
        """Corpus folders in the order of `sources`."""
        return list(self._folders.values())

    def check_tokenizer(self, tokenizer: Path) -> None:
        """Raise `UserError` if the tokenizer lacks media tokens for a corpus's codebooks."""
        blocks = read_blocks(read_manifest(tokenizer).content.get(MEDIA), str(tokenizer))
        for folder in self.folders:
            for kind, codec in read_manifest(folder, MEDIA_CORPUS).content["codecs"].items():
                size = blocks[kind].size if kind in blocks else 0
                if (needed := codec["codebook_size"] or 0) > size:
                    raise UserError(f"--tokenizer {tokenizer}: has {size} tokens of {kind}, and {folder} was "
                                    f"encoded with a codebook of {needed}; make one with `sov-tokenizer "
                                    f"media {tokenizer} --{kind}-tokens {needed} ...`")
        if not blocks:
            raise UserError(f"--tokenizer {tokenizer}: has no tokens of media; make one with `sov-tokenizer "
                            "media`")

    def get_banks(self, source: str, tokens: FeatureTokens) -> SourceBanks:
        """Return a source's banks with the tokenizer's placeholders."""
        folder = self._folders[source]
        return SourceBanks(folder, {kind: replace(shape, placeholder_ids=tokens.placeholder_ids(kind))
                                    for kind, shape in _read_shapes(folder).items()})


def _merge_slots(folders: Iterable[Path]) -> MediaEncoding:
    slots: dict[str, int] = {}
    for folder in folders:
        for kind, shape in _read_shapes(folder).items():
            # slots per record determine the number of placeholders
            if slots.setdefault(kind, shape.slots) != shape.slots:
                raise UserError(f"--input {folder}: has {shape.slots} slots of {kind}, another one "
                                f"{slots[kind]}; pack each on its own")
    return MediaEncoding(tuple(sorted(slots.items())))


def _read_shapes(folder: Path) -> dict[str, BankShape]:
    return read_bank_shapes(read_manifest(folder, MEDIA_CORPUS).content.get(FEATURES), str(folder))


def find_media_problems(prefix: Path, source: dict[str, Any], tokens: NDArray[np.generic]) -> Iterator[str]:
    """Yield problems in the banks and `FEATURES` sidecar of the shard `PREFIX`. `source`: manifest record;
    `tokens`: [tokens] ids."""
    file = Path(f"{prefix}.{FEATURES}")
    try:
        shapes = read_bank_shapes(source.get(FEATURES), f"source {source['name']!r}")
        num_rows = {kind: len(open_bank(Path(f"{prefix}.{kind}"), shape)) for kind, shape in shapes.items()}
    except UserError as e:
        yield str(e)
        return
    if not file.is_file():
        return  # reported with the hashes
    numbers = np.fromfile(file, np.dtype(FEATURE_DTYPE).newbyteorder("<"))
    if len(numbers) != len(tokens):
        yield f"{file}: has {len(numbers)} numbers, and the shard {len(tokens)} tokens"
        return
    is_placeholder = np.zeros(len(tokens), bool)
    for kind, shape in shapes.items():
        is_kind = np.isin(tokens, shape.placeholder_ids)
        is_placeholder |= is_kind
        is_outside = (numbers < 0) | (numbers >= num_rows[kind] * shape.slots)
        if num_wrong := int(is_outside[is_kind].sum()):
            yield (f"{file}: {num_wrong} placeholders of {kind} name none of its {num_rows[kind]} records")
    if num_wrong := int((numbers[~is_placeholder] != NO_FEATURE).sum()):
        yield f"{file}: {num_wrong} tokens that are no placeholders name a record"
