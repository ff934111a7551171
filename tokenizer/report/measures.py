"""How much text a token holds: the figures by which tokenizers are compared, for each text."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents import Document, RecordReading, cut_text, list_files, plan_units, read_span
from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import PageTable
from megatron_sov.base.settings import AboveZero, Flag
from tokenizer.formats.loaders import Opened
from tokenizer.report.charts import bars, lines
from tokenizer.report.check import TokenizerCheck, Verdict, cut, is_text, shown

# How numbers and white space are cut.

MAX_DIGITS = 12
NUMBERS_PER_LENGTH = 60
NUM_EXAMPLES = 20
_DIGITS = re.compile(rb"[0-9]+")
MAX_SPACES, MAX_TABS = 64, 16
USUAL_INDENTS = (4, 8, 12, 16)
MIXED = ("\r\n", "\r\n\r\n", "\t \t ", " \n", "\n \n", "\u3000", "\u00a0\u00a0", " \t\n\r\n  x")
EXAMPLES = ("\n    x", "\n        x", "\n\tx", "\n\n\nx", "a  b", "a\r\nb", "\n \n x")


def pieces(tokenizer: Opened, text: str) -> list[bytes]:
    """Return the bytes of each token of a text."""
    return [tokenizer.tokens.get(i, b"") for i in tokenizer.encode(text)]


def digit_shape(tokenizer: Opened, number: str) -> tuple[int, ...]:
    """Return how many digits of a number each of its tokens holds, from the left."""
    digits = (sum(len(run) for run in _DIGITS.findall(piece)) for piece in pieces(tokenizer, f"n={number}"))
    return tuple(n for n in digits if n)


def check_digits(tokenizer: Opened) -> TokenizerCheck:
    """How numbers of 1 to 12 digits are cut: one by one, in regular groups,
    or depending on which digits they are."""
    several = [i for i, token in sorted(tokenizer.tokens.items()) if _several_digits(token)]
    draw = random.Random(0)
    learned = [run.decode() for i in several for run in _DIGITS.findall(tokenizer.tokens[i])]
    by_length = {n: [f"{draw.randrange(10 ** (n - 1), 10 ** n)}" for _ in range(NUMBERS_PER_LENGTH)]
                 for n in range(1, MAX_DIGITS + 1)}
    for number in learned[:2000]:
        if len(number) <= MAX_DIGITS:
            by_length[len(number)].append(number)
    shapes = {n: _shapes(tokenizer, numbers) for n, numbers in by_length.items()}
    single = all(shape == (1,) * n for n, found in shapes.items() for shape in found)
    regular = all(len(found) == 1 for found in shapes.values())
    verdict: Verdict = "good" if single and not several else "note" if regular else "bad"
    how = ("every digit is a token of its own" if single
           else "numbers are cut in groups that depend on their length alone"
           if regular else "how a number is cut depends on which digits it has")
    example = f", such as {shown(tokenizer.tokens[several[0]])}" if several else ""
    summary = f"{how}; {len(several):,} tokens hold several digits{example}"
    numbers = {"single_digits": single, "regular": regular, "num_multi_digit_tokens": len(several),
               "multi_digit_tokens": [shown(tokenizer.tokens[i]) for i in several[:200]],
               "shapes": {str(n): {_sum(s): number for s, number in found.items()}
                          for n, found in shapes.items()}}
    rows = [
        [str(n), f"{len(found)}", "; ".join(f"{_sum(s)} ({number})" for s, number in list(found.items())[:4])]
        for n, found in shapes.items()]
    return TokenizerCheck("digits", "Digits", verdict, summary, numbers,
                          [PageTable(["digits", "ways", "groups, with an example"], rows)])


def _sum(shape: tuple[int, ...]) -> str:
    return "+".join(map(str, shape))


def _several_digits(token: bytes) -> bool:
    """Return whether a token holds two digits, or numerals, side by side."""
    text = token.decode("utf-8", errors="replace")
    return any(a[0] == b[0] == "N" for a, b in itertools.pairwise(map(unicodedata.category, text)))


def _shapes(tokenizer: Opened, numbers: list[str]) -> dict[tuple[int, ...], str]:
    found: dict[tuple[int, ...], str] = {}
    for number in numbers:
        found.setdefault(digit_shape(tokenizer, number), number)
    return found


def check_whitespace(tokenizer: Opened) -> TokenizerCheck:
    """Indentation by 1 to 64 spaces and 1 to 16 tabs, line breaks and mixed white space: tokens,
    and whether it comes back."""
    indents = {" ": MAX_SPACES, "\t": MAX_TABS}
    base = len(tokenizer.encode("if x:\nreturn y"))
    cost = {unit: [len(tokenizer.encode(f"if x:\n{unit * n}return y")) - base for n in range(1, most + 1)]
            for unit, most in indents.items()}
    runs = [unit * n for unit, most in indents.items() for n in range(1, most + 1)]
    runs += [*("\n" * n for n in range(1, 9)), *MIXED]
    texts = [f"{before}{run}{after}" for run in runs for before, after in (("", ""), ("x", "y"), ("\n", "y"))]
    lost = [text for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True)
            if tokenizer.decode(ids) != text]
    white = {id_: token for id_, token in tokenizer.tokens.items() if token and not token.strip(b" \t\r\n")}
    spaces, tabs, breaks = (max((len(t) for t in white.values() if not t.strip(unit)), default=0)
                            for unit in (b" ", b"\t", b"\n"))
    dear = [n for n in USUAL_INDENTS if cost[" "][n - 1] > 1]
    verdict: Verdict = "bad" if lost else "note" if dear else "good"
    comes_back = (f"{len(lost)} of {len(texts)} do not come back, such as {shown(lost[0])}" if lost
                  else "every run comes back")
    summary = (f"{len(white)} tokens are white space (longest: spaces {spaces}, tabs {tabs}, "
               f"line breaks {breaks}); {comes_back}"
               + (f"; indentation by {', '.join(map(str, dear))} spaces takes more than one token more"
                  if dear else ""))
    numbers = {"num_whitespace_tokens": len(white), "longest_spaces": spaces, "longest_tabs": tabs,
               "longest_line_breaks": breaks, "num_tried": len(texts),
               "not_given_back": [shown(t) for t in lost],
               "tokens_more_for_spaces": cost[" "], "tokens_more_for_tabs": cost["\t"]}
    drawn = lines(list(range(1, MAX_SPACES + 1)), {"spaces": cost[" "], "tabs": cost["\t"]},
                  ("indentation", "tokens more than without"), "What indentation of a line of code costs.")
    rows = [[shown(text), cut(pieces(tokenizer, text))] for text in EXAMPLES]
    return TokenizerCheck("whitespace", "Indentation and white space", verdict, summary, numbers,
                          [PageTable(["text", "tokens"], rows)], [drawn])


# Held-out texts by name, one for each language or domain; of a large one,
# parts spread evenly over its files.

CHUNK_BYTES = 100_000
"""Longer documents are cut at blank lines, so that one of them does not hold up all others."""
UNIT_BYTES = 1 << 20
DEFAULT_MB = 10.0
"""Most text of each name that is read, in MB."""
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Thai, Lao, Burmese, Khmer, kana, Han."""


