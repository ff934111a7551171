"""A teacher of another tokenizer, heard by byte: its probabilities of tokens become those of the student's.

Where a token of the student's and one of the teacher's end at the same byte of a document, both predict what
begins there.  Events of which both can say how probable they are:

- a token of the same bytes, which no longer token of either side hides: no other token of the student's is
  written by the teacher with this one first, nor the other way round.  One that is (" a", where the student
  has " asks" and the teacher " a", "s", "k", "s") means other texts to each;
- the student's own next token.  Where it spans several of the teacher's it has the product of their
  conditional probabilities (merged spans: GOLD, Patiño et al. 2025, "Unlocking on-policy distillation for any
  model family"); where it is the beginning of longer ones, their sum.

All else is one event more, see `TeacherTopK.keep_remainder`.  Elsewhere the teacher is not heard: where no
token of its ends, and where the student's next token ends inside of one that it does not begin.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from megatron_sov.data.token_bytes import spellings
from megatron_sov.data.vocabulary import TOKENIZER_JSON, read_tokenizer
from megatron_sov.errors import UserError

UNHEARD = 1.0
"""In the place of the first log-probability, none of which is positive: the teacher says nothing there."""
NOTHING = -1e4
"""Log-probability of tokens that fill a row up."""


@dataclass(frozen=True)
class Translated:
    """A document in the teacher's tokens."""

    ids: list[int]
    """The teacher's token ids."""
    at: np.ndarray
    """[student's tokens] int64: the teacher's token that ends where the student's ends; -1: none does."""


