"""Which documents are held out: a function of their text alone, so that duplicates, and answers to one
prompt, land on the same side."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents import Document

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
_HASH_RANGE = 1 << 64


def document_hash(document: Document) -> int:
    """Return a 64-bit hash of a document's content; of a preference or a prompt, and of a chat that says how
    much of it is one, of the prompt, whose variants stay together.

    Text is hashed in composed Unicode form, because a tokenizer that composes makes such
    twins one and the same.
    """
    digest = hashlib.blake2b(digest_size=8)
    messages = document.messages[:document.num_prompt or None]
    contents = [text for m in messages for text in m.texts()] or [document.text]
    for part in (*(m.role for m in messages), *contents):
        raw = unicodedata.normalize("NFC", part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little")


class HeldoutRule:
    """Holds out the documents whose hash falls below the share, from each source of two or more at least
    one, and of none all: the document with the largest hash stays to be trained on."""

    def __init__(self, share: float) -> None:
        """`share`: expected part of all documents, in [0, 1)."""
        self.share, self.threshold = share, int(share * _HASH_RANGE)
        self.chosen: set[int] = set()
        """Hashes that are held out although they lie above the threshold."""
        self.kept: set[int] = set()
        """Hashes that are trained on although they lie below it, or a twin was chosen."""

    def learn_source(self, smallest: int, largest: int) -> None:
        """Take note of a source's smallest and largest document hash:
        a small source gives up its smallest."""
        if self.threshold and smallest >= self.threshold and smallest != largest:
            self.chosen.add(smallest)

    def keep_one(self, largest: int) -> bool:
        """Keep a source's document for training where it would be held out, and with it all others, since
        its hash is their largest; called when all sources are known.  Returns whether that was so."""
        is_last = largest < self.threshold or largest in self.chosen
        if is_last:
            self.kept.add(largest)
        return is_last

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as the manifest keeps it: what was packed by the same one holds the same
        documents out."""
        return {"share": self.share, "chosen": sorted(self.chosen),
                **({"kept": sorted(self.kept)} if self.kept else {})}

    def is_heldout(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each hash whether its document is held out."""
        chosen, kept = (np.array(sorted(some), np.uint64) for some in (self.chosen, self.kept))
        found: NDArray[np.bool_] = (hashes < self.threshold) | np.isin(hashes, chosen)
        return found & ~np.isin(hashes, kept)
