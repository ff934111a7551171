"""Fixtures: small tokenizers with chosen merges and defects, vocabularies trained in memory, textbook BPE."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.command_output import Main
from tokenizer import cli
from tokenizer.bpe.count_pipeline import learn_superwords, learn_words
from tokenizer.bpe.counting import WordTable
from tokenizer.bpe.splitter import Splitter
from tokenizer.bpe.vocabulary import Vocabulary
from tokenizer.formats.hf_files import build_tokenizer
from tokenizer.formats.reader import LoadedTokenizer
from tokenizer.presets import NUM_BYTES, Preset

SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
GAP = "Ġ"  # a space in the byte-level alphabet
PAIRS = [("t", "h"), ("th", "e"), (GAP, "the"), (GAP, "a"), ("i", "n"), ("o", "n"), ("e", "r")]

Build = Callable[..., Path]


@pytest.fixture
def cli_main() -> Main:
    return cli.main


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A function that writes the tokenizer.json of a byte-level BPE tokenizer and returns its folder.

    Args of the function:
        name: Name of the new folder.
        pairs: Merges, in the characters of the byte-level alphabet.
        split: Split pattern.
        without: Characters of the alphabet that the vocabulary lacks.
        special, added: Special and added tokens.
    """

    def write(name: str = "plain", *, pairs: list[tuple[str, str]] = PAIRS, split: str = SPLIT,
              without: str = "", special: tuple[str, ...] = ("<|end|>",),
              added: tuple[str, ...] = ()) -> Path:
        alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
        tokens = [*alphabet, *(a + b for a, b in pairs)]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        return tmp_path / name

    return write


@pytest.fixture
def heldout(tmp_path: Path) -> dict[str, Path]:
    """Name -> file of two small held-out texts."""
    english = ["The other man in there was on the train.", "a theme, then another in 2026", "x\n\n    y = 10"]
    (tmp_path / "english.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in english),
                                            encoding="utf-8")
    (tmp_path / "thai.txt").write_text("กำลังที่นี้ผู้ใหญ่เก็บน้ำผึ้ง", encoding="utf-8")
    return {"english": tmp_path / "english.jsonl", "thai": tmp_path / "thai.txt"}


Pair = tuple[bytes, bytes]


def build_word_table(words: Counter[bytes]) -> WordTable:
    """Return a table of words, the most frequent first."""
    by_count = sorted(words.items(), key=lambda e: -e[1])
    return WordTable(np.frombuffer(b"".join(w for w, _ in by_count), np.uint8),
                     np.array([len(w) for w, _ in by_count], np.int64),
                     np.array([n for _, n in by_count], np.int64), 1, 0, 0.0)


@pytest.fixture(scope="session")
def learn() -> Callable[..., Vocabulary]:
    """A function `(preset, num_tokens, texts, transition=None, only=False)` that trains a vocabulary of bytes
    and merges, without special tokens.

    From `transition` tokens on, merges may join words; with `only` they must.
    """
    def learn(preset: Preset, num_tokens: int, texts: Iterable[str], transition: int | None = None,
              only: bool = False) -> Vocabulary:
        vocabulary = Vocabulary(preset.max_token_bytes)
        texts = list(texts)

        def count(pattern: str) -> WordTable:
            splitter = Splitter(preset, pattern)
            return build_word_table(Counter(piece.encode() for text in texts
                                            for piece in splitter.split_text(splitter.normalize(text))))

        learn_words(count(preset.split_pattern), vocabulary, transition or num_tokens, preset, lambda n: None)
        if transition:
            learn_superwords(count(preset.final_pattern), vocabulary, num_tokens, preset.max_superword_words,
                             only, lambda n: None)
        return vocabulary

    return learn


@pytest.fixture(scope="session")
def build_trained_tokenizer(learn: Callable[..., Vocabulary]) -> Callable[..., Tokenizer]:
    """A function `(preset, vocab_size, texts)` that trains a tokenizer; special tokens in text are text."""
    def build_trained_tokenizer(preset: Preset, vocab_size: int, texts: Iterable[str]) -> Tokenizer:
        trained = build_tokenizer(preset, learn(preset, vocab_size - preset.num_special_ids, texts))
        trained.encode_special_tokens = True
        return trained

    return build_trained_tokenizer


