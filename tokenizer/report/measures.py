"""Measure tokenizers on held-out text, and check their compression, vocabulary and Unicode coverage."""

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents import Document, RecordReading, cut_text, list_files, plan_units, read_span
from megatron_sov.base.errors import Fix, UserError, choose_free_path
from megatron_sov.base.pages.page import PageTable
from megatron_sov.base.settings import AboveZero, Flag
from tokenizer.formats.reader import LoadedTokenizer
from tokenizer.report.check import TokenizerCheck, choose_verdict, format_token, is_text

NUM_EXAMPLES = 20
"""Maximum examples per table."""
CHUNK_BYTES = 100_000
"""Longer documents are cut at blank lines, because a batch waits for its longest text."""
UNIT_BYTES = 1 << 20
DEFAULT_MB = 10.0
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Thai, Lao, Burmese, Khmer, kana, Han."""
TokenizerPath = Annotated[Path, Flag("TOKENIZER", help=(
    "A folder, a tokenizer.json, or a .tiktoken file with its pat_str in FILE.tiktoken.json."))]
BLOCK = 2048
NUM_SCALARS_SHOWN = 20
END = 0x110000
EMPTY_PLANES = range(0x40000, 0xE0000)
"""Planes without letters, tried without separators only."""
SEPARATORS = {"side by side": "", "after a letter": "a", "after a space": " "}


def get_token_bytes(tokenizer: LoadedTokenizer, text: str) -> list[bytes]:
    return [tokenizer.tokens.get(i, b"") for i in tokenizer.encode(text)]


@dataclass(frozen=True, kw_only=True)
class HeldoutTextOptions:
    """Held-out text."""

    text: Annotated[tuple[str, ...], Flag(value="[NAME=]PATH", many=True)] = ()
    """Held-out text for a language or domain: a text file, .jsonl, .parquet or a folder with such files."""
    max_text_mb: Annotated[AboveZero, Flag(value="MB")] = DEFAULT_MB
    """Maximum text per --text, spread evenly over its files."""


@dataclass(frozen=True)
class NamedText:
    """Text of one language or domain."""

    name: str
    path: str
    chunks: list[str]
    """Documents; long documents in several chunks."""
    whole: bool
    """Whether `chunks` has all text at `path`."""

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes."""
        return sum(len(chunk.encode()) for chunk in self.chunks)

    @cached_property
    def num_chars(self) -> int:
        """Unicode scalar values."""
        return sum(map(len, self.chunks))

    @cached_property
    def num_words(self) -> int:
        """Runs of characters between white space."""
        return sum(len(chunk.split()) for chunk in self.chunks)

    @cached_property
    def has_words(self) -> bool:
        """Whether spaces separate words: at most half of the letters match `_WITHOUT_SPACES`."""
        num_unspaced = sum(len(_WITHOUT_SPACES.findall(chunk)) for chunk in self.chunks)
        return 2 * num_unspaced <= sum(c.isalpha() for chunk in self.chunks for c in chunk)

    def sample_chunks(self, num_bytes: int) -> list[str]:
        """Return evenly spaced chunks with about `num_bytes` in sum, at least one chunk."""
        step = max(1, round(self.num_bytes / num_bytes))
        return self.chunks[::step]


def read_texts(arguments: Sequence[str], max_mb: float) -> list[NamedText]:
    """Read the texts of `--text [NAME=]PATH ...`. Raises `UserError`: a repeated name, or no text."""
    texts: list[NamedText] = []
    for argument in arguments:
        name, path = parse_text(argument)
        if not path.exists() and " " in str(path):
            file = choose_free_path("text.txt")
            command = f"printf '%s\\n' {shlex.quote(str(path))} > {file}"
            raise UserError(f"--text {argument!r}: is a text, and a file is needed; write it into one",
                            Fix(words={argument: file}, before=(command,)))
        if name in (text.name for text in texts):
            raise UserError(f"--text {argument!r}: the name {name!r} is taken by another text; name it, "
                            f"e.g. other={path}")
        texts.append(read_text(name, path, round(1e6 * max_mb)))
    return texts


def parse_text(argument: str) -> tuple[str, Path]:
    """Split `[NAME=]PATH`; the default name is the file or folder name without suffixes. Raises `UserError`:
    the name or the path is empty."""
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return Path(argument).name.partition(".")[0] or argument, Path(argument)
    if not name or not path:
        raise UserError(f"--text {argument!r}: must be a path or NAME=PATH, e.g. korean=heldout/ko.jsonl")
    return name, Path(path)


