"""What `sov-data pack` does with a media corpus: each shard gets banks of its own, which hold what its
documents name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.files import MEDIA_CORPUS, find_media_corpus
from megatron_sov.base.documents.shard_files import FEATURE_DTYPE, FEATURES, NO_FEATURE
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import MEDIA as BLOCKS, read_blocks
from megatron_sov.model.modality import FeatureTokens, MediaEncoding
from megatron_sov.omni.media.banks import BankShape, open_bank, read_bank_shapes


@dataclass(frozen=True)
class SourceBanks:
    """The banks that the documents of a source name."""

    folder: Path
    shapes: Mapping[str, BankShape]
    """Kind -> what its records are."""

    def record(self) -> dict[str, Any]:
        """Return what the manifest of token shards says of them."""
        return {kind: shape.to_record() for kind, shape in self.shapes.items()}

    def open_shard(self, prefix: Path) -> ShardBanks:
        """Begin the banks of a shard of the source."""
        return ShardBanks(self, prefix)


class ShardBanks:
    """The banks of one shard as they grow; each record once."""

    def __init__(self, source: SourceBanks, prefix: Path) -> None:
        self._shapes = source.shapes
        self._from = {kind: open_bank(source.folder / f"{kind}.bin", shape)
                      for kind, shape in source.shapes.items()}
        self._files: dict[str, IO[bytes]] = {
            kind: open(f"{prefix}.{kind}", "wb") for kind in source.shapes}  # noqa: SIM115  (closed in close)
        self._rows: dict[str, dict[int, int]] = {kind: {} for kind in source.shapes}

    def moved(self, ids: NDArray[np.generic], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what the sidecar says of tokens in this shard, with the records that are new appended.

        Args:
            ids: the tokens.
            numbers: what it says of them in the source.

        Raises:
            UserError: a record is not in the source's bank.
        """
        found = numbers.copy()
        for kind, shape in self._shapes.items():
            # A number of the sidecar is row * slots + slot; each shard numbers its rows from 0.
            places = np.flatnonzero(np.isin(ids, shape.placeholder_ids) & (numbers >= 0))
            rows, slots = np.divmod(numbers[places], shape.slots)
            known = self._rows[kind]
            for row in dict.fromkeys(rows.tolist()):
                if row not in known:
                    if row >= len(self._from[kind]):
                        raise UserError(f"{kind}: a document names record {row} of "
                                        f"{len(self._from[kind])}; encode the media again")
                    known[row] = len(known)
                    self._files[kind].write(self._from[kind][row].tobytes())
            found[places] = np.array([known[row] for row in rows.tolist()], np.int64) * shape.slots + slots
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class MediaCorpora:
    """The media corpora that are packed together."""

    def __init__(self, sources: Mapping[str, Path], kind: str | None) -> None:
        """Take them.

        Args:
            sources: name -> path of what is packed together, some of which are media corpora.
            kind: the format that was asked for.

        Raises:
            UserError: one is a part of a media corpus, others are none, they hold records of another format,
                or banks of one kind have other slots.
        """
        self._folders = {name: folder for name, path in sources.items()
                         if (folder := find_media_corpus(path)) is not None}
        for name, folder in self._folders.items():
            if sources[name].is_file():
                raise UserError(f"--input {sources[name]}: belongs to the media corpus {folder}, and its "
                                "media would be lost; pass the folder")
            if (holds := read_manifest(folder, MEDIA_CORPUS).content["format"]) != kind:
                raise UserError(f"--input {folder}: holds media in records of format {holds}; pack it with "
                                f"--format {holds}")
        if len(self._folders) < len(sources):
            other = next(path for name, path in sources.items() if name not in self._folders)
            raise UserError(f"--input {other}: is no media corpus, and {next(iter(self._folders.values()))} "
                            "is one; pack each on its own (training takes several --data, and `sov-data mix` "
                            "joins them)")
        self.encoding = _encoding_of(self.folders)
        """What ids depend on."""

    @property
    def folders(self) -> list[Path]:
        """Return the folder of each, in the order of the sources."""
        return list(self._folders.values())

    def check_tokenizer(self, tokenizer: Path) -> None:
        """Refuse a tokenizer without the tokens that the corpora hold.

        Raises:
            UserError: it has none, or a smaller codebook.
        """
        blocks = read_blocks(read_manifest(tokenizer).content.get(BLOCKS), str(tokenizer))
        for folder in self.folders:
            for kind, codec in read_manifest(folder, MEDIA_CORPUS).content["codecs"].items():
                have = blocks[kind].size if kind in blocks else 0
                if (needed := codec["codebook_size"] or 0) > have:
                    raise UserError(f"--tokenizer {tokenizer}: has {have} tokens of {kind}, and {folder} was "
                                    f"encoded with a codebook of {needed}; make one with `sov-tokenizer "
                                    f"media {tokenizer} --{kind}-tokens {needed} ...`")
        if not blocks:
            raise UserError(f"--tokenizer {tokenizer}: has no tokens of media; make one with `sov-tokenizer "
                            "media`")

    def banks(self, source: str, tokens: FeatureTokens) -> SourceBanks:
        """Return the banks of a source, with the placeholders of the tokenizer."""
        folder = self._folders[source]
        return SourceBanks(folder, {kind: replace(shape, placeholder_ids=tokens.placeholder_ids(kind))
                                    for kind, shape in _shapes(folder).items()})