TokenizerPath = Annotated[Path, Flag("TOKENIZER", help=(
    "A folder, a tokenizer.json, a sentencepiece .model, or a .tiktoken file with its pat_str in "
    "FILE.tiktoken.json."))]


@dataclass(frozen=True, kw_only=True)
class HeldoutTextOptions:
    """Held-out text."""

    text: Annotated[tuple[str, ...], Flag(value="[NAME=]PATH", many=True)] = ()
    """Held-out text: a text file, .jsonl, .parquet or a folder of them, one for each language or domain."""
    max_text_mb: Annotated[AboveZero, Flag(value="MB")] = DEFAULT_MB
    """Most text of each that is read, spread evenly over its files."""


@dataclass(frozen=True)
class NamedText:
    """Text of one language or domain."""

    name: str
    path: str
    chunks: list[str]
    """Documents, long ones in pieces."""
    whole: bool
    """Whether this is all the text there is at the path."""

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
        """Whether spaces part words: at most half of the letters belong to scripts without them."""
        without = sum(len(_WITHOUT_SPACES.findall(chunk)) for chunk in self.chunks)
        return 2 * without <= sum(c.isalpha() for chunk in self.chunks for c in chunk)

    def part(self, num_bytes: int) -> list[str]:
        """Return chunks from all over the text, of about so many bytes together, at least one."""
        step = max(1, round(self.num_bytes / num_bytes))
        return self.chunks[::step]


def read_texts(arguments: Sequence[str], max_mb: float) -> list[NamedText]:
    """Read the texts of `--text [NAME=]PATH ...`.

    Raises:
        UserError: a name stands twice, a path is missing, or a file is no text or holds none.
    """
    texts: list[NamedText] = []
    for argument in arguments:
        name, path = parse_text(argument)
        if name in (text.name for text in texts):
            raise UserError(f"--text {argument!r}: the name {name!r} is taken by another text; name it, "
                            f"e.g. other={path}")
        texts.append(read_text(name, path, round(1e6 * max_mb)))
    return texts


def parse_text(argument: str) -> tuple[str, Path]:
    """Split `[NAME=]PATH`; without a name, the file's or folder's own is taken.

    Raises:
        UserError: the name or the path is empty.
    """
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return Path(argument).name.partition(".")[0] or argument, Path(argument)
    if not name or not path:
        raise UserError(f"--text {argument!r}: must be a path or NAME=PATH, e.g. korean=heldout/ko.jsonl")
    return name, Path(path)


def read_text(name: str, path: Path, max_bytes: int) -> NamedText:
    """Read text at a path, at most about `max_bytes`.

    Raises:
        UserError: the path is missing, or a file is no text or holds none.
    """
    units = list(plan_units(list_files(path, print), UNIT_BYTES))
    on_disk = sum(span.size_bytes for unit in units for span in unit)
    step = max(1, round(on_disk / max_bytes))
    chunks: list[str] = []
    left = max_bytes
    whole = step == 1
    for unit in units[::step]:
        for chunk in _chunks(unit):
            chunks.append(chunk)
            left -= len(chunk.encode())
            if left <= 0:
                return NamedText(name, str(path), chunks, False)
    if not chunks:
        raise UserError(f"--text {path}: holds no text; pass files with text in them")
    return NamedText(name, str(path), chunks, whole)


