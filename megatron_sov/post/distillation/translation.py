"""Translates teacher probabilities to the tokens of a student with another tokenizer, byte by byte.

The teacher assigns a probability to the text up to any byte, for any choice of tokens (`SpellingTree`). The
next token of the student has the ratio of two prefix probabilities: of the text with and without the token.
If a teacher token ends where the student token ends, the teacher distribution there gives more: a token with
equal bytes on both sides has the probability of the teacher token, unless a longer token of either side hides
it (`TokenTranslation.equal_tokens`). Example of a hidden token: " a", if the student has " asks" and the
teacher writes " a", "s", "k", "s". The remaining probability is one further event, see
`TeacherTopK.keep_remainder`.

A row has no teacher output (`NO_OUTPUT`) if the student token before or after it might have been part of a
longer token: a student that writes " b" and not " brown" restricts the text that follows, and bytes do not
express the restriction.

Products of token probabilities (merged spans: GOLD, Patiño et al. 2025, "Unlocking on-policy distillation
for any model family") would be wrong: if the teacher writes " a" before some words, and " a " as one token
before others, its token " a" has only a part of the probability of the text " a".

The probability of a text up to a byte is the sum over all token sequences whose last token reaches the byte
(covers: Vieira et al. 2024, "From language models over tokens to language models over characters"; Phan et
al. 2024, "Exact byte-level probabilities from tokenized language models for FIM-tasks and model ensembles").
`SpellingTree` sums the sequences that leave the teacher tokens of the document with the last token. Sequences
with a token that ends inside a token of the document are missing, since the teacher has not computed the
distribution after them; `PrefixProbabilities.missing` bounds their share.
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

NO_OUTPUT = 1.0
"""First log-probability in a row without teacher output; real log-probabilities are never positive."""
PADDING_LOGPROB = -1e4
"""Log-probability for ids that pad a row."""
MAX_HIDDEN = 0.05
"""Limit for `PrefixProbabilities.extended` and `PrefixProbabilities.missing` at both ends of a token."""
MAX_SYMBOLS = 64
"""Symbols per teacher token that are compared with the text."""
NO_SYMBOL = -1
"""Padding after a spelling."""
CHUNK_ROWS = 256
"""Teacher tokens, or stops, per numpy operation, to bound the memory."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TranslatedDocument:
    """A document in teacher tokens. Symbols are bytes, and a number above 255 per shared special token."""

    ids: list[int]
    """Teacher token ids."""
    aligned: np.ndarray
    """[student tokens] int64: index of the teacher token that ends at the same symbol, otherwise -1."""
    text: np.ndarray
    """[symbols] int64."""
    ends: np.ndarray
    """[teacher tokens] int64: symbols up to the end of the token."""
    student_ends: np.ndarray
    """[student tokens] int64: symbols up to the end of the token."""