class BruteForce:
    """Textbook BPE: count all pairs, merge the best, repeat. The best pair is the most frequent; ties go to
    the lower left id, then the lower right id. Ids follow the byte characters of `tokenizers`, then the order
    of merges."""

    def __init__(self, alphabet: list[bytes], max_token_bytes: int) -> None:
        self.ids = {b: i for i, b in enumerate(alphabet)}
        self.merges: list[Pair] = []
        self.max_token_bytes = max_token_bytes

    def encode(self, word: bytes) -> tuple[bytes, ...]:
        """Apply all merges in their order."""
        parts = tuple(bytes([b]) for b in word)
        for pair in self.merges:
            parts = self._join(parts, pair)
        return parts

    def learn(self, words: Counter[tuple[bytes, ...]], num_tokens: int,
              allowed: Callable[[bytes], bool] = lambda token: True) -> None:
        """Merge until there are `num_tokens` tokens or every pair occurs less than twice."""
        while len(self.ids) < num_tokens:
            pairs: Counter[Pair] = Counter()
            for word, times in words.items():
                for pair in pairwise(word):
                    pairs[pair] += times
            candidates = [(-count, self.ids[a], self.ids[b], (a, b)) for (a, b), count in pairs.items()
                          if count >= 2 and len(a + b) <= self.max_token_bytes and allowed(a + b)]
            if not candidates:
                return
            *_, best = min(candidates)
            self.merges.append(best)
            self.ids[b"".join(best)] = len(self.ids)
            merged: Counter[tuple[bytes, ...]] = Counter()
            for word, times in words.items():
                merged[self._join(word, best)] += times
            words = merged

    @staticmethod
    def _join(word: tuple[bytes, ...], pair: Pair) -> tuple[bytes, ...]:
        out, i = [], 0
        while i < len(word):
            if word[i : i + 2] == pair:
                out.append(word[i] + word[i + 1])
                i += 2
            else:
                out.append(word[i])
                i += 1
        return tuple(out)


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., list[Pair]]:
    """A function with the arguments of `learn` that returns the merges of `BruteForce`."""
    def brute_force(preset: Preset, num_tokens: int, texts: list[str], transition: int | None = None,
                    only: bool = False) -> list[Pair]:
        def count_pieces(pattern: str) -> Counter[bytes]:
            return Counter(match.group().encode() for text in texts
                           for match in regex.finditer(pattern, text))

        # the byte-level alphabet starts with the bytes that keep their own character
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(NUM_BYTES) if byte not in printable]
        textbook = BruteForce([bytes([byte]) for byte in printable + others], preset.max_token_bytes)
        words = count_pieces(preset.split_pattern)
        by_bytes = Counter({tuple(bytes([byte]) for byte in word): count for word, count in words.items()})
        textbook.learn(by_bytes, transition or num_tokens)
        if transition:
            superwords = count_pieces(preset.superword_pattern)
            for min_words in (2, 0) if only else (0,):
                def is_allowed(token: bytes, min_words: int = min_words) -> bool:
                    num_words = len([word for word in token.split(b" ") if word])
                    return min_words <= num_words <= preset.max_superword_words

                textbook.learn(Counter({textbook.encode(word): count for word, count in superwords.items()}),
                               num_tokens, is_allowed)
        return textbook.merges

    return brute_force


class Toy(LoadedTokenizer):
    """A tokenizer that takes the longest token at each position. Special tokens are never in text."""

    library = "toy"

    def __init__(self, longer: tuple[bytes, ...], special: tuple[str, ...],
                 change: Callable[[str], str]) -> None:
        """Build the vocabulary: 256 bytes, longer tokens, special tokens.

        Args:
            longer: tokens of several bytes, from id 256 on.
            special: special tokens, after `longer`.
            change: modifies text before encoding; a hidden defect, not a declared normalization.
        """
        self.path, self.name = Path("toy"), "toy"
        self.tokens = dict(enumerate([*(bytes([b]) for b in range(256)), *longer]))
        self.special = dict(enumerate(special, len(self.tokens)))
        self.added: dict[int, str] = {}
        self.change = change
        self._ids = {token: id_ for id_, token in self.tokens.items()}
        self._longest = max(map(len, self._ids))

    def encode(self, text: str) -> list[int]:
        raw, ids, at = self.change(text).encode(), [], 0
        while at < len(raw):
            size = next(n for n in range(self._longest, 0, -1) if raw[at:at + n] in self._ids)
            ids.append(self._ids[raw[at:at + size]])
            at += size
        return ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_special(self, text: str) -> list[int]:
        for id_, token in self.special.items():
            if token in text:
                before, _, after = text.partition(token)
                return [*self.encode_special(before), id_, *self.encode_special(after)]
        return self.encode(text)

    def normalize(self, text: str) -> str:
        return text

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", errors="replace")


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """A function `(*longer, special=(), change=...)` that returns a `Toy`; tokens may be texts."""

    def build_toy(*longer: str | bytes, special: tuple[str, ...] = (),
                  change: Callable[[str], str] = lambda t: t) -> Toy:
        return Toy(tuple(t.encode() if isinstance(t, str) else t for t in longer), special, change)

    return build_toy
