"""The documents that token shards train on, one by one: a tree over their hashes, whose root is a leaf of the
log, so that one of them is proved without the others.

A document's line names its source, its number among the source's training documents, as `data.without` counts
them, and the hash of its tokens.  The lines of all sources, in the order of the manifest, are one tree.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from megatron_sov.audit.merkle import inclusion_path, merkle_root, root_by_path
from megatron_sov.base.artifacts import FileRecord, file_damage, read_manifest
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.chat.folder import TOKENIZER_JSON, open_tokenizer

if TYPE_CHECKING:
    from megatron_sov.train.data.token_shards import Documents

KIND = "tokens"
SPLIT = "train"
ID_BYTES = 4
"""Of a token's id where it is hashed, the lowest first, whatever its shard has."""


def tokens_sha256(ids: Any) -> str:
    """Return the hash of a document.

    Args:
        ids: its token ids, numbers from 0 on; where a document has a bos or an eos it is among them.

    Raises:
        ValueError, TypeError, OverflowError: they are no token ids.
    """
    import numpy as np

    found = np.asarray(ids)
    if found.ndim != 1 or (found.size and (
            found.dtype.kind not in "iu" or found.min() < 0 or int(found.max()) >= 1 << 8 * ID_BYTES)):
        raise ValueError("must be a list of token ids, numbers from 0 on")
    return hashlib.sha256(found.astype(f"<u{ID_BYTES}").tobytes()).hexdigest()


def document_line(source: str, number: int, sha256: str) -> bytes:
    """Return what is hashed in the tree."""
    return f"document {source} {number} {sha256}".encode()


class DocumentLines(Sequence[bytes]):
    """The lines of a stretch of documents, which are read as they are asked for: any number takes no
    memory."""

    def __init__(self, sources: Sequence[tuple[str, Documents]], stretch: range) -> None:
        """Take them.

        Args:
            sources: name and training documents of each.
            stretch: places among the documents of all sources.
        """
        self._sources, self._stretch = sources, stretch

    def __len__(self) -> int:
        return len(self._stretch)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> DocumentLines: ...
    def __getitem__(self, index: int | slice) -> bytes | DocumentLines:
        if isinstance(index, slice):
            return DocumentLines(self._sources, self._stretch[index])
        number = self._stretch[index]
        for name, documents in self._sources:
            if number < len(documents.lengths):
                ids = documents.tokens(number, 0, int(documents.lengths[number]))
                return document_line(name, number, tokens_sha256(ids))
            number -= len(documents.lengths)
        raise IndexError(index)

    def place(self, source: str, number: int) -> int:
        """Return the place of a document.

        Raises:
            UserError: there is no such source or document.
        """
        first = 0
        for name, documents in self._sources:
            if name == source:
                if number < len(documents.lengths):
                    return first + number
                raise UserError(f"--document {source}:{number}: {source} has {len(documents.lengths):,} "
                                "training documents, numbered from 0; name one of these")
            first += len(documents.lengths)
        names = [name for name, _ in self._sources]
        raise UserError(f"--document {source}:{number}: there is no source {source!r}; the shards have "
                        f"{', '.join(names)}{nearest(source, names)}")


def document_lines(shards: Path) -> DocumentLines:
    """Return the lines of all training documents of a folder of token shards.

    Raises:
        UserError: it is none, or is damaged.
    """
    from megatron_sov.train.data.token_shards import open_sources

    sources = [(source.name, source.shard(SPLIT)) for source in open_sources(
        {str(shards): 1.0}, read_manifest(shards, KIND).content["vocab_size"], None, warns=False)]
    return DocumentLines(sources, range(sum(len(documents.lengths) for _, documents in sources)))


def documents_root(shards: Path) -> str:
    """Return the root of the tree over the training documents of a folder of token shards; every token is
    read.

    Raises:
        UserError: it is none, or is damaged.
    """
    return merkle_root(document_lines(shards))


@dataclass(frozen=True)
class DocumentProof:
    """That one document is among those of a root."""

    source: str
    number: int
    """Of the document among the source's training documents, from 0."""
    sha256: str
    """Of its tokens."""
    index: int
    """Place among the documents of all sources."""
    size: int
    """Documents of all sources."""
    path: tuple[str, ...]

    def root(self) -> str:
        """Return the root to which it leads; `ValueError` where it leads nowhere."""
        return root_by_path(document_line(self.source, self.number, self.sha256), self.index, self.size,
                            self.path)

    @property
    def name(self) -> str:
        return f"{self.source}:{self.number}"


def prove_document(shards: Path, named: str) -> DocumentProof:
    """Return the proof of one document; every token is read.

    Args:
        shards: folder of token shards.
        named: SOURCE:NUMBER.

    Raises:
        UserError: there is no such document.
    """
    source, colon, typed = named.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,18}", typed):
        raise UserError(f"--document {named}: must be SOURCE:NUMBER, a source of the shards and one of its "
                        "training documents, numbered from 0")
    number, lines = int(typed), document_lines(shards)
    index = lines.place(source, number)
    sha256 = lines[index].decode().rpartition(" ")[2]
    return DocumentProof(source, number, sha256, index, len(lines), tuple(inclusion_path(lines, index)))


def read_document_proof(raw: Any) -> DocumentProof:
    """Return what a proof's file has of a document.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    sha256 = str(raw["sha256"])
    # or the end of a source's name could pass for a number, and its number for a part of the hash
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"its document has the hash {sha256!r}")
    return DocumentProof(str(raw["source"]), int(raw["number"]), sha256, int(raw["index"]),
                         int(raw["size"]), tuple(map(str, raw["path"])))


def document_in_hand(file: Path, tokenizer: Path | None, manifest: str, source: str) -> str:
    """Return the hash of the document that somebody has.

    Args:
        file: its text, or, without a tokenizer, a JSON list of its token ids.
        tokenizer: folder of the tokenizer by which it was packed.
        manifest: text of the shards' manifest, which names the tokenizer and what ends a document.
        source: of the document.

    Raises:
        UserError: it is neither, the tokenizer is another one, or the source holds no texts.
    """
    try:
        text = file.read_bytes().decode()
        if tokenizer is None:
            return tokens_sha256(json.loads(text))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as e:
        raise UserError(f"--of {file}: is no {'UTF-8 text' if tokenizer else 'JSON list of token ids'} "
                        f"({str(e)[:200]}); give the document's text with --tokenizer, or its token ids"
                        ) from None
    try:
        raw = json.loads(manifest)
        record, content = FileRecord.read(raw["files"][f"tokenizer/{TOKENIZER_JSON}"]), raw["content"]
        # as documents are packed: bos and eos around them
        start = [] if content["bos_id"] is None else [int(content["bos_id"])]
        end = [int(content["eos_id"])] if content["eod"] == "append" else []
        kind = {str(s["name"]): str(s["format"]) for s in content["sources"]}[source]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"--tokenizer {tokenizer}: the shards' manifest in the proof names none ({e!r}); "
                        "give the document's token ids") from None
    if kind != "text":
        raise UserError(f"--tokenizer {tokenizer}: {source} holds documents of format {kind!r}, which a "
                        "template has framed; give the document's token ids, without --tokenizer")
    if problem := file_damage(tokenizer / TOKENIZER_JSON, record):
        raise UserError(f"--tokenizer {tokenizer}: is not the one by which the shards were packed "
                        f"({problem}); ask the lab for that one")
    opened = open_tokenizer(tokenizer)
    # special tokens that a document spells are text
    opened.encode_special_tokens = True
    return tokens_sha256([*start, *opened.encode(text, add_special_tokens=False).ids, *end])
