"""A teacher of another tokenizer, heard by byte: its probabilities of tokens become those of the student's.

How probable a text is up to a byte, the teacher says whichever way it would write what follows
(`Chain`), and so how probable the student's own next token is, wherever that begins and ends.  Where a
token of the teacher's ends as well, it says more: a token of the same bytes, which no longer token of either
side hides, has its probability.  (One that is hidden means other texts to each: " a", where the student has
" asks" and the teacher " a", "s", "k", "s".)  All else is one event more, see `TeacherTopK.keep_remainder`.

The teacher is not heard of a token that might have been written as part of a longer one, nor behind it: that
the student has " b" and not " brown" says what comes next, and the bytes alone do not.

Products of the tokens' own probabilities (merged spans: GOLD, Patiño et al. 2025, "Unlocking on-policy
distillation for any model family") would not do: where the teacher writes " a" before some words and " a " as
one token before others, its token " a" is half as probable as the text, and knows half of what comes next.

A text up to a byte is written in every way whose last token ends there or behind: the probability of that
beginning is the sum over all of them (covers: Vieira et al. 2024, "From language models over tokens to
language models over characters"; Phan et al. 2024, "Exact byte-level probabilities from tokenized language
models for FIM-tasks and model ensembles").  Here those are summed that leave the text's own tokens with their
last one.  Where a token of the text goes on, others may have ended inside of it, and what the model says
behind these is not known: how much that is, is told.  Probabilities of the next bytes are ratios of two such
sums, wherever tokens end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from megatron_sov.base.errors import UserError
from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, read_tokenizer
from megatron_sov.train.data.token_bytes import read_token_bytes

UNHEARD = 1.0
"""In the place of the first log-probability, none of which is positive: the teacher says nothing there."""
NOTHING = -1e4
"""Log-probability of tokens that fill a row up."""
MAX_HIDDEN = 0.05
"""How probable it may be that a token of the student's would have been written as part of a longer one, and
what may be missing of a text's probability, for the teacher to be heard."""
MAX_SYMBOLS = 64
"""Bytes of a teacher's token that are looked at."""
Array = np.ndarray[Any, Any]
NO_SYMBOL = -1
"""Behind the end of a token's spelling."""
CHUNK_ROWS = 256
"""Tokens, or stops, that are looked at at a time."""


@dataclass(frozen=True)
class TranslatedStates:
    """A document in the teacher's tokens."""

    ids: list[int]
    at: np.ndarray
    """[student's tokens] int64: the teacher's token that ends where the student's ends; -1: none does."""
    text: np.ndarray
    """[symbols] int64: its bytes, and of each special token that both have a number beyond them."""
    ends: np.ndarray
    """[teacher's tokens] int64: symbols up to the end of each."""
    student_ends: np.ndarray
    """[student's tokens] int64: symbols up to the end of each."""


