"""What needles are made of in a tokenizer's ids: rare words, tied together in pairs,
and the sentences around them.

A key is two words, and so is a value.  Pairs and sentences for training and for testing never mix
(`needle_phrases`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.phrases import Language, Phrases, is_for_tests, phrases

NUM_WORDS, MIN_WORDS, MAX_WORDS = 64, 16, 512
TOKENS_PER_WORD = 64
"""A vocabulary of this many times `NUM_WORDS` has more words, so that long contexts find enough keys."""
MIN_WORD_BYTES = 4
SLOT = "{}"
Slots = tuple[tuple[int, ...], ...]
"""A phrase as token ids: what stands before, between and behind its pairs."""


@dataclass(frozen=True)
class Sentences:
    """`needle_phrases.Phrases` in token ids."""

    statement: Slots
    all_values: Slots
    values_of: Slots
    assignment: Slots
    holders: Slots


def fill(slots: Slots, *pairs: np.ndarray) -> list[int]:
    """Return a phrase with pairs [2] in its places; fewer pairs than places end it before the next one."""
    ids = list(slots[0])
    for place, pair in enumerate(pairs, start=1):
        ids += pair.tolist()
        if place < len(pairs) or place == len(slots) - 1:
            ids += slots[place]
    return ids


@dataclass(frozen=True, eq=False)
class NeedleForm:
    """The parts of a language's needles as token ids."""

    language: Language
    """Of the sentences; words are of it too where the tokenizer has enough of them."""
    sentences: dict[bool, tuple[Sentences, ...]]
    """True -> for tests, False -> for training."""
    words: tuple[int, ...]
    """Tokens that are whole words."""
    special: tuple[int, ...] = ()
    """Special tokens, which no haystack may hold."""

    def phrase_tokens(self, name: str, *, test: bool) -> int:
        """Return the tokens of the longest phrase of a name, its pairs included."""
        return max(2 * (len(slots) - 1) + sum(map(len, slots)) for s in self.sentences[test]
                   for slots in [getattr(s, name)])

    @cached_property
    def pairs(self) -> dict[bool, np.ndarray]:
        """Ordered pairs of different words [pairs, 2]: True -> for tests, False -> for training."""
        found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for first in self.words:
            for second in self.words:
                if first != second:
                    found[is_for_tests(first, second)].append((first, second))
        return {test: np.array(pairs, np.int64).reshape(-1, 2) for test, pairs in found.items()}

    def draw(self, generator: np.random.Generator, count: int, *, test: bool) -> np.ndarray:
        """Return `count` different pairs [count, 2]."""
        return self.pairs[test][generator.choice(len(self.pairs[test]), count, replace=False)]

    def draw_sentences(self, generator: np.random.Generator, *, test: bool) -> Sentences:
        return self.sentences[test][int(generator.integers(len(self.sentences[test])))]


def needle_form(tokenizer_folder: Path, language: Language) -> NeedleForm:
    """Return the needle's parts in a tokenizer's ids; its words are the rarest whole ones,
    which are those merged last.

    Raises:
        UserError: there is no tokenizer, or it has too few whole words.
    """
    tokenizer = open_tokenizer(tokenizer_folder)
    special = special_tokens(tokenizer)
    words = _words(tokenizer, special, _SCRIPTS[language])
    if len(words) < MIN_WORDS:
        words = _words(tokenizer, special, lambda letter: True)
    if len(words) < MIN_WORDS:
        raise UserError(f"{tokenizer_folder}: only {len(words)} of its tokens are whole words, "
                        f"needles need {MIN_WORDS}; train a tokenizer with a larger vocabulary")

    def slots(text: str) -> Slots:
        return tuple(tuple(tokenizer.encode(part, add_special_tokens=False).ids) if part else ()
                     for part in text.split(SLOT))

    def sentences(form: Phrases) -> Sentences:
        return Sentences(**{name: slots(text) for name, text in form.texts().items()})

    return NeedleForm(language,
                      {test: tuple(map(sentences, phrases(language, test=test))) for test in (True, False)},
                      tuple(words), special)


def special_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(sorted(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special))


_SCRIPTS: dict[Language, Callable[[str], bool]] = {
    "english": str.isascii, "code": str.isascii,
    "korean": lambda letter: "\uac00" <= letter <= "\ud7a3",
    "thai": lambda letter: "\u0e00" <= letter <= "\u0e7f",
}


def _words(tokenizer: Tokenizer, special: tuple[int, ...], of_script: Callable[[str], bool]) -> list[int]:
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=False)
    wanted = min(MAX_WORDS, max(NUM_WORDS, vocabulary // TOKENS_PER_WORD))
    words: list[int] = []
    for token in range(vocabulary - 1, -1, -1):
        if len(words) == wanted:
            break
        if token not in special and _is_whole_word(tokenizer, token, of_script):
            words.append(token)
    return words


def _is_whole_word(tokenizer: Tokenizer, token: int, of_script: Callable[[str], bool]) -> bool:
    text = tokenizer.decode([token], skip_special_tokens=False)
    word = text[1:]
    return (text[:1] == " " and len(word.encode()) >= MIN_WORD_BYTES
            and unicodedata.category(word[0]) in ("Ll", "Lu", "Lo")
            and all(unicodedata.category(letter)[0] in "LM" and of_script(letter) for letter in word)
            and tokenizer.encode(text, add_special_tokens=False).ids == [token])