class TokenTranslation:
    """Translates documents to teacher tokens, and teacher probabilities to student tokens."""

    def __init__(self, student: Path, teacher: Path, vocab_size: int, teacher_vocab_size: int) -> None:
        """Read both tokenizers from their folders."""
        self._student, self._teacher = _open_checked(student), _open_checked(teacher)
        self._teacher_folder = teacher
        self._student_bytes = read_token_bytes(student, vocab_size)
        self._teacher_bytes = read_token_bytes(teacher, teacher_vocab_size)
        # Reversed: of tokens with equal bytes the lowest id stays.
        self._student_ids = {text: token for token, text in reversed(list(enumerate(self._student_bytes)))
                             if text}
        self._longest = max(map(len, self._student_ids), default=0)
        self._specials = _match_specials(student, teacher, self._student, self._teacher)
        """Student id -> teacher id, for shared special tokens."""
        self.first_tokens = self._find_first_tokens()
        """[teacher ids] int64: first student token in the teacher token's text; -1 for none."""
        self.equal_tokens = self._find_equal_tokens()
        """[teacher ids] int64: student token with the same meaning; -1 for none."""
        self._symbols = {token: 256 + i for i, token in enumerate(sorted(self._specials))}
        self._spellings = self._build_spellings()
        self._hiding_symbols = self._find_hiding_symbols()

    def _find_first_tokens(self) -> np.ndarray:
        first = np.full(len(self._teacher_bytes), -1, np.int64)
        texts = {token: text for token, text in enumerate(self._teacher_bytes) if text}
        decoded = {token: _decode_bytes(text) for token, text in texts.items()}
        complete = [token for token, text in decoded.items() if text is not None]
        encoded = self._student.encode_batch([decoded[token] for token in complete], add_special_tokens=False)
        for token, encoding in zip(complete, encoded, strict=True):
            first[token] = encoding.ids[0] if encoding.ids else -1
        for token in texts.keys() - set(complete):  # a part of a character
            first[token] = self._find_longest_prefix(texts[token])
        for student_id, teacher_id in self._specials.items():
            if teacher_id < len(first):
                first[teacher_id] = student_id
        first[first >= len(self._student_bytes)] = -1
        return first

    def _find_equal_tokens(self) -> np.ndarray:
        """Match special tokens, and tokens with equal bytes that begin no longer token."""
        equal = np.full(len(self._teacher_bytes), -1, np.int64)
        decoded = {token: text for token, text in enumerate(map(_decode_bytes, self._student_bytes)) if text}
        encoded = self._teacher.encode_batch(list(decoded.values()), add_special_tokens=False)
        # Tokens of the other side that begin with a token; the count includes the token itself.
        num_begun_by_teacher = np.bincount([e.ids[0] for e in encoded if e.ids], minlength=len(equal))
        num_begun_by_student = np.bincount(self.first_tokens[self.first_tokens >= 0],
                                           minlength=len(self._student_bytes))
        for teacher_id, text in enumerate(self._teacher_bytes):
            student_id = self._student_ids.get(text, -1) if text else -1
            if student_id < 0 or num_begun_by_student[student_id] > 1:
                continue
            if num_begun_by_teacher[teacher_id] <= 1:
                equal[teacher_id] = student_id
        for student_id, teacher_id in self._specials.items():
            if teacher_id < len(equal):
                equal[teacher_id] = student_id
        return equal

    def _build_spellings(self) -> np.ndarray:
        """Return the teacher tokens' symbols, [teacher ids, symbols] int32."""
        texts: list[Sequence[int]] = [text or b"" for text in self._teacher_bytes]
        for student_id, teacher_id in self._specials.items():
            if teacher_id < len(texts):
                texts[teacher_id] = [self._symbols[student_id]]
        return build_spelling_table(texts, min(MAX_SYMBOLS, max(map(len, texts), default=1)))

    def _find_hiding_symbols(self) -> np.ndarray:
        """Return whether a student token followed by a byte may belong to a longer token, [student ids, 257]
        bool; the last column, for special tokens, is False."""
        hiding = np.zeros((len(self._student_bytes), 257), bool)
        for text in self._student_ids:
            for n in range(1, len(text)):
                if (token := self._student_ids.get(text[:n], -1)) >= 0:
                    hiding[token, text[n]] = True
        return hiding

    def _find_longest_prefix(self, text: bytes) -> int:
        for n in range(min(len(text), self._longest), 0, -1):
            if text[:n] in self._student_ids:
                return self._student_ids[text[:n]]
        return -1

    def translate_document(self, ids: Sequence[int]) -> TranslatedDocument:
        """Encode the student tokens' text by the teacher; shared special tokens stay, others become text.
        Raises `UserError`: the bytes are not UTF-8, or the tokenizer of the teacher changes the text."""
        teacher_ids: list[int] = []
        lengths: list[int] = []
        student_lengths: list[int] = []
        text: list[int] = []
        for is_special, run in _split_at_specials(ids, self._specials):
            if is_special:
                teacher_ids.append(self._specials[run[0]])
                lengths.append(1)
                student_lengths.append(1)
                text.append(self._symbols[run[0]])
                continue
            # Special tokens of the student alone become text.
            spelled = [self._student_bytes[token] or (self._student.id_to_token(token) or "").encode()
                       for token in run]
            student_lengths += map(len, spelled)
            text += b"".join(spelled)
            encoded = self._encode_text(b"".join(spelled))
            teacher_ids += [token for token, _ in encoded]
            lengths += [length for _, length in encoded]
        ends, student_ends = np.cumsum(lengths, dtype=np.int64), np.cumsum(student_lengths, dtype=np.int64)
        # The last teacher token that ends no later than the student token.
        place = np.searchsorted(ends, student_ends, side="right") - 1
        is_aligned = place >= 0
        if len(ends):
            is_aligned &= ends[np.maximum(place, 0)] == student_ends
        return TranslatedDocument(teacher_ids, np.where(is_aligned, place, -1), np.asarray(text, np.int64),
                                  ends, student_ends)

    def _encode_text(self, text: bytes) -> list[tuple[int, int]]:
        """Return (teacher id, byte count) per token in `text`."""
        decoded = _decode_bytes(text)
        if decoded is None:
            raise UserError("a document is not UTF-8: the tokenizer of the teacher cannot read it; pack text")
        ids = self._teacher.encode(decoded, add_special_tokens=False).ids
        lengths = [len(self._teacher_bytes[token]) for token in ids]
        if sum(lengths) == len(text) + 1 and self._teacher_bytes[ids[0]].startswith(b" "):
            lengths[0] -= 1  # the space that sentencepiece inserts before a text
        if sum(lengths) != len(text):
            raise UserError(f"{self._teacher_folder / TOKENIZER_JSON}: changes texts while encoding "
                            f"({len(text)} bytes became {sum(lengths)}), so its tokens cannot be aligned "
                            "with those of the student; choose a teacher whose tokenizer keeps the bytes")
        return list(zip(ids, lengths, strict=True))

    def translate_rows(self, document: TranslatedDocument, ids: Sequence[int], tokens: torch.Tensor,
                       logprobs: torch.Tensor, next_logprobs: torch.Tensor, k: int
                       ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher distribution in student tokens, after every student token in a document.

        Args:
            document: from `translate_document`.
            ids: the n student token ids of the document.
            tokens: [m, M] most probable teacher tokens after every teacher token.
            logprobs: [m, M] log-probabilities of `tokens`.
            next_logprobs: [m] log-probability of the next teacher token in the document; the last is unused.
            k: tokens per row.

        Returns:
            [n, k] int64 ids, distinct in a row, the next token of the document first; and [n, k] float32
            log-probabilities, with `NO_OUTPUT` first in rows without teacher output.
        """
        n, vocab_size = len(ids), len(self._student_bytes)
        # float64, because sums of small probabilities are divided by one another.
        tree = self._build_tree(document, tokens.numpy(), np.exp(logprobs.double().numpy()),
                                next_logprobs.double().numpy())
        prefixes = tree.compute_prefixes(document.student_ends, self._hiding_symbols[np.asarray(ids)])
        prefix_logprobs = prefixes.logprobs
        # NaN fails both comparisons.
        is_clear = (prefixes.extended <= MAX_HIDDEN) & (prefixes.missing <= MAX_HIDDEN)
        # p(next token) = p(text with the token) / p(text without the token)
        next_masses = np.append(np.exp(prefix_logprobs[1:] - prefix_logprobs[:-1]), np.nan)
        # Both ends of the next token must be clear.
        valid = np.flatnonzero(is_clear & np.append(is_clear[1:], False) & np.isfinite(next_masses))
        ends = valid[document.aligned[valid] >= 0]
        rows, place = np.repeat(ends, tokens.shape[1]), document.aligned[ends]
        # Share of the token sequences for the text so far in which a teacher token ends here.
        ending = np.exp(tree.cumulative[place] - prefix_logprobs[ends])
        masses = (ending[:, None] * tree.masses[place][:, :tokens.shape[1]]).ravel()
        candidates, next_ids = tokens.numpy()[place].ravel(), np.append(np.asarray(ids)[1:], -1)
        # The next token of the document gets the ratio, which counts every token sequence.
        is_other = (self.equal_tokens[candidates] >= 0) & (self.equal_tokens[candidates] != next_ids[rows])
        keys = np.concatenate([valid * vocab_size + next_ids[valid],
                               rows[is_other] * vocab_size + self.equal_tokens[candidates[is_other]]])
        # Probabilities of a row sum to at most 1: the next token gets at most the remainder.
        remaining = 1 - np.bincount(rows[is_other], masses[is_other], n)[valid]
        masses = np.concatenate([next_masses[valid].clip(max=remaining.clip(min=0.0)), masses[is_other]])
        return _select_top_k((n, vocab_size, k), keys, masses, np.arange(len(keys)) < len(valid), valid)

    def _build_tree(self, document: TranslatedDocument, tokens: np.ndarray, masses: np.ndarray,
                    next_logprobs: np.ndarray) -> SpellingTree:
        """Build the tree with `tokens` and the document's next token."""
        longest = int(np.diff(document.ends, prepend=0).max()) + 1
        following = np.append(np.asarray(document.ids[1:], np.int64), 0)
        contains_next = (tokens == following[:, None]).any(1)
        contains_next[-1:] = True  # no token follows the last token
        missing = np.where(contains_next, 0.0, np.exp(next_logprobs))
        return SpellingTree.build(document.text, document.ends, tokens=np.column_stack([tokens, following]),
                                  masses=np.column_stack([masses, missing]), next_logprobs=next_logprobs,
                                  table=self._spellings[:, :longest])


def _select_top_k(sizes: tuple[int, int, int], keys: np.ndarray, masses: np.ndarray, is_next: np.ndarray,
                  valid: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the next token and the k - 1 most probable ids per row, padded with ids of probability 0.

    Args:
        sizes: (n, vocab_size, k).
        keys: [candidates] row * vocab_size + id.
        masses: [candidates] probabilities.
        is_next: [candidates] whether the id is the next token of the document.
        valid: rows with teacher output.
    """
    n, vocab_size, k = sizes
    ids, logprobs = np.tile(np.arange(k), (n, 1)), np.full((n, k), PADDING_LOGPROB, np.float32)
    rows = keys // vocab_size
    # By row, the next token of the document first, then by probability.
    order = np.lexsort((-masses, ~is_next, rows))
    starts = np.searchsorted(rows[order], np.arange(n))
    rank = np.arange(len(order)) - starts[rows[order]]
    selected = order[rank < k]
    counts = np.bincount(rows[selected], minlength=n)
    place = np.arange(len(selected)) - np.concatenate([[0], counts.cumsum()])[rows[selected]]
    with np.errstate(divide="ignore"):
        logprobs[rows[selected], place] = np.log(masses[selected]).clip(min=PADDING_LOGPROB)
    ids[rows[selected], place] = keys[selected] % vocab_size
    for row in np.flatnonzero((counts > 0) & (counts < k)).tolist():
        used = set(ids[row, :counts[row]].tolist())
        # Ids in a row must be distinct, because a student logit counts once.
        fill = (token for token in range(vocab_size) if token not in used)
        ids[row, counts[row]:] = [next(fill) for _ in range(k - counts[row])]
    has_no_output = np.ones(n, bool)
    has_no_output[valid] = False
    logprobs[has_no_output, 0] = NO_OUTPUT
    return torch.from_numpy(ids), torch.from_numpy(logprobs)


def _open_checked(folder: Path) -> Tokenizer:
    read_tokenizer(folder)  # raises `UserError` with the reason
    return open_tokenizer(folder)


def _decode_bytes(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _match_specials(student: Path, teacher: Path, student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
                    ) -> dict[int, int]:
    """Return student id -> teacher id for special tokens with equal text, and for the tokens that end a
    document (`eos_token`)."""
    student_ids, teacher_ids = _read_specials(student_tokenizer), _read_specials(teacher_tokenizer)
    matches = {student_ids[text]: teacher_ids[text] for text in student_ids.keys() & teacher_ids.keys()}
    student_end, teacher_end = _find_eos_id(student, student_ids), _find_eos_id(teacher, teacher_ids)
    if student_end is not None and teacher_end is not None:
        matches[student_end] = teacher_end
    return matches


def _read_specials(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()
            if token.special}


def _find_eos_id(folder: Path, specials: dict[str, int]) -> int | None:
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return specials.get(named["content"] if isinstance(named, dict) and "content" in named else str(named))


def _split_at_specials(ids: Sequence[int], specials: dict[int, int]) -> list[tuple[bool, list[int]]]:
    """Split `ids` into (True, [special token]) and (False, other consecutive tokens)."""
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
class PrefixProbabilities:
    """Text probabilities up to n stops (symbol counts)."""

    logprobs: Array
    """[n] text log-probability up to the stop, given the first token; NaN before the first token ends."""
    extended: Array
    """[n] share of `logprobs` in which a requested symbol follows, or may follow."""
    missing: Array
    """[n] bound for the missing probability, as a share of `logprobs`."""


@dataclass(frozen=True)
class SpellingTree:
    """Candidate next tokens after the m tokens in a text, compared with the text by symbols."""

    ends: Array
    """[m] int64: symbols up to the end of the token."""
    cumulative: Array
    """[m] float64: log-probability of the tokens up to this one, given the first."""
    tokens: Array
    """[m, M] int64: candidates, including the text's next token."""
    masses: Array
    """[m, M] float64: candidate probabilities."""
    table: Array
    """[vocabulary, L] int32: symbols per token, padded with `NO_SYMBOL`."""
    sizes: Array
    """[m, M] int64: symbols in the candidate, at most L."""
    agrees: Array
    """[m, M] int64: leading candidate symbols that agree with the text, at most L."""

    @classmethod
    def build(cls, text: Array, ends: Array, tokens: Array, masses: Array, next_logprobs: Array, table: Array
              ) -> SpellingTree:
        """Compare the candidates with the text.

        Args:
            text: [symbols] int64.
            ends, tokens, masses, table: as in the class.
            next_logprobs: [m] log-probability of the text's next token; the last is unused.
        """
        length = table.shape[1]
        # After the text a number that is neither a symbol nor NO_SYMBOL: no candidate agrees.
        padded = np.concatenate([text, np.full(length, NO_SYMBOL - 1)])
        agrees = np.empty(tokens.shape, np.int64)
        for first in range(0, len(ends), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            window = padded[ends[rows, None] + np.arange(length)]
            agrees[rows] = np.logical_and.accumulate(table[tokens[rows]] == window[:, None], axis=2).sum(2)
        sizes = (table != NO_SYMBOL).sum(1)[tokens]
        cumulative = np.concatenate([[0.0], np.cumsum(next_logprobs[:-1])])
        return cls(ends=ends, cumulative=cumulative, tokens=tokens, masses=masses, table=table, sizes=sizes,
                   agrees=agrees)

    def compute_prefixes(self, stops: Array, requested: Array) -> PrefixProbabilities:
        """Compute the text probability up to each stop, and the share that a requested symbol extends.

        Args:
            stops: [n] numbers of symbols, increasing.
            requested: [n, symbols] bool: requested symbols after the stop; the last column stands for higher
                symbols.
        """
        chunks = [self._sum_covers(stops[first:first + CHUNK_ROWS], requested[first:first + CHUNK_ROWS])
                  for first in range(0, len(stops), CHUNK_ROWS)]
        logprobs, extended, missing = (np.concatenate(part) for part in zip(*chunks, strict=True))
        return PrefixProbabilities(logprobs, extended, missing)

    def _sum_covers(self, stops: Array, requested: Array) -> tuple[Array, Array, Array]:
        stop, token = self._match_stops(stops)
        length = (stops[stop] - self.ends[token])[:, None]
        last = np.searchsorted(self.ends, stops, side="right") - 1
        # Relative to the tokens up to the stop, since absolute probabilities of long texts underflow.
        weight = np.exp(self.cumulative[token] - self.cumulative[last[stop]])[:, None]
        agrees, num_columns = self.agrees[token], self.table.shape[1]
        mass = weight * self.masses[token]
        # A candidate covers a stop if it agrees with the text up to the stop; later symbols may differ.
        covers = mass * (agrees >= length)
        symbol = self.table[self.tokens[token], np.minimum(length, num_columns - 1)]
        is_extended = (length < num_columns) & (symbol != NO_SYMBOL) & requested[
            stop[:, None], symbol.clip(max=requested.shape[1] - 1)]
        # Candidates that end at or before a stop, inside the token of the text that covers the stop.
        is_inside = (token == last[stop])[:, None] & (length > 0)
        sizes = self.sizes[token]
        has_ended = is_inside & (agrees == sizes) & (sizes > 0)
        may_extend = has_ended & (sizes == length) & np.asarray(requested.any(1))[stop, None]

        def sum_by_stop(values: Array) -> Array:
            return np.bincount(stop, values.sum(1), len(stops))

        total = sum_by_stop(covers * (length > 0))
        total[stops == self.ends[0]] = 1.0  # the first token is given
        total[last < 0] = np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.cumulative[last] + np.log(total),
                    sum_by_stop(covers * is_extended + mass * may_extend) / total,
                    sum_by_stop(mass * (has_ended & (sizes < length))) / total)

    def _match_stops(self, stops: Array) -> tuple[Array, Array]:
        """Return pairs (stop, token): all text tokens after which one candidate may reach the stop."""
        # No candidate is longer than the table, so earlier tokens cannot reach.
        first = np.searchsorted(self.ends, stops - self.table.shape[1], side="left")
        last = np.searchsorted(self.ends, stops, side="right")
        counts = last - first
        stop = np.repeat(np.arange(len(stops)), counts)
        return stop, np.arange(len(stop)) - np.repeat(counts.cumsum() - counts - first, counts)


def build_spelling_table(texts: Sequence[Sequence[int]], longest: int) -> Array:
    """Return the first `longest` symbols per token, [tokens, longest] int32, padded with `NO_SYMBOL`."""
    table = np.full((len(texts), longest), NO_SYMBOL, np.int32)
    for row, text in zip(table, texts, strict=True):
        row[:min(len(text), longest)] = list(text[:longest])
    return table
