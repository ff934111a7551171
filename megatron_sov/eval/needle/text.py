"""What needles are made of in a tokenizer's ids: rare words, tied together in pairs,
and the sentences around them.

A key is two words, and so is a value.  Pairs and sentences for training and for testing never mix
(`is_for_tests`).  Phrases are text with places ``{}`` for keys and values; a value stands right behind its
key, so that repeating the sentence up to the key asks for the value.  Needles are hidden in a split of packed
sources, each in a language of its own.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from tokenizers import Tokenizer

from megatron_sov.base.errors import UserError
from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.model.config import Language
from megatron_sov.train.data.token_shards import Documents, Source

NUM_WORDS, MIN_WORDS, MAX_WORDS = 64, 16, 512
TOKENS_PER_WORD = 64
"""A vocabulary of this many times `NUM_WORDS` has more words, so that long contexts find enough keys."""
MIN_WORD_BYTES = 4
SLOT = "{}"
PAIR_TOKENS = 2
Slots = tuple[tuple[int, ...], ...]
"""A sentence as token ids: before, between and after its pairs."""


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
    sentences: dict[bool, tuple[Slots, ...]]
    """True -> for tests, False -> for training."""
    words: tuple[int, ...]
    special: tuple[int, ...] = ()
    """Special tokens, which no haystack may hold."""

    def needle_tokens(self, *, test: bool) -> int:
        """Return the tokens of the longest sentence, its key and value included."""
        return max(2 * PAIR_TOKENS + sum(map(len, slots)) for slots in self.sentences[test])

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

    def draw_sentence(self, generator: np.random.Generator, *, test: bool) -> Slots:
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

    return NeedleForm(language,
                      {test: tuple(map(slots, phrases(language, test=test))) for test in (True, False)},
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
    # From the last merge on: the rarest words first.
    for token in range(vocabulary - 1, -1, -1):
        if len(words) == wanted:
            break
        if token not in special and _is_whole_word(tokenizer, token, of_script):
            words.append(token)
    return words


def _is_whole_word(tokenizer: Tokenizer, token: int, of_script: Callable[[str], bool]) -> bool:
    text = tokenizer.decode([token], skip_special_tokens=False)
    word = text[1:]
    # A leading space and one token for the whole text: the word is the same token in any sentence.
    return (text[:1] == " " and len(word.encode()) >= MIN_WORD_BYTES
            and unicodedata.category(word[0]) in ("Ll", "Lu", "Lo")
            and all(unicodedata.category(letter)[0] in "LM" and of_script(letter) for letter in word)
            and tokenizer.encode(text, add_special_tokens=False).ids == [token])


LANGUAGES: tuple[Language, ...] = get_args(Language)
TEST_PART = 5
"""One pair of words, or phrase, in this many is kept for tests."""


def is_for_tests(*parts: object) -> bool:
    """Return whether something, told by its parts, is for tests alone, at whatever run and data."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % TEST_PART == 0


def phrases(language: Language, *, test: bool) -> tuple[str, ...]:
    return tuple(phrase for phrase in PHRASES[language] if is_for_tests(phrase) == test)


PHRASES: dict[Language, tuple[str, ...]] = {
    "english": ("\nThe value of{}{}.", "\nThe code of{}{}.", "\nThe number for{}{}.", "\nThe label on{}{}.",
                "\nThe price of{}{}.", "\nThe owner of{}{}."),
    "korean": tuple(f"\n{noun}{{}}{{}}." for noun in (
        "암호는", "번호는", "주소는", "비밀은", "색깔은", "가격은", "주인은", "열쇠는")),
    "thai": tuple(f"\n{noun}{{}}{{}}." for noun in (
        "รหัสของ", "หมายเลขของ", "ที่อยู่ของ", "ความลับของ", "สีของ", "ราคาของ", "เจ้าของ", "กุญแจของ")),
    "code": tuple(f"\n{name}.add({{}}{{}})" for name in (
        "codes", "table", "registry", "cache", "lookup", "index", "store", "mapping")),
}
"""Sentences with places for key and value; enough in each language that the hash gives some to both sides."""


DETECTED_TOKENS = 4096
"""Text of a source that decides on its language."""
CODE_SIGNS = set("(){}[]=<>_;\"'#*/\\&|+:")
CODE_SHARE = 0.06
"""Part of a text's characters that are such signs, from which on it counts as code; prose has 2 %,
code 8 % and more."""
SCRIPT_SHARE = 0.3
"""Part of the letters that are Hangul or Thai, from which on a text counts as Korean or Thai."""


