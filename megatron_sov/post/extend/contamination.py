"""Search training data for the needle test's questions and for held-out text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_sov.base.documents.overlap import hash_windows
from megatron_sov.base.errors import UserError
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import Documents

WINDOW_TOKENS = 32
"""Tokens per window. Windows start at every `WINDOW_TOKENS`-th token in a held-out document: the search finds
every shared range twice as long. A chance hit by `hash_windows` among 10^8 places and 10^6 windows has
probability 5e-6."""
PIECE_TOKENS = 1 << 20
"""Tokens per call of `hash_windows`."""
MAX_MADE_DOCUMENTS = 256
"""Limit for searched documents of a source that is generated on the fly."""


@dataclass(frozen=True)
class Decontamination:
    """Occurrences of needle questions and held-out text in the training documents."""

    scanned_tokens: dict[str, int]
    """Source -> searched training tokens."""
    train_tokens: dict[str, int]
    """Source -> training tokens."""
    questions: int
    """Distinct questions in the needle test."""
    questions_found: int
    """Places in the training text with a question."""
    windows: int
    """Windows in held-out text."""
    windows_found: int
    """Windows that occur in the training text."""
    window_tokens: int = WINDOW_TOKENS

    @property
    def overlap(self) -> float:
        return self.windows_found / self.windows if self.windows else 0.0

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "overlap": self.overlap}


def search_contamination(questions: list[list[int]], sources: list[Source], scan_tokens: int
                         ) -> Decontamination:
    """Search the training documents for needle test questions and held-out windows.

    Args:
        questions: token ids of all possible questions: all pairs of test words, used or not.
        sources: packed sources with held-out splits, and sources generated on the fly.
        scan_tokens: limit for searched tokens per source and split.
    """
    question_hashes: dict[int, np.ndarray] = {}
    # By length: a window can only equal a question of the same length.
    for length in {len(q) for q in questions}:
        question_hashes[length] = np.unique(np.concatenate([
            hash_windows(np.array(q), length) for q in questions if len(q) == length]))
    windows = _hash_heldout_windows(sources, scan_tokens)
    is_contaminated = np.zeros(len(windows), bool)
    questions_found, scanned = 0, {}
    for source in sources:
        scanned[source.name] = 0
        limit = scan_tokens
        if source.train_documents is not None:
            limit = min(scan_tokens, MAX_MADE_DOCUMENTS * int(source.train_documents.lengths[0]))
        for text in _iter_texts(source.open_split("train"), limit):
            scanned[source.name] += int((text >= 0).sum())
            for length, hashes in question_hashes.items():
                questions_found += int(np.isin(hash_windows(text, length), hashes).sum())
            # Documents generated on the fly consist of training text that is searched in its source.
            if source.train_documents is None:
                is_contaminated |= np.isin(windows, hash_windows(text, WINDOW_TOKENS))
    return Decontamination(
        scanned_tokens=scanned, train_tokens={s.name: s.num_tokens["train"] for s in sources},
        questions=len(questions), questions_found=questions_found, windows=len(windows),
        windows_found=int(is_contaminated.sum()))


def _hash_heldout_windows(sources: list[Source], scan_tokens: int) -> np.ndarray:
    hashes = [np.zeros(0, np.uint64)]
    for source in sources:
        if source.train_documents is None and not source.is_chat and source.num_tokens.get("heldout", 0):
            # Adjacent held-out windows suffice, because training windows start at every place.
            for text in _iter_texts(source.open_split("heldout"), scan_tokens):
                hashes.append(hash_windows(text, WINDOW_TOKENS)[::WINDOW_TOKENS])
    return np.unique(np.concatenate(hashes))


def _iter_texts(documents: Documents, limit_tokens: int) -> Iterator[np.ndarray]:
    """Yield documents joined to pieces of about `PIECE_TOKENS`: a call per short document would be slow."""
    remaining, parts, size = limit_tokens, [], 0
    # No text contains the separator, hence no window crosses a document boundary.
    separator = np.array([-2])
    for document, length in enumerate(documents.lengths):
        if remaining <= 0:
            break
        count = min(int(length), remaining)
        remaining -= count
        parts += [documents.tokens(document, 0, count), separator]
        size += count + 1
        if size >= PIECE_TOKENS:
            yield np.concatenate(parts)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts)


def check_contamination(result: Decontamination, max_overlap: float) -> None:
    """Raise `UserError` if the gate would measure memorisation."""
    if result.questions_found:
        raise UserError(f"--data: {result.questions_found} questions of the needle test occur in the "
                        "training text; remove those documents, or train a tokenizer whose rare words make "
                        "other needles")
    if result.overlap > max_overlap:
        raise UserError(f"--data: {result.overlap:.1%} of the held-out text occurs in the training text "
                        f"too, more than extend.gate.max_overlap = {max_overlap:g}; "
                        "remove duplicates before packing, or raise the limit")