def read_text(name: str, path: Path, max_bytes: int) -> NamedText:
    """Read at most about `max_bytes` of text at a path. Raises `UserError`: a missing path or no text."""
    units = list(plan_units(list_files(path, print), UNIT_BYTES))
    on_disk = sum(span.size_bytes for unit in units for span in unit)
    step = max(1, round(on_disk / max_bytes))
    chunks: list[str] = []
    num_bytes = 0
    for unit in units[::step]:
        for chunk in _iter_chunks(unit):
            chunks.append(chunk)
            num_bytes += len(chunk.encode())
            if num_bytes >= max_bytes:
                return NamedText(name, str(path), chunks, False)
    if not chunks:
        raise UserError(f"--text {path}: holds no text; pass files with text in them")
    return NamedText(name, str(path), chunks, step == 1)


def _iter_chunks(unit: tuple) -> Iterator[str]:
    for span in unit:
        for item in read_span(span, RecordReading()):
            if isinstance(item, Document):
                for text in item.texts():
                    yield from cut_text(text, CHUNK_BYTES)
            elif item.code != "empty":
                raise UserError(f"{span.file}: {item.reason}")


@dataclass(frozen=True)
class TokenizerMeasures:
    """Result of `measure_text`."""

    text: NamedText
    counts: NDArray[np.int64]
    """Counts by id, [vocab_size]."""
    num_changed_chunks: int
    """Chunks that `decode` does not return, apart from `normalize`."""

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; higher is cheaper."""
        return self.text.num_bytes / max(1, self.num_tokens)

    @property
    def tokens_per_char(self) -> float:
        """Tokens per Unicode scalar value."""
        return self.num_tokens / self.text.num_chars

    @property
    def tokens_per_word(self) -> float | None:
        """Tokens per run of characters between white space; None if spaces do not separate words."""
        return self.num_tokens / self.text.num_words if self.text.has_words else None

    def get_numbers(self) -> dict[str, object]:
        text = self.text
        return {
            "path": text.path, "whole": text.whole, "num_bytes": text.num_bytes, "num_chars": text.num_chars,
            "num_words": text.num_words if text.has_words else None, "num_tokens": self.num_tokens,
            "bytes_per_token": self.bytes_per_token, "tokens_per_char": self.tokens_per_char,
            "tokens_per_word": self.tokens_per_word, "tokens_per_1000_chars": 1000 * self.tokens_per_char,
            "tokens_per_1000_words": None if self.tokens_per_word is None else 1000 * self.tokens_per_word,
            "chunks_not_given_back": self.num_changed_chunks, "num_chunks": len(text.chunks)}


def measure_text(tokenizer: LoadedTokenizer, text: NamedText) -> TokenizerMeasures:
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    num_changed = 0
    for chunk, ids in zip(text.chunks, tokenizer.encode_many(text.chunks), strict=True):
        counts += np.bincount(np.asarray(ids, np.int64), minlength=len(counts))
        if tokenizer.decode(ids) != tokenizer.normalize(chunk):
            num_changed += 1
    return TokenizerMeasures(text, counts, num_changed)


def check_texts(tokenizer: LoadedTokenizer, measured: list[TokenizerMeasures]) -> TokenizerCheck:
    """Check that decoding returns each text; report compression and cost."""
    partial = np.zeros(tokenizer.vocab_size, np.bool_)
    partial[[id_ for id_, token in tokenizer.tokens.items() if not is_text(token)]] = True
    all_bytes, all_tokens = sum(m.text.num_bytes for m in measured), sum(m.num_tokens for m in measured)
    numbers = {}
    for m in measured:
        # computation grows with tokens, so relative cost is the share of tokens over the share of bytes
        share_bytes, share_tokens = m.text.num_bytes / all_bytes, m.num_tokens / all_tokens
        cost = share_tokens / share_bytes
        num_partial = int(m.counts[partial].sum())
        numbers[m.text.name] = m.get_numbers() | {
            "share_of_bytes": share_bytes, "share_of_flops": share_tokens, "cost_against_mean": cost,
            "share_of_partial_characters": num_partial / max(1, m.num_tokens)}
    num_changed = sum(m.num_changed_chunks for m in measured)
    best, worst = (pick(measured, key=lambda m: m.bytes_per_token) for pick in (max, min))
    summary = (f"{all_bytes / 1e6:.2f} MB in {len(measured)} texts, {all_bytes / all_tokens:.3f} bytes per "
               f"token; best {best.text.name} ({best.bytes_per_token:.3f}), worst {worst.text.name} "
               f"({worst.bytes_per_token:.3f}); ")
    summary += (f"decoding does not return {num_changed} chunks of text" if num_changed
                else "decoding returns all text")
    return TokenizerCheck("texts", "Texts", verdict="bad" if num_changed else "good", summary=summary,
                          numbers={"texts": numbers}, tables=[build_measures_table(measured)])


def build_measures_table(measured: list[TokenizerMeasures]) -> PageTable:
    all_bytes, all_tokens = sum(m.text.num_bytes for m in measured), sum(m.num_tokens for m in measured)
    rows = []
    for m in measured:
        words = "–" if m.tokens_per_word is None else f"{m.tokens_per_word:.3f}"
        context = (f"{1000 * (m.tokens_per_word or m.tokens_per_char):,.0f}"
                   + ("" if m.text.has_words else " (characters)"))
        rows.append([m.text.name, f"{m.text.num_bytes / 1e6:.3f}", f"{m.num_tokens:,}",
                     f"{m.bytes_per_token:.3f}", words, f"{m.tokens_per_char:.3f}", context,
                     f"{m.text.num_bytes / all_bytes:.1%}", f"{m.num_tokens / all_tokens:.1%}"])
    return PageTable(["text", "MB", "tokens", "bytes/token", "tokens/word", "tokens/character",
                      "context for 1,000 words", "% of bytes", "% of FLOPs"], rows)


def check_inventory(tokenizer: LoadedTokenizer) -> TokenizerCheck:
    """Report size, special tokens, bytes, partial characters and the longest tokens."""
    tokens = tokenizer.tokens
    ids = {*tokens, *tokenizer.special, *tokenizer.added}
    single = {token[0] for token in tokens.values() if len(token) == 1}
    partial = [id_ for id_, token in tokens.items() if len(token) > 1 and not is_text(token)]
    unused_ids = tokenizer.vocab_size - len(ids)
    duplicates = [token for token, count in Counter(tokens.values()).items() if count > 1]
    by_length = sorted(tokens, key=lambda id_: (-len(tokens[id_]), id_))
    longest = [id_ for id_ in by_length if tokens[id_].strip()][:NUM_EXAMPLES]
    numbers = {
        "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
        "num_special": len(tokenizer.special), "num_added": len(tokenizer.added),
        "special": {str(i): t for i, t in sorted(tokenizer.special.items())},
        "added": {str(i): t for i, t in sorted(tokenizer.added.items())}, "num_single_bytes": len(single),
        "num_parts_of_characters": len(partial),
        "share_parts_of_characters": len(partial) / tokenizer.vocab_size, "ids_without_token": unused_ids,
        "num_same_bytes": len(duplicates), "same_bytes": [format_token(t) for t in duplicates[:NUM_EXAMPLES]],
        "mean_bytes": sum(map(len, tokens.values())) / max(1, len(tokens)),
        "longest": [{"id": i, "token": format_token(tokens[i]), "num_bytes": len(tokens[i])} for i
                    in longest],
        "tokens_by_num_bytes": dict(sorted(Counter(map(len, tokens.values())).items()))}
    summary = (f"{tokenizer.vocab_size:,} ids: {len(tokenizer.special):,} special, {len(tokenizer.added):,} "
               f"added, {len(single)} single bytes, {len(partial):,} parts of characters; "
               f"the longest token has {len(tokens[by_length[0]])} bytes"
               + (f"; {unused_ids:,} ids have no token" if unused_ids else "")
               + (f"; {len(duplicates):,} tokens share their bytes with another" if duplicates else ""))
    tables = [PageTable(["longest tokens", "id", "bytes"],
                        [[format_token(tokens[i]), f"{i:,}", f"{len(tokens[i])}"] for i in longest])]
    if added := sorted((tokenizer.special | tokenizer.added).items()):
        rows = [[format_token(t), f"{i:,}", "special" if i in tokenizer.special else "added"]
                for i, t in added[:3 * NUM_EXAMPLES]]
        tables.insert(0, PageTable(["special and added tokens", "id", "kind"], rows))
    return TokenizerCheck("inventory", "Vocabulary", verdict="note" if unused_ids or duplicates else "good",
                          summary=summary, numbers=numbers, tables=tables)


def count_words(token: bytes) -> int:
    return sum(any(c.isalpha() for c in word) for word in token.decode("utf-8", errors="ignore").split())


def check_superwords(tokenizer: LoadedTokenizer) -> TokenizerCheck:
    """Report tokens with several words (SuperBPE, arXiv 2503.13423)."""
    words = {id_: n for id_, token in tokenizer.tokens.items()
             if b" " in token and (n := count_words(token)) > 1}
    share = len(words) / tokenizer.vocab_size
    longest = sorted(words, key=lambda id_: (-words[id_], -len(tokenizer.tokens[id_]), id_))
    step = max(1, len(words) // NUM_EXAMPLES)
    spread = sorted(words)[::step][:NUM_EXAMPLES]
    numbers = {"num_superwords": len(words), "share": share,
               "by_num_words": dict(sorted(Counter(words.values()).items())),
               "longest": [format_token(tokenizer.tokens[i]) for i in longest[:NUM_EXAMPLES]],
               "examples": [format_token(tokenizer.tokens[i]) for i in spread]}
    summary = (f"{len(words):,} tokens span words, {share:.1%} of the vocabulary; "
               f"the longest spans {max(words.values())} words" if words else "no token spans words")
    rows = [[format_token(tokenizer.tokens[i]), f"{i:,}", f"{words[i]}"] for i in [*longest[:10], *spread]]
    tables = [PageTable(["superwords: longest, then some of all ids", "id", "words"], rows)] if rows else []
    return TokenizerCheck("superwords", "Superwords", "good", summary, numbers, tables)


@dataclass
class ScalarResults:
    """Unicode scalar values that decoding does not return."""

    num_tried: int = 0
    changed: list[int] = field(default_factory=list)
    """Code points that become canonically equivalent text (NFC)."""
    lost: list[int] = field(default_factory=list)
    """Code points that become other text in `decode`."""
    lost_blocks: list[str] = field(default_factory=list)
    """`SEPARATORS` blocks that become other text although single characters do not."""


def try_scalars(tokenizer: LoadedTokenizer, end: int = END) -> ScalarResults:
    """Encode and decode scalar values below `end` in blocks, with all `SEPARATORS`."""
    results = ScalarResults()
    for codes in _iter_blocks(end):
        results.num_tried += len(codes)
        names = list(SEPARATORS)[:1] if codes[0] in EMPTY_PLANES else list(SEPARATORS)
        texts = [SEPARATORS[name].join(map(chr, codes)) for name in names]
        decoded = [tokenizer.decode(ids) for ids in tokenizer.encode_many(texts)]
        if decoded == texts:
            continue
        num_lost = len(results.lost)
        _try_single_scalars(tokenizer, codes, results)
        if len(results.lost) > num_lost:
            continue
        # each character is returned, but not the block
        results.lost_blocks += [f"U+{codes[0]:04X} to U+{codes[-1]:04X}, {name}"
                                for name, text, result in zip(names, texts, decoded, strict=True)
                                if not _is_equivalent(result, text)]
    return results


def _try_single_scalars(tokenizer: LoadedTokenizer, codes: list[int], results: ScalarResults) -> None:
    texts = [f"a{chr(code)}a" for code in codes]
    for code, text, ids in zip(codes, texts, tokenizer.encode_many(texts), strict=True):
        decoded = tokenizer.decode(ids)
        if decoded != text:
            (results.changed if _is_equivalent(decoded, text) else results.lost).append(code)


def _is_equivalent(a: str, b: str) -> bool:
    """Return whether two texts are canonically equivalent (Unicode Standard Annex 15)."""
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def _iter_blocks(end: int) -> Iterator[list[int]]:
    for start in range(0, end, BLOCK):
        if not 0xD800 <= start < 0xE000:
            yield list(range(start, min(start + BLOCK, end)))


def check_scalars(tokenizer: LoadedTokenizer) -> TokenizerCheck:
    """Check that decoding returns every Unicode character."""
    results = try_scalars(tokenizer)
    bad = bool(results.lost or results.lost_blocks)
    summary = f"{results.num_tried:,} characters tried"
    if results.lost:
        summary += f", {len(results.lost):,} lost, the first U+{results.lost[0]:04X}"
    if results.lost_blocks:
        summary += f", {len(results.lost_blocks):,} blocks are not returned"
    if results.changed:
        summary += f", {len(results.changed):,} replaced by equivalent text (normalization)"
    if not bad and not results.changed:
        summary += ", all are returned"
    numbers = {"num_tried": results.num_tried, "num_lost": len(results.lost),
               "lost": [f"U+{c:04X}" for c in results.lost[:1000]], "num_normalized": len(results.changed),
               "normalized": [f"U+{c:04X}" for c in results.changed[:NUM_SCALARS_SHOWN]],
               "lost_blocks": results.lost_blocks}
    rows = [[f"U+{c:04X}", unicodedata.name(chr(c), "–"), chr(c) if chr(c).isprintable() else "–"]
            for c in results.lost[:NUM_SCALARS_SHOWN]]
    tables = [PageTable(["lost", "name", "character"], rows)] if rows else []
    return TokenizerCheck("scalars", "All of Unicode", verdict=choose_verdict(bad, results.changed),
                          summary=summary, numbers=numbers, tables=tables)
