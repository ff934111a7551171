"""Which documents are held out: a function of their text alone, so that duplicates land on the same side."""

from __future__ import annotations

import hashlib
import unicodedata

from megatron_sov.documents import Document

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
_HASH_RANGE = 1 << 64


def document_hash(document: Document) -> int:
    """Return a 64-bit hash of a document's content.

    Text is hashed in composed Unicode form, because a tokenizer that composes makes such twins one and the same.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (*(role for role, _ in document.messages), *document.texts()):
        raw = unicodedata.normalize("NFC", part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little")


class HeldoutRule:
    """Holds out the documents whose hash falls below the share, and from each source of two or more at least one."""

    def __init__(self, share: float) -> None:
        """`share`: expected part of all documents, in [0, 1)."""
        self.threshold = int(share * _HASH_RANGE)
        self.chosen: set[int] = set()
        """Hashes that are held out although they lie above the threshold."""

    def learn_source(self, smallest: int, largest: int) -> None:
        """Take note of a source's smallest and largest document hash: a small source gives up its smallest."""
        if self.threshold and smallest >= self.threshold and smallest != largest:
            self.chosen.add(smallest)

    def split_of(self, hash_: int) -> str:
        """Return the split of a document with this hash."""
        return HELDOUT if hash_ < self.threshold or hash_ in self.chosen else TRAIN
