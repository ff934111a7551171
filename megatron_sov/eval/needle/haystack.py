"""Text that needles are hidden in: a split of packed sources, or files of the user's, each source in a
language of its own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.data.token_shards import Documents, Source
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.phrases import LANGUAGES, Language
from megatron_sov.eval.needle.text import NeedleForm, needle_form, special_tokens

DETECTED_TOKENS = 4096
"""Text of a source that decides on its language."""
CODE_SIGNS = set("(){}[]=<>_;\"'#*/\\&|+:")
CODE_SHARE = 0.06
"""Part of a text's characters that are such signs, from which on it counts as code; prose has 2 %,
code 8 % and more."""
SCRIPT_SHARE = 0.3
"""Part of the letters that are Hangul or Thai, from which on a text counts as Korean or Thai."""
READ_BYTES = 1 << 16


class Text(Protocol):
    """Text of any length."""

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` tokens [count] int64 from a random place, without special ones."""
        ...


@dataclass(frozen=True, eq=False)
class Haystack:
    """All text of one language."""

    form: NeedleForm
    """What its needles are made of."""
    texts: tuple[Text, ...]
    """Sources."""
    sizes: tuple[float, ...]
    """Their sizes, by which they are drawn."""

    @property
    def language(self) -> Language:
        return self.form.language

    def text(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` tokens [count] int64 of one source, without special ones."""
        return self.texts[pick(generator, self.sizes)].take(generator, count)


def pick(generator: np.random.Generator, sizes: Sequence[float]) -> int:
    """Return an index, drawn by size."""
    reached = np.cumsum(np.asarray(sizes, np.float64) / sum(sizes))
    return min(int(np.searchsorted(reached, generator.random(), side="right")), len(sizes) - 1)


def open_haystacks(sources: Sequence[Source], split: str, tokenizer_folder: Path, *,
                   languages: Sequence[Language] = (), told: dict[str, Language] | None = None,
                   files: Sequence[tuple[Language, Path]] = ()) -> tuple[Haystack, ...]:
    """Return a haystack for each language that there is text of, in the order of `LANGUAGES`.

    Args:
        sources: of token artifacts; chats are left out.
        split: "train" or "heldout".
        tokenizer_folder: what packed the sources, and packs the files.
        languages: these only; all by default.
        told: source -> its language, where neither its name is one nor the text itself shows it well.
        files: language, UTF-8 text file.

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
    if not usable and not files:
        raise UserError(f"--data: its sources hold no '{split}' text to hide needles in; "
                        "pack text with --heldout 0.02")
    found: dict[Language, list[tuple[Text, float]]] = {}
    for source in usable:
        documents = source.shard(split)
        named = next((name for name in LANGUAGES if name == source.name), None)
        language = told.get(source.name) or named or detect_language(_sample(documents, tokenizer))
        found.setdefault(language, []).append((documents_text(documents, tokenizer),
                                               source.num_tokens[split]))
    for language, file in files:
        text = FileText(file, tokenizer)
        found.setdefault(language, []).append((text, text.size_bytes))
    for language in languages:
        if language not in found:
            raise UserError(f"needle languages {list(languages)}: no '{split}' text is {language} (there is "
                            f"{', '.join(sorted(found))}); add such text, "
                            "or name a source's language with --language")
    return tuple(Haystack(needle_form(tokenizer_folder, name), *zip(*found[name], strict=True))
                 for name in LANGUAGES if name in found and (not languages or name in languages))


def detect_language(text: str) -> Language:
    """Return the language of a text, by its letters and signs."""
    signs = Counter("korean" if "\uac00" <= c <= "\ud7a3" else "thai" if "\u0e00" <= c <= "\u0e7f"
                    else "letter" if c.isalpha() else "sign" if c in CODE_SIGNS else "other"
                    for c in text if not c.isspace())
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


def documents_text(documents: Documents, tokenizer: Tokenizer) -> DocumentsText:
    """Return the text of a split."""
    return DocumentsText(documents, np.array(special_tokens(tokenizer), np.int64))


@dataclass(frozen=True, eq=False)
class DocumentsText:
    """A split: a document anywhere, and the ones after it, until there is enough."""

    documents: Documents
    """The split."""
    special: np.ndarray
    """Tokens to leave out."""

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        lengths = self.documents.lengths
        document = int(generator.integers(len(lengths)))
        start = int(generator.integers(int(lengths[document]) or 1))
        parts: list[np.ndarray] = []
        found = 0
        while found < count:
            ids = self.documents.tokens(document, start, min(int(lengths[document]) - start, count - found))
            ids = ids[~np.isin(ids, self.special)]
            parts.append(ids)
            found += len(ids)
            document, start = (document + 1) % len(lengths), 0
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class FileText:
    """A text file: a line anywhere, and the ones after it, until there is enough;
    no more than that is ever read."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        """Look at the file.

        Raises:
            UserError: it cannot be read as UTF-8, or holds no text.
        """
        self._file, self._tokenizer = file, tokenizer
        self._special = special_tokens(tokenizer)
        try:
            self.size_bytes = os.path.getsize(file)
            with open(file, encoding="utf-8") as f:
                start = f.read(READ_BYTES)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--text {file}: cannot be read as UTF-8 text ({e})") from None
        if not len(self._ids(start)) or not start.strip():
            raise UserError(f"--text {file}: starts with {len(start)} characters that are no text; "
                            "pass a file of text")

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        place = int(generator.integers(self.size_bytes))
        parts: list[np.ndarray] = []
        found = 0
        with open(self._file, "rb") as f:
            f.seek(place)
            f.readline()  # the rest of a line that was cut
            while found < count:
                text = f.read(READ_BYTES) + f.readline()
                if not text:
                    f.seek(0)
                    continue
                parts.append(self._ids(text.decode("utf-8", "replace"))[:count - found])
                found += len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _ids(self, text: str) -> np.ndarray:
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        return ids[~np.isin(ids, self._special)]