class TokenTranslation:
    """From the student's tokens to a teacher's, and from the teacher's probabilities to the student's."""

    def __init__(self, student: Path, teacher: Path, vocab_size: int, teacher_vocab_size: int) -> None:
        """Read both tokenizers."""
        self._student, self._teacher = _open_checked(student), _open_checked(teacher)
        self._teacher_folder = teacher
        self._ours = read_token_bytes(student, vocab_size)
        self._theirs = read_token_bytes(teacher, teacher_vocab_size)
        # Reversed, so that of tokens with equal bytes the lowest id stays.
        self._of_bytes = {text: token for token, text in reversed(list(enumerate(self._ours))) if text}
        self._longest = max(map(len, self._of_bytes), default=0)
        self._specials = _same_specials(student, teacher, self._student, self._teacher)
        self.first = self._first_tokens()
        """[teacher's ids] int64: the student's token by which each one's text begins; -1: none."""
        self.same = self._same_tokens()
        """[teacher's ids] int64: the student's token that means the same; -1: none."""
        # Symbols are bytes, and beyond them one for each special token that both have.
        self._symbol = {ours: 256 + i for i, ours in enumerate(sorted(self._specials))}
        self._table = self._spelling_table()
        self._hidden = self._hiding_symbols()

    def _first_tokens(self) -> np.ndarray:
        first = np.full(len(self._theirs), -1, np.int64)
        texts = {token: text for token, text in enumerate(self._theirs) if text}
        spelled = {token: _decode_bytes(text) for token, text in texts.items()}
        complete = [token for token, text in spelled.items() if text is not None]
        encoded = self._student.encode_batch([spelled[token] for token in complete], add_special_tokens=False)
        for token, encoding in zip(complete, encoded, strict=True):
            first[token] = encoding.ids[0] if encoding.ids else -1
        for token in texts.keys() - set(complete):  # a part of a character
            first[token] = self._longest_prefix(texts[token])
        for ours, theirs in self._specials.items():
            if theirs < len(first):
                first[theirs] = ours
        first[first >= len(self._ours)] = -1
        return first

    def _same_tokens(self) -> np.ndarray:
        """Return tokens of equal bytes, and specials, that no longer token of either side begins with."""
        same = np.full(len(self._theirs), -1, np.int64)
        spelled = {token: text for token, text in enumerate(map(_decode_bytes, self._ours)) if text}
        encoded = self._teacher.encode_batch(list(spelled.values()), add_special_tokens=False)
        # How many tokens of the other side begin with each one; one of them is the token itself.
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

    def _spelling_table(self) -> np.ndarray:
        """Return [teacher's ids, symbols] what each of its tokens is spelled with."""
        texts: list[Sequence[int]] = [text or b"" for text in self._theirs]
        for ours, theirs in self._specials.items():
            if theirs < len(texts):
                texts[theirs] = [self._symbol[ours]]
        return spelling_table(texts, min(MAX_SYMBOLS, max(map(len, texts), default=1)))

    def _hiding_symbols(self) -> np.ndarray:
        """Return [student's ids, 257] bool: behind which bytes a token may be part of a longer one; behind
        special tokens, the last column, none is."""
        hidden = np.zeros((len(self._ours), 257), bool)
        for text in self._of_bytes:
            # Every shorter token may go on to this one by its next byte.
            for n in range(1, len(text)):
                if (token := self._of_bytes.get(text[:n], -1)) >= 0:
                    hidden[token, text[n]] = True
        return hidden

    def _longest_prefix(self, text: bytes) -> int:
        return next((self._of_bytes[text[:n]] for n in range(min(len(text), self._longest), 0, -1)
                     if text[:n] in self._of_bytes), -1)

    def translate_document(self, ids: Sequence[int]) -> TranslatedStates:
        """Return a document of the student's tokens in the teacher's.

        Special tokens that both have are themselves; others are read as their text.
        """
        theirs: list[int] = []
        lengths: list[int] = []
        student_lengths: list[int] = []
        text: list[int] = []
        for is_special, run in _find_runs(ids, self._specials):
            if is_special:
                theirs.append(self._specials[run[0]])
                lengths.append(1)
                student_lengths.append(1)
                text.append(self._symbol[run[0]])
                continue
            # A special token that the teacher has not is read as its text.
            spelled = [self._ours[token] or (self._student.id_to_token(token) or "").encode()
                       for token in run]
            student_lengths += map(len, spelled)
            text += b"".join(spelled)
            encoded = self._encode_text(b"".join(spelled))
            theirs += [token for token, _ in encoded]
            lengths += [length for _, length in encoded]
        ends, student_ends = np.cumsum(lengths, dtype=np.int64), np.cumsum(student_lengths, dtype=np.int64)
        # The teacher's last token that ends no later than each of the student's.
        place = np.searchsorted(ends, student_ends, side="right") - 1
        same = (place >= 0) & (ends[np.maximum(place, 0)] == student_ends) if len(ends) else place >= 0
        return TranslatedStates(theirs, np.where(same, place, -1), np.asarray(text, np.int64), ends,
                                student_ends)

    def _encode_text(self, text: bytes) -> list[tuple[int, int]]:
        decoded = _decode_bytes(text)
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

    def translate_rows(self, document: TranslatedStates, ids: Sequence[int], token: torch.Tensor,
             logprobs: torch.Tensor, of_next: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the teacher says in the student's tokens, behind each token of a document.

        Args:
            document: what `document` gave.
            ids: the student's token ids of it, n.
            token: [m, M] the teacher's most probable tokens behind each of its m tokens.
            logprobs: [m, M] their log-probabilities.
            of_next: [m] the log-probability of the teacher's own next token; anything for the last.
            k: tokens of a row.

        Returns:
            [n, k] int64 ids, distinct in a row, the student's own next token first, and [n, k] float32
            log-probabilities, `UNHEARD` the first of rows where the teacher is not heard.
        """
        n, vocab_size = len(ids), len(self._ours)
        # float64: sums of small probabilities are divided by one another.
        chain = self._build_chain(document, token.numpy(), np.exp(logprobs.double().numpy()),
                            of_next.double().numpy())
        prefixes = chain.find_prefixes(document.student_ends, self._hidden[np.asarray(ids)])
        complete = prefixes.whole
        clear = (prefixes.goes_on <= MAX_HIDDEN) & (prefixes.unknown <= MAX_HIDDEN)  # NaN is neither
        # p(next token) is the text with it over the text without it.
        next_masses = np.append(np.exp(complete[1:] - complete[:-1]), np.nan)
        # Both ends of the next token must be clear, since its probability is a ratio of both.
        heard = np.flatnonzero(clear & np.append(clear[1:], False) & np.isfinite(next_masses))
        ends = heard[document.at[heard] >= 0]
        rows, place = np.repeat(ends, token.shape[1]), document.at[ends]
        # of the ways to write the text so far, that in which one of the teacher's tokens ends here
        ending = np.exp(chain.cumulative[place] - complete[ends])
        masses = (ending[:, None] * chain.masses[place][:, :token.shape[1]]).ravel()
        tokens, next_ids = token.numpy()[place].ravel(), np.append(np.asarray(ids)[1:], -1)
        # The text's own next token is left to the ratio, which counts every way to write it.
        differs = (self.same[tokens] >= 0) & (self.same[tokens] != next_ids[rows])
        keys = np.concatenate([heard * vocab_size + next_ids[heard],
                               rows[differs] * vocab_size + self.same[tokens[differs]]])
        # Together they are at most 1: what the others have, the own one cannot have.
        remaining = 1 - np.bincount(rows[differs], masses[differs], n)[heard]
        return _read_vocabulary((n, vocab_size, k), keys,
                                np.concatenate([next_masses[heard].clip(max=remaining.clip(min=0.0)),
                                                                masses[differs]]),
                      np.arange(len(keys)) < len(heard), heard)

    def _build_chain(self, document: TranslatedStates, token: np.ndarray, masses: np.ndarray,
                     of_next: np.ndarray
               ) -> SpellingTree:
        """Return what the teacher says beside a document's bytes, its own next token among the others."""
        longest = int(np.diff(document.ends, prepend=0).max()) + 1
        following = np.append(np.asarray(document.ids[1:], np.int64), 0)
        contains_next = (token == following[:, None]).any(1)
        # Nothing follows the last token, so nothing is missing there.
        contains_next[-1:] = True
        missing = np.where(contains_next, 0.0, np.exp(of_next))
        return SpellingTree.build(document.text, document.ends, tokens=np.column_stack([token, following]),
                        masses=np.column_stack([masses, missing]), of_next=of_next,
                        table=self._table[:, :longest])


def _read_vocabulary(sizes: tuple[int, int, int], keys: np.ndarray, mass: np.ndarray, is_own: np.ndarray,
           heard: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the own next token and the k - 1 most probable ids of each of n rows, filled up with others of
    no probability."""
    n, vocab_size, k = sizes
    ids, logprobs = np.tile(np.arange(k), (n, 1)), np.full((n, k), NOTHING, np.float32)
    rows = keys // vocab_size
    # By row, the own next token first, then by probability.
    order = np.lexsort((-mass, ~is_own, rows))
    starts = np.searchsorted(rows[order], np.arange(n))
    rank = np.arange(len(order)) - starts[rows[order]]
    selected = order[rank < k]
    counts = np.bincount(rows[selected], minlength=n)
    place = np.arange(len(selected)) - np.concatenate([[0], counts.cumsum()])[rows[selected]]
    with np.errstate(divide="ignore"):
        logprobs[rows[selected], place] = np.log(mass[selected]).clip(min=NOTHING)
    chosen = keys[selected] % vocab_size
    ids[rows[selected], place] = chosen
    for row in np.flatnonzero((counts > 0) & (counts < k)).tolist():
        taken = set(ids[row, :counts[row]].tolist())
        # Ids of a row must be distinct: a student's logit counts once.
        fill = (token for token in range(vocab_size) if token not in taken)
        ids[row, counts[row]:] = [next(fill) for _ in range(k - counts[row])]
    unheard = np.ones(n, bool)
    unheard[heard] = False
    logprobs[unheard, 0] = UNHEARD
    return torch.from_numpy(ids), torch.from_numpy(logprobs)


def _open_checked(folder: Path) -> Tokenizer:
    read_tokenizer(folder)  # says what is wrong with it
    return open_tokenizer(folder)


def _decode_bytes(text: bytes) -> str | None:
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
    end, their_end = _find_eos_id(student, mine), _find_eos_id(teacher, other)
    return same if end is None or their_end is None else {**same, end: their_end}


def _find_eos_id(folder: Path, special: dict[str, int]) -> int | None:
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return special.get(named["content"] if isinstance(named, dict) and "content" in named else str(named))


def _find_runs(ids: Sequence[int], specials: dict[int, int]) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for token in ids:
        if token in specials:
            runs.append((True, [token]))
        elif runs and not runs[-1][0]:
            runs[-1][1].append(token)
        else:
            runs.append((False, [token]))
    return runs


@dataclass(frozen=True)
class SpellingPrefixes:
    """A text up to some of its symbols."""

    whole: Array
    """[n] log-probability of it, given the text's first token; NaN before that ends."""
    goes_on: Array
    """[n] the share of it that goes on with a symbol which was asked for, or may."""
    unknown: Array
    """[n] what may be missing of it, as a share."""


@dataclass(frozen=True)
class SpellingTree:
    """What a model says behind each of the m tokens of a text."""

    ends: Array
    """[m] int64: symbols of the text up to the end of each of its tokens."""
    cumulative: Array
    """[m] float64: log-probability of its tokens up to each one, given the first."""
    tokens: Array
    """[m, M] int64: what may come behind each one, the text's own next token among it."""
    masses: Array
    """[m, M] float64: how probable that is."""
    table: Array
    """[tokens of the model, L] int32: the symbols of all its tokens, `NO_SYMBOL` behind their end."""
    sizes: Array
    """[m, M] int64: symbols, at most L, of what may come."""
    agrees: Array
    """[m, M] int64: symbols, at most L, in which what may come is the text."""

    @classmethod
    def build(cls, text: Array, ends: Array, tokens: Array, masses: Array, of_next: Array, table: Array
           ) -> SpellingTree:
        """Lay what may come behind each token beside the text.

        Args:
            text: [n] its symbols: bytes, and a number beyond 255 for each special token.
            ends, tokens, masses, table: as in the class.
            of_next: [m] the log-probability of the text's own next token; anything for the last.
        """
        length = table.shape[1]
        # Beyond the text stands a number that is no symbol and no filling either, so nothing agrees there.
        padded = np.concatenate([text, np.full(length, NO_SYMBOL - 1)])
        agrees = np.empty(tokens.shape, np.int64)
        for first in range(0, len(ends), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            window = padded[ends[rows, None] + np.arange(length)]
            agrees[rows] = np.logical_and.accumulate(table[tokens[rows]] == window[:, None], axis=2).sum(2)
        sizes = (table != NO_SYMBOL).sum(1)[tokens]
        cumulative = np.concatenate([[0.0], np.cumsum(of_next[:-1])])
        return cls(ends=ends, cumulative=cumulative, tokens=tokens, masses=masses, table=table, sizes=sizes,
                   agrees=agrees)

    def find_prefixes(self, stops: Array, asked: Array) -> SpellingPrefixes:
        """Return how probable the text is up to some of its symbols, and that it goes on with some others.

        Args:
            stops: [n] symbols of the text, rising.
            asked: [n, symbols] bool: which symbols are asked for behind each; of those beyond, the last
                column says.
        """
        chunks = [self._select_spellings(stops[first:first + CHUNK_ROWS], asked[first:first + CHUNK_ROWS])
                 for first in range(0, len(stops), CHUNK_ROWS)]
        complete, goes_on, unknown = (np.concatenate(part) for part in zip(*chunks, strict=True))
        return SpellingPrefixes(complete, goes_on, unknown)

    def _select_spellings(self, stops: Array, asked: Array) -> tuple[Array, Array, Array]:
        stop, token = self._match_pairs(stops)
        length = (stops[stop] - self.ends[token])[:, None]
        last = np.searchsorted(self.ends, stops, side="right") - 1
        # Relative to the text up to the stop, since absolute probabilities of long texts underflow.
        weight = np.exp(self.cumulative[token] - self.cumulative[last[stop]])[:, None]
        agrees, symbols = self.agrees[token], self.table.shape[1]
        mass = weight * self.masses[token]
        # A token reaches a stop if it agrees with the text up to there, and may go on differently after.
        reaches = mass * (agrees >= length)
        symbol = self.table[self.tokens[token], np.minimum(length, symbols - 1)]
        goes_on = (length < symbols) & (symbol != NO_SYMBOL) & asked[
            stop[:, None], symbol.clip(max=asked.shape[1] - 1)]
        # tokens that are not the text's own, and end at a stop, or before it, inside of one that is
        inside = (token == last[stop])[:, None] & (length > 0)
        sizes = self.sizes[token]
        ended = inside & (agrees == sizes) & (sizes > 0)
        unknown = ended & (sizes == length) & np.asarray(asked.any(1))[stop, None]

        def over(values: Array) -> Array:
            """Return [n] sums of what is there of each stop."""
            return np.bincount(stop, values.sum(1), len(stops))

        total = over(reaches * (length > 0))
        total[stops == self.ends[0]] = 1.0  # the first token is given
        total[last < 0] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.cumulative[last] + np.log(total), over(reaches * goes_on + mass * unknown) / total,
                    over(mass * (ended & (sizes < length))) / total)

    def _match_pairs(self, stops: Array) -> tuple[Array, Array]:
        """Return each stop with all tokens of the text behind which one token may reach it."""
        # No token is longer than the table, so earlier ones cannot reach.
        first = np.searchsorted(self.ends, stops - self.table.shape[1], side="left")
        last = np.searchsorted(self.ends, stops, side="right")
        counts = last - first
        stop = np.repeat(np.arange(len(stops)), counts)
        return stop, np.arange(len(stop)) - np.repeat(counts.cumsum() - counts - first, counts)


def spelling_table(texts: Sequence[Sequence[int]], longest: int) -> Array:
    """Return [tokens, longest] int32 symbols of tokens, cut at a length, `NO_SYMBOL` behind their end."""
    table = np.full((len(texts), longest), NO_SYMBOL, np.int32)
    for row, text in zip(table, texts, strict=True):
        row[:min(len(text), longest)] = list(text[:longest])
    return table