def _chunks(unit: tuple) -> Iterator[str]:
    """Yield the text of some spans.

    Raises:
        UserError: a record is damaged.
    """
    for span in unit:
        for item in read_span(span, RecordReading()):
            if isinstance(item, Document):
                for text in item.texts():
                    yield from cut_text(text, CHUNK_BYTES)
            elif item.code != "empty":
                raise UserError(f"{span.file}: {item.reason}")


@dataclass(frozen=True)
class TokenizerMeasures:
    """One text under one tokenizer."""

    text: NamedText
    counts: NDArray[np.int64]
    """How often each id occurs, [vocab]."""
    num_changed: int
    """Chunks that decoding does not give back, after the tokenizer's own normalization."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return int(self.counts.sum())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token: higher is cheaper."""
        return self.text.num_bytes / max(1, self.num_tokens)

    @property
    def tokens_per_char(self) -> float:
        """Tokens for each Unicode scalar value."""
        return self.num_tokens / self.text.num_chars

    @property
    def tokens_per_word(self) -> float | None:
        """Tokens for each run of characters between white space; None where spaces do not part words."""
        return self.num_tokens / self.text.num_words if self.text.has_words else None

    def numbers(self) -> dict[str, object]:
        """Return the figures as plain values."""
        text = self.text
        return {
            "path": text.path, "whole": text.whole, "num_bytes": text.num_bytes, "num_chars": text.num_chars,
            "num_words": text.num_words if text.has_words else None, "num_tokens": self.num_tokens,
            "bytes_per_token": self.bytes_per_token, "tokens_per_char": self.tokens_per_char,
            "tokens_per_word": self.tokens_per_word, "tokens_per_1000_chars": 1000 * self.tokens_per_char,
            "tokens_per_1000_words": None if self.tokens_per_word is None else 1000 * self.tokens_per_word,
            "chunks_not_given_back": self.num_changed, "num_chunks": len(text.chunks)}


def measure(tokenizer: Opened, text: NamedText) -> TokenizerMeasures:
    """Encode a text, count its tokens and decode it again."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    changed = 0
    for chunk, ids in zip(text.chunks, tokenizer.encode_many(text.chunks), strict=True):
        counts += np.bincount(np.asarray(ids, np.int64), minlength=len(counts))
        changed += tokenizer.decode(ids) != tokenizer.normalize(chunk)
    return TokenizerMeasures(text, counts, changed)


def check_texts(tokenizer: Opened, measured: list[TokenizerMeasures]) -> TokenizerCheck:
    """Compression, cost in context and share of the computation, for each text;
    and whether each is given back."""
    partial = np.zeros(tokenizer.vocab_size, np.bool_)
    partial[[id_ for id_, token in tokenizer.tokens.items() if not is_text(token)]] = True
    all_bytes, all_tokens = sum(m.text.num_bytes for m in measured), sum(m.num_tokens for m in measured)
    numbers = {}
    for m in measured:
        share_bytes, share_tokens = m.text.num_bytes / all_bytes, m.num_tokens / all_tokens
        numbers[m.text.name] = m.numbers() | {
            "share_of_bytes": share_bytes, "share_of_flops": share_tokens, "cost_against_mean": share_tokens
            / share_bytes, "share_of_partial_characters": int(m.counts[partial].sum()) / max(1, m.num_tokens)}
    changed = sum(m.num_changed for m in measured)
    best, worst = (pick(measured, key=lambda m: m.bytes_per_token) for pick in (max, min))
    summary = (f"{all_bytes / 1e6:.2f} MB in {len(measured)} texts, {all_bytes / all_tokens:.3f} bytes per "
               f"token; best {best.text.name} ({best.bytes_per_token:.3f}), worst {worst.text.name} "
               f"({worst.bytes_per_token:.3f}); "
               + (f"{changed} pieces of text are not given back by decoding" if changed
                  else "decoding gives all of it back"))
    names = [m.text.name for m in measured]
    cost = [1000 * (m.tokens_per_word or m.tokens_per_char) for m in measured]
    charts = [bars(names, {"bytes per token": [m.bytes_per_token for m in measured]}, "bytes per token",
                   "UTF-8 bytes of text in a token: more is cheaper."),
              bars([n if m.text.has_words else f"{n} (characters)"
                    for n, m in zip(names, measured, strict=True)], {"tokens": cost}, "tokens",
                   "Context that 1,000 words take; 1,000 characters where spaces do not part words.")]
    return TokenizerCheck("texts", "Texts", "bad" if changed else "good", summary, {"texts": numbers},
                          [table(measured)], charts)


def table(measured: list[TokenizerMeasures]) -> PageTable:
    """Return the figures of each text as a table."""
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