@dataclass(frozen=True, eq=False)
class Haystack:
    """All text of one language."""

    form: NeedleForm
    texts: tuple[DocumentsText, ...]
    sizes: tuple[float, ...]
    """Their sizes, by which they are drawn."""

    @property
    def language(self) -> Language:
        return self.form.language

    def text(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` tokens [count] int64 of one source, without special ones."""
        return self.texts[pick(generator, self.sizes)].take(generator, count)


def pick(generator: np.random.Generator, sizes: Sequence[float]) -> int:
    reached = np.cumsum(np.asarray(sizes, np.float64) / sum(sizes))
    return min(int(np.searchsorted(reached, generator.random(), side="right")), len(sizes) - 1)


def open_haystacks(sources: Sequence[Source], split: str, tokenizer_folder: Path, *,
                   languages: Sequence[Language] = (), told: dict[str, Language] | None = None
                   ) -> tuple[Haystack, ...]:
    """Return a haystack for each language that there is text of, in the order of `LANGUAGES`.

    Args:
        sources: of token artifacts; chats are left out.
        split: "train" or "heldout".
        tokenizer_folder: what packed the sources.
        languages: these only; all by default.
        told: source -> its language, where neither its name is one nor the text itself shows it well.

    Raises:
        UserError: there is no text, or none of a language that is asked for, or `told` names no source.
    """
    told = told or {}
    tokenizer = open_tokenizer(tokenizer_folder)
    usable = [s for s in sources if not s.is_chat and s.num_tokens.get(split, 0) > 0]
    unknown = sorted(set(told) - {s.name for s in usable})
    if unknown:
        raise UserError(f"--language {unknown[0]}={told[unknown[0]]}: the data has no such source with "
                        f"'{split}' text (sources: {', '.join(s.name for s in usable)})")
    if not usable:
        raise UserError(f"--data: its sources hold no '{split}' text to hide needles in; "
                        "pack text with --heldout 0.02")
    found: dict[Language, list[tuple[DocumentsText, float]]] = {}
    for source in usable:
        documents = source.shard(split)
        named = next((name for name in LANGUAGES if name == source.name), None)
        # What the user says, then the source's name, then its text.
        language = told.get(source.name) or named or detect_language(_sample(documents, tokenizer))
        special = np.array(special_tokens(tokenizer), np.int64)
        found.setdefault(language, []).append((DocumentsText(documents, special), source.num_tokens[split]))
    for language in languages:
        if language not in found:
            raise UserError(f"needle languages {list(languages)}: no '{split}' text is {language} (there is "
                            f"{', '.join(sorted(found))}); add such text, "
                            "or name a source's language with --language")
    return tuple(Haystack(needle_form(tokenizer_folder, name), *zip(*found[name], strict=True))
                 for name in LANGUAGES if name in found and (not languages or name in languages))


def _kind_of(character: str) -> str:
    if "\uac00" <= character <= "\ud7a3":
        return "korean"
    if "\u0e00" <= character <= "\u0e7f":
        return "thai"
    if character.isalpha():
        return "letter"
    return "sign" if character in CODE_SIGNS else "other"


def detect_language(text: str) -> Language:
    """Return the language of a text, by its letters and signs."""
    signs = Counter(_kind_of(character) for character in text if not character.isspace())
    letters = max(1, signs["korean"] + signs["thai"] + signs["letter"])
    if max(signs["korean"], signs["thai"]) >= SCRIPT_SHARE * letters:
        return "korean" if signs["korean"] >= signs["thai"] else "thai"
    return "code" if signs["sign"] >= CODE_SHARE * max(1, signs.total()) else "english"


def _sample(documents: Documents, tokenizer: Tokenizer) -> str:
    """Return text from documents all over a split, which may be sorted."""
    num = len(documents.lengths)
    chosen = np.unique(np.linspace(0, num - 1, 32).astype(np.int64)).tolist()
    each = DETECTED_TOKENS // len(chosen)
    return str(tokenizer.decode([t for i in chosen
                                 for t in documents.tokens(i, 0, min(each, int(documents.lengths[i])))]))


@dataclass(frozen=True, eq=False)
class DocumentsText:
    """A split: a document anywhere, and the ones after it, until there is enough."""

    documents: Documents
    special: np.ndarray

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        lengths = self.documents.lengths
        document = int(generator.integers(len(lengths)))
        # Anywhere inside, since documents begin alike.
        start = int(generator.integers(int(lengths[document]) or 1))
        parts: list[np.ndarray] = []
        found = 0
        while found < count:
            ids = self.documents.tokens(document, start, min(int(lengths[document]) - start, count - found))
            # An end of document inside of a context would cut it in two.
            ids = ids[~np.isin(ids, self.special)]
            parts.append(ids)
            found += len(ids)
            document, start = (document + 1) % len(lengths), 0
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