def _encoding_of(folders: Iterable[Path]) -> MediaEncoding:
    slots: dict[str, int] = {}
    for folder in folders:
        for kind, shape in _shapes(folder).items():
            # The number of slots decides how many placeholders stand for a record.
            if slots.setdefault(kind, shape.slots) != shape.slots:
                raise UserError(f"--input {folder}: has {shape.slots} slots of {kind}, another one "
                                f"{slots[kind]}; pack each on its own")
    return MediaEncoding(tuple(sorted(slots.items())))


def _shapes(folder: Path) -> dict[str, BankShape]:
    return read_bank_shapes(read_manifest(folder, MEDIA_CORPUS).content.get(FEATURES), str(folder))


# Whether the banks of a shard are whole, and what its sidecar names is in them.


def media_problems(prefix: Path, source: dict[str, Any], tokens: NDArray[np.generic]) -> list[str]:
    """Return a sentence for each thing that is wrong with the media of a shard.

    Args:
        prefix: its files without their endings.
        source: the manifest's record of its source.
        tokens: its ids.
    """
    file = Path(f"{prefix}.{FEATURES}")
    try:
        shapes = read_bank_shapes(source.get(FEATURES), f"source {source['name']!r}")
        rows = {kind: len(open_bank(Path(f"{prefix}.{kind}"), shape)) for kind, shape in shapes.items()}
    except UserError as e:
        return [str(e)]
    if not file.is_file():
        return []  # a missing file is reported with the hashes
    numbers = np.fromfile(file, np.dtype(FEATURE_DTYPE).newbyteorder("<"))
    if len(numbers) != len(tokens):
        return [f"{file}: has {len(numbers)} numbers, and the shard {len(tokens)} tokens"]
    problems, stands = [], np.zeros(len(tokens), bool)
    for kind, shape in shapes.items():
        # Both ways: every placeholder names a record, and nothing else does.
        here = np.isin(tokens, shape.placeholder_ids)
        stands |= here
        if wrong := int(((numbers < 0) | (numbers >= rows[kind] * shape.slots))[here].sum()):
            problems.append(f"{file}: {wrong} placeholders of {kind} name none of its {rows[kind]} records")
    if wrong := int((numbers[~stands] != NO_FEATURE).sum()):
        problems.append(f"{file}: {wrong} tokens that are no placeholders name a record")
    return problems
