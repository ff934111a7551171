"""Build needles from a tokenizer's rare words, and haystacks from packed sources.

Keys and values are two words each. Pairs and sentences for training and for tests are disjoint
(`is_for_tests`). A phrase is text with slots ``{}`` for key and value; the value directly follows the key, so
repeating the sentence up to the key asks for the value. Each haystack is a split of packed sources in one
language.
"""

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
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import Documents

NUM_WORDS, MIN_WORDS, MAX_WORDS = 64, 16, 512
TOKENS_PER_WORD = 64
"""Vocabulary tokens per needle word, above `NUM_WORDS`; larger vocabularies give long texts more keys."""
MIN_WORD_BYTES = 4
SLOT = "{}"
PAIR_TOKENS = 2
Slots = tuple[tuple[int, ...], ...]
"""A sentence as token ids: before, between and after the pairs."""
_SCRIPTS: dict[Language, Callable[[str], bool]] = {
    "english": str.isascii, "code": str.isascii, "korean": lambda letter: "\uac00" <= letter <= "\ud7a3",
    "thai": lambda letter: "\u0e00" <= letter <= "\u0e7f"}
LANGUAGES: tuple[Language, ...] = get_args(Language)
TEST_MODULUS = 5
"""Every `TEST_MODULUS`-th pair or phrase is reserved for tests."""
PHRASES: dict[Language, tuple[str, ...]] = {
    "english": ("\nThe value of{}{}.", "\nThe code of{}{}.", "\nThe number for{}{}.", "\nThe label on{}{}.",
                "\nThe price of{}{}.", "\nThe owner of{}{}."),
    "korean": tuple(f"\n{noun}{{}}{{}}." for noun in (
        "암호는", "번호는", "주소는", "비밀은", "색깔은", "가격은", "주인은", "열쇠는")),
    "thai": tuple(f"\n{noun}{{}}{{}}." for noun in (
        "รหัสของ", "หมายเลขของ", "ที่อยู่ของ", "ความลับของ", "สีของ", "ราคาของ", "เจ้าของ", "กุญแจของ")),
    "code": tuple(f"\n{name}.add({{}}{{}})" for name in (
        "codes", "table", "registry", "cache", "lookup", "index", "store", "mapping"))}
"""Sentences with slots for key and value; a language has enough sentences for tests and training."""
DETECTED_TOKENS = 4096
"""Tokens read from a source to detect the language."""
CODE_SIGNS = set("(){}[]=<>_;\"'#*/\\&|+:")
CODE_SHARE = 0.06
"""Share of code characters above which a text counts as code; prose has 2 %, code 8 % and more."""
SCRIPT_SHARE = 0.3
"""Share of Hangul or Thai letters above which a text is Korean or Thai."""


def fill_slots(slots: Slots, *pairs: np.ndarray) -> list[int]:
    """Insert pairs [2] into the slots of a phrase, which ends before the first empty slot."""
    ids = list(slots[0])
    for i, pair in enumerate(pairs, start=1):
        ids += pair.tolist()
        if i < len(pairs) or i == len(slots) - 1:
            ids += slots[i]
    return ids


@dataclass(frozen=True, eq=False)
class NeedleForm:
    """Needle sentences and words in a language, as token ids."""

    language: Language
    """Language for sentences, and for words if the tokenizer has enough words."""
    sentences: dict[bool, tuple[Slots, ...]]
    """True -> test sentences, False -> training sentences."""
    words: tuple[int, ...]
    special: tuple[int, ...] = ()
    """Special tokens to remove from haystacks."""

    def needle_tokens(self, *, test: bool) -> int:
        """Return how many tokens the longest sentence with key and value has."""
        return max(2 * PAIR_TOKENS + sum(map(len, slots)) for slots in self.sentences[test])

    @cached_property
    def pairs(self) -> dict[bool, np.ndarray]:
        """Ordered pairs with different words [pairs, 2]: True -> for tests, False -> for training."""
        pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for first in self.words:
            for second in self.words:
                if first != second:
                    pairs[is_for_tests(first, second)].append((first, second))
        return {test: np.array(pairs, np.int64).reshape(-1, 2) for test, pairs in pairs.items()}

    def draw(self, generator: np.random.Generator, count: int, *, test: bool) -> np.ndarray:
        """Draw `count` different pairs [count, 2]."""
        return self.pairs[test][generator.choice(len(self.pairs[test]), count, replace=False)]

    def draw_sentence(self, generator: np.random.Generator, *, test: bool) -> Slots:
        return self.sentences[test][int(generator.integers(len(self.sentences[test])))]


