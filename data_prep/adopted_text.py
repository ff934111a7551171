"""What is found in token shards of others: their range of ids, the ends of their documents, the text that
they spell, and whether the tokenizer gives these ids for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.encode import Encoder
from data_prep.indexed import IndexedSplit
from data_prep.splits import document_hash
from megatron_sov.documents import Document
from megatron_sov.errors import UserError
from megatron_sov.obs.work_bar import work_bar

BATCH_DOCUMENTS = 512
SAMPLES, SAMPLE_TOKENS, SHOWN_CHARS = 64, 512, 160
"""Documents of each source that are encoded again, from places spread over it, and how much of each."""
MIN_AGREEMENT = 0.5
"""Share of the samples' ids, up to the first that differs, below which they are another tokenizer's: its own
give all but the last few, where a sample ends inside a word."""


@dataclass(frozen=True)
class Surveyed:
    """What was found in a source."""

    hashes: NDArray[np.uint64]
    """Of each document's text, by which it is held out, [documents]."""
    sizes_bytes: NDArray[np.int64]
    """UTF-8 bytes of its text, [documents]."""
    ends_with_eos: bool
    """Whether documents end with the tokenizer's eos."""


def survey(name: str, prefix: Path, split: IndexedSplit, encoder: Encoder, eod: str) -> Surveyed:
    """Look through a source, and show a sample of its text.

    Args:
        name: of the source.
        prefix: its path, for messages.
        split: its documents.
        encoder: the tokenizer.
        eod: what is expected at the ends of documents: "append" (eos), "none" or "auto".

    Raises:
        UserError: ids lie outside of the vocabulary, are another tokenizer's, or documents do not end as
            expected.
    """
    _refuse_range(prefix, split, encoder.vocab_size)
    _refuse_other_tokenizer(name, split, encoder)
    ends_with_eos = _ends(prefix, split, encoder, eod)
    hashes = np.zeros(len(split.lengths_tokens), np.uint64)
    sizes_bytes = np.zeros(len(split.lengths_tokens), np.int64)
    done = 0
    with work_bar("reading", len(split.tokens), "token") as bar:
        for batch in _batches(split):
            texts = encoder.decode_batch([ids[:-1] if ends_with_eos else ids for ids in batch])
            for text in texts:
                hashes[done] = document_hash(Document("text", text))
                sizes_bytes[done] = len(text.encode(errors="replace"))
                done += 1
            bar.update(sum(map(len, batch)))
    return Surveyed(hashes, sizes_bytes, ends_with_eos)


def _batches(split: IndexedSplit) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for ids in split.documents():
        batch.append(ids.tolist())
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _refuse_range(prefix: Path, split: IndexedSplit, vocab_size: int) -> None:
    block = 1 << 22
    for start in range(0, len(split.tokens), block):
        part = np.asarray(split.tokens[start:start + block])
        for id_ in (int(part.max()), int(part.min())):
            if not 0 <= id_ < vocab_size:
                at = start + int(np.flatnonzero(part == id_)[0])
                raise UserError(f"{prefix}.bin: token {at:,} has id {id_}, and the tokenizer's ids are 0 to "
                                f"{vocab_size - 1}; pass the tokenizer that it was made with")


def _ends(prefix: Path, split: IndexedSplit, encoder: Encoder, eod: str) -> bool:
    """Return whether documents end with eos; `UserError` where only some do, or not as is said."""
    lasts = np.asarray(split.tokens[np.cumsum(split.lengths_tokens, dtype=np.int64) - 1])
    num_ended, num_documents = int((lasts == encoder.eos_id).sum()), len(lasts)
    if eod == "none" or (eod == "auto" and not num_ended):
        if eod == "auto" and num_documents > 1 and (lasts == lasts[0]).all():
            raise UserError(f"{prefix}: every document ends with id {lasts[0]} "
                            f"({encoder.decode([int(lasts[0])])!r}), and the tokenizer's eos is "
                            f"{encoder.eos_id} ({encoder.decode([encoder.eos_id])!r}); pass a tokenizer "
                            "whose eos_token it is, or --eod none to take it for text")
        return False
    if num_ended < num_documents:
        first = int(np.flatnonzero(lasts != encoder.eos_id)[0])
        raise UserError(f"{prefix}: {num_documents - num_ended:,} of {num_documents:,} documents do not end "
                        f"with the tokenizer's eos, id {encoder.eos_id} (the first is document {first}); "
                        "pass the tokenizer that it was made with, or --eod none to take eos for text where "
                        "it stands")
    return True


def _refuse_other_tokenizer(name: str, split: IndexedSplit, encoder: Encoder) -> None:
    """Show a sample of a source, and refuse one whose text gives other ids, with the sample."""
    starts = split.starts_bytes // np.dtype(split.dtype).itemsize
    chosen = np.unique(np.linspace(0, len(starts) - 1, SAMPLES).astype(np.int64))
    agreed = num_tokens = 0
    texts = []
    for i in chosen.tolist():
        length = min(SAMPLE_TOKENS, int(split.lengths_tokens[i]))
        ids = [int(t) for t in split.tokens[starts[i]:starts[i] + length] if int(t) != encoder.eos_id]
        texts.append(encoder.decode(ids))
        again = encoder.plain.encode(texts[-1], add_special_tokens=False).ids
        agreed += next((n for n, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b),
                       min(len(ids), len(again)))
        num_tokens += len(ids)
    shown = max(texts, key=len)[:SHOWN_CHARS]
    if agreed < MIN_AGREEMENT * num_tokens:
        raise UserError(f"{name}: is of another tokenizer: the text that it spells with this one has other "
                        f"ids (only {agreed / num_tokens:.0%} of {len(chosen)} samples agree), and reads "
                        f"{shown!r}; pass the tokenizer that it was made with")
    print(f"{name}: reads {shown!r}; encoded again, {agreed / max(1, num_tokens):.1%} of the ids of "
          f"{len(chosen)} samples agree up to the first that differs")