class Translation:
    """From the student's tokens to a teacher's, and from the teacher's probabilities to the student's."""

    def __init__(self, student: Path, teacher: Path, vocab_size: int, teacher_vocab_size: int) -> None:
        """Read both tokenizers.

        Args:
            student: folder of the data's tokenizer.
            teacher: folder of the teacher's.
            vocab_size: the data's token ids.
            teacher_vocab_size: the teacher's.

        Raises:
            UserError: a tokenizer.json cannot be read.
        """
        self._student, self._teacher = _opened(student), _opened(teacher)
        self._teacher_folder = teacher
        self._ours, self._theirs = spellings(student, vocab_size), spellings(teacher, teacher_vocab_size)
        self._of_bytes = {text: token for token, text in reversed(list(enumerate(self._ours))) if text}
        self._longest = max(map(len, self._of_bytes), default=0)
        self._specials = _same_specials(student, teacher, self._student, self._teacher)
        self.first = self._first_tokens()
        """[teacher's ids] int64: the student's token by which each one's text begins; -1: none."""
        self.same = self._same_tokens()
        """[teacher's ids] int64: the student's token that means the same; -1: none."""

    def _first_tokens(self) -> np.ndarray:
        first = np.full(len(self._theirs), -1, np.int64)
        texts = {token: text for token, text in enumerate(self._theirs) if text}
        spelled = {token: _decoded(text) for token, text in texts.items()}
        whole = [token for token, text in spelled.items() if text is not None]
        encoded = self._student.encode_batch([spelled[token] for token in whole], add_special_tokens=False)
        for token, encoding in zip(whole, encoded, strict=True):
            first[token] = encoding.ids[0] if encoding.ids else -1
        for token in texts.keys() - set(whole):  # a part of a character
            first[token] = self._longest_prefix(texts[token])
        for ours, theirs in self._specials.items():
            if theirs < len(first):
                first[theirs] = ours
        first[first >= len(self._ours)] = -1
        return first

    def _same_tokens(self) -> np.ndarray:
        """Return tokens of equal bytes, and specials, that no longer token of either side begins with."""
        same = np.full(len(self._theirs), -1, np.int64)
        spelled = {token: text for token, text in enumerate(map(_decoded, self._ours)) if text}
        encoded = self._teacher.encode_batch(list(spelled.values()), add_special_tokens=False)
        beginning = np.bincount([e.ids[0] for e in encoded if e.ids], minlength=len(same))
        begun = np.bincount(self.first[self.first >= 0], minlength=len(self._ours))
        for theirs, text in enumerate(self._theirs):
            ours = self._of_bytes.get(text, -1) if text else -1
            if ours >= 0 and begun[ours] <= 1 and beginning[theirs] <= 1:
                same[theirs] = ours
        for ours, theirs in self._specials.items():
            if theirs < len(same):
                same[theirs] = ours
        return same

    def _longest_prefix(self, text: bytes) -> int:
        return next((self._of_bytes[text[:n]] for n in range(min(len(text), self._longest), 0, -1)
                     if text[:n] in self._of_bytes), -1)

    def document(self, ids: Sequence[int]) -> Translated:
        """Return a document of the student's tokens in the teacher's.

        Special tokens that both have are themselves; others are read as their text.

        Raises:
            UserError: the teacher's tokenizer changes texts, so that nothing can be aligned.
        """
        theirs: list[int] = []
        lengths: list[int] = []
        own: list[int] = []
        for is_special, run in _runs(ids, self._specials):
            if is_special:
                theirs.append(self._specials[run[0]])
                lengths.append(1)
                own.append(1)
                continue
            spelled = [self._ours[token] or (self._student.id_to_token(token) or "").encode()
                       for token in run]
            own += map(len, spelled)
            made = self._encoded(b"".join(spelled))
            theirs += [token for token, _ in made]
            lengths += [length for _, length in made]
        ends, own_ends = np.cumsum(lengths, dtype=np.int64), np.cumsum(own, dtype=np.int64)
        place = np.searchsorted(ends, own_ends, side="right") - 1
        same = (place >= 0) & (ends[np.maximum(place, 0)] == own_ends) if len(ends) else place >= 0
        return Translated(theirs, np.where(same, place, -1))

    def _encoded(self, text: bytes) -> list[tuple[int, int]]:
        """Return the teacher's tokens of a text, and the bytes of each."""
        decoded = _decoded(text)
        if decoded is None:
            raise UserError("a document's bytes are no UTF-8: the teacher's tokenizer cannot read them; pack "
                            "text")
        ids = self._teacher.encode(decoded, add_special_tokens=False).ids
        lengths = [len(self._theirs[token]) for token in ids]
        if sum(lengths) == len(text) + 1 and self._theirs[ids[0]].startswith(b" "):
            lengths[0] -= 1  # the space that sentencepiece puts before a text
        if sum(lengths) != len(text):
            raise UserError(f"{self._teacher_folder / TOKENIZER_JSON}: changes texts before it reads them "
                            f"({len(text)} bytes became {sum(lengths)}), so its tokens cannot be laid beside "
                            "the student's; choose a teacher whose tokenizer keeps them")
        return list(zip(ids, lengths, strict=True))

    def rows(self, document: Translated, ids: Sequence[int], token: torch.Tensor, logprobs: torch.Tensor,
             of_next: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the teacher says in the student's tokens, behind each token of a document.

        Args:
            document: what `document` gave.
            ids: the student's token ids of it, n.
            token: [m, M] the teacher's most probable tokens behind each of its m tokens.
            logprobs: [m, M] their log-probabilities.
            of_next: [m] the log-probability of the teacher's own next token; anything for the last.
            k: tokens of a row.

        Returns:
            [n, k] int64 ids, distinct in a row, and [n, k] float32 log-probabilities, `UNHEARD` the first of
            rows where the teacher is not heard.
        """
        n, vocab_size = len(ids), len(self._ours)
        heard = np.flatnonzero(self._says(document, ids))
        place = document.at[heard]
        rows, tokens = np.repeat(heard, token.shape[1]), token[place].numpy().ravel()
        masses = np.exp(logprobs[place].double().numpy().ravel())
        behind = np.array([*ids[1:], -1], np.int64)
        is_own = self.first[tokens] == behind[rows]
        spans = self._own_next(document, of_next.double().numpy())
        # of a span the product, else what begins with the student's next token
        own = np.bincount(rows, masses * is_own, n) if len(rows) else np.zeros(n)
        own = np.where(np.isnan(spans), own, spans)[heard]
        named, others = behind[heard] >= 0, (self.same[tokens] >= 0) & (self.same[tokens] != behind[rows])
        keys = np.concatenate([(heard * vocab_size + behind[heard])[named],
                               rows[others] * vocab_size + self.same[tokens[others]]])
        return _table((n, vocab_size, k), keys, np.concatenate([own[named], masses[others]]),
                      np.arange(len(keys)) < named.sum(), heard)

    def _says(self, document: Translated, ids: Sequence[int]) -> np.ndarray:
        """Return [n] where the teacher can say how probable the student's next token is: tokens of both end
        before it, and it ends with one of the teacher's, or is how the teacher's next one begins."""
        says = document.at >= 0
        for t in np.flatnonzero(says[:-1] & (document.at[1:] < 0)).tolist():
            theirs = document.ids[document.at[t] + 1:document.at[t] + 2]
            says[t] = bool(theirs) and self.first[theirs[0]] == ids[t + 1]
        return says

    @staticmethod
    def _own_next(document: Translated, of_next: np.ndarray) -> np.ndarray:
        """Return [n] the probability of the student's next token where it is one of the teacher's or spans
        several; NaN elsewhere."""
        until = np.concatenate([[0.0], np.cumsum(of_next)])  # log-probability of tokens 1 to j
        here, behind = document.at[:-1], document.at[1:]
        spans = (here >= 0) & (behind > here)
        found = np.full(len(document.at), np.nan)
        found[:-1][spans] = np.exp(until[behind[spans]] - until[here[spans]])
        return found


def _table(sizes: tuple[int, int, int], keys: np.ndarray, mass: np.ndarray, is_own: np.ndarray,
           heard: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the own next token and the k - 1 most probable ids of each of n rows, filled up with others of
    no probability."""
    n, vocab_size, k = sizes
    ids, logprobs = np.tile(np.arange(k), (n, 1)), np.full((n, k), NOTHING, np.float32)
    rows = keys // vocab_size
    order = np.lexsort((-mass, ~is_own, rows))
    starts = np.searchsorted(rows[order], np.arange(n))
    rank = np.arange(len(order)) - starts[rows[order]]
    kept = order[rank < k]
    counts = np.bincount(rows[kept], minlength=n)
    place = np.arange(len(kept)) - np.concatenate([[0], counts.cumsum()])[rows[kept]]
    with np.errstate(divide="ignore"):
        logprobs[rows[kept], place] = np.log(mass[kept]).clip(min=NOTHING)
    chosen = keys[kept] % vocab_size
    ids[rows[kept], place] = chosen
    for row in np.flatnonzero((counts > 0) & (counts < k)).tolist():
        taken = set(ids[row, :counts[row]].tolist())
        fill = (token for token in range(vocab_size) if token not in taken)
        ids[row, counts[row]:] = [next(fill) for _ in range(k - counts[row])]
    unheard = np.ones(n, bool)
    unheard[heard] = False
    logprobs[unheard, 0] = UNHEARD
    return torch.from_numpy(ids), torch.from_numpy(logprobs)


def _opened(folder: Path) -> Tokenizer:
    read_tokenizer(folder)  # says what is wrong with it
    return Tokenizer.from_file(str(folder / TOKENIZER_JSON))


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _same_specials(student: Path, teacher: Path, ours: Tokenizer, theirs: Tokenizer) -> dict[int, int]:
    """Return the student's special tokens that the teacher has too: those of the same text, and the ones that
    end a document."""
    def special(tokenizer: Tokenizer) -> dict[str, int]:
        return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()
                if token.special}

    mine, other = special(ours), special(theirs)
    same = {mine[text]: other[text] for text in mine.keys() & other.keys()}
    end, their_end = _end_of_text(student, mine), _end_of_text(teacher, other)
    return same if end is None or their_end is None else {**same, end: their_end}


def _end_of_text(folder: Path, special: dict[str, int]) -> int | None:
    """Return the id of the token that tokenizer_config.json says ends a text."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return special.get(named["content"] if isinstance(named, dict) and "content" in named else str(named))


def _runs(ids: Sequence[int], specials: dict[int, int]) -> list[tuple[bool, list[int]]]:
    """Return runs of ordinary tokens, and each special one by itself."""
    runs: list[tuple[bool, list[int]]] = []
    for token in ids:
        if token in specials:
            runs.append((True, [token]))
        elif runs and not runs[-1][0]:
            runs[-1][1].append(token)
        else:
            runs.append((False, [token]))
    return runs