def build_needle_form(tokenizer_folder: Path, language: Language) -> NeedleForm:
    """Build a language's `NeedleForm` for a tokenizer from the whole words merged last. Raises `UserError`:
    the tokenizer is missing, or has fewer than `MIN_WORDS` whole words."""
    tokenizer = open_tokenizer(tokenizer_folder)
    special = list_special_tokens(tokenizer)
    words = _find_words(tokenizer, special, _SCRIPTS[language])
    if len(words) < MIN_WORDS:
        words = _find_words(tokenizer, special, lambda letter: True)
    if len(words) < MIN_WORDS:
        raise UserError(f"{tokenizer_folder}: only {len(words)} of its tokens are whole words, "
                        f"needles need {MIN_WORDS}; train a tokenizer with a larger vocabulary")

    def encode_phrase(text: str) -> Slots:
        return tuple(tuple(tokenizer.encode(part, add_special_tokens=False).ids) if part else ()
                     for part in text.split(SLOT))

    sentences = {test: tuple(map(encode_phrase, list_phrases(language, test=test))) for test in (True, False)}
    return NeedleForm(language, sentences, tuple(words), special)


def list_special_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(sorted(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special))


def _find_words(tokenizer: Tokenizer, special: tuple[int, ...],
                of_script: Callable[[str], bool]) -> list[int]:
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=False)
    max_words = min(MAX_WORDS, max(NUM_WORDS, vocabulary // TOKENS_PER_WORD))
    words: list[int] = []
    # From the last merge: rarest words first.
    for token in range(vocabulary - 1, -1, -1):
        if len(words) == max_words:
            break
        if token not in special and _is_whole_word(tokenizer, token, of_script):
            words.append(token)
    return words


def _is_whole_word(tokenizer: Tokenizer, token: int, of_script: Callable[[str], bool]) -> bool:
    text = tokenizer.decode([token], skip_special_tokens=False)
    word = text[1:]
    # with a leading space and as a single token, the word has the same token in any sentence
    return (text[:1] == " " and len(word.encode()) >= MIN_WORD_BYTES
            and unicodedata.category(word[0]) in ("Ll", "Lu", "Lo")
            and all(unicodedata.category(letter)[0] in "LM" and of_script(letter) for letter in word)
            and tokenizer.encode(text, add_special_tokens=False).ids == [token])


def is_for_tests(*parts: object) -> bool:
    """Return whether a pair or phrase is reserved for tests (`TEST_MODULUS`), by a hash that is independent
    of run and data."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % TEST_MODULUS == 0


def list_phrases(language: Language, *, test: bool) -> tuple[str, ...]:
    return tuple(phrase for phrase in PHRASES[language] if is_for_tests(phrase) == test)


@dataclass(frozen=True, eq=False)
class Haystack:
    """A language's text, with a `NeedleForm`."""

    form: NeedleForm
    texts: "tuple[DocumentsText, ...]"
    sizes: tuple[float, ...]
    """Sizes of `texts` as sampling weights."""

    @property
    def language(self) -> Language:
        return self.form.language

    def text(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` tokens [count] int64 from a source, without special tokens."""
        return self.texts[draw_index(generator, self.sizes)].take(generator, count)


def draw_index(generator: np.random.Generator, sizes: Sequence[float]) -> int:
    cumulative = np.cumsum(np.asarray(sizes, np.float64) / sum(sizes))
    return min(int(np.searchsorted(cumulative, generator.random(), side="right")), len(sizes) - 1)


def open_haystacks(sources: Sequence[Source], split: str, tokenizer_folder: Path, *,
                   languages: Sequence[Language] = (), source_languages: dict[str, Language] | None = None
                   ) -> tuple[Haystack, ...]:
    """Open a haystack per language with text, in the order of `LANGUAGES`.

    Args:
        sources: sources of token artifacts; chats are skipped.
        split: "train" or "heldout".
        tokenizer_folder: tokenizer of the sources.
        languages: languages to open; empty opens all.
        source_languages: source name -> language, if neither the name nor the text shows it.

    Raises:
        UserError: there is no text, no text of a requested language, or `source_languages` names an unknown
            source.
    """
    source_languages = source_languages or {}
    tokenizer = open_tokenizer(tokenizer_folder)
    usable = [s for s in sources if not s.is_chat and s.num_tokens.get(split, 0) > 0]
    unknown = sorted(set(source_languages) - {s.name for s in usable})
    if unknown:
        raise UserError(f"--language {unknown[0]}={source_languages[unknown[0]]}: the data has no such "
                        f"source with '{split}' text (sources: {', '.join(s.name for s in usable)})")
    if not usable:
        raise UserError(f"--data: its sources hold no '{split}' text to hide needles in; "
                        "pack text with --heldout 0.02")
    texts: dict[Language, list[tuple[DocumentsText, float]]] = {}
    for source in usable:
        documents = source.open_split(split)
        name_language = next((name for name in LANGUAGES if name == source.name), None)
        # priority: the user's choice, the source name, the text
        language = source_languages.get(source.name) or name_language
        if not language:
            language = detect_language(_read_sample(documents, tokenizer))
        special = np.array(list_special_tokens(tokenizer), np.int64)
        texts.setdefault(language, []).append((DocumentsText(documents, special), source.num_tokens[split]))
    for language in languages:
        if language not in texts:
            raise UserError(f"needle languages {list(languages)}: no '{split}' text is {language} (there is "
                            f"{', '.join(sorted(texts))}); add such text, "
                            "or name a source's language with --language")
    return tuple(Haystack(build_needle_form(tokenizer_folder, name), *zip(*texts[name], strict=True))
                 for name in LANGUAGES if name in texts and (not languages or name in languages))


def _classify_character(character: str) -> str:
    if "\uac00" <= character <= "\ud7a3":
        return "korean"
    if "\u0e00" <= character <= "\u0e7f":
        return "thai"
    if character.isalpha():
        return "letter"
    return "sign" if character in CODE_SIGNS else "other"


def detect_language(text: str) -> Language:
    """Detect a text's language in `LANGUAGES` from letters and signs."""
    signs = Counter(_classify_character(character) for character in text if not character.isspace())
    letters = max(1, signs["korean"] + signs["thai"] + signs["letter"])
    if max(signs["korean"], signs["thai"]) >= SCRIPT_SHARE * letters:
        return "korean" if signs["korean"] >= signs["thai"] else "thai"
    return "code" if signs["sign"] >= CODE_SHARE * max(1, signs.total()) else "english"


def _read_sample(documents: Documents, tokenizer: Tokenizer) -> str:
    """Decode text from documents across the whole split, because the split may be sorted."""
    num = len(documents.lengths)
    document_indices = np.unique(np.linspace(0, num - 1, 32).astype(np.int64)).tolist()
    tokens_per_document = DETECTED_TOKENS // len(document_indices)
    ids: list[int] = []
    for i in document_indices:
        ids += documents.tokens(i, 0, min(tokens_per_document, int(documents.lengths[i]))).tolist()
    return str(tokenizer.decode(ids))


@dataclass(frozen=True, eq=False)
class DocumentsText:
    """Reads text from a random position, continued over the following documents."""

    documents: Documents
    special: np.ndarray

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        lengths = self.documents.lengths
        document = int(generator.integers(len(lengths)))
        # Random position: beginnings of documents are similar.
        start = int(generator.integers(int(lengths[document]) or 1))
        parts: list[np.ndarray] = []
        num_tokens = 0
        while num_tokens < count:
            num_left = int(lengths[document]) - start
            ids = self.documents.tokens(document, start, min(num_left, count - num_tokens))
            # An end-of-document token would split the context.
            ids = ids[~np.isin(ids, self.special)]
            parts.append(ids)
            num_tokens += len(ids)
            document, start = (document + 1) % len(lengths), 0
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
