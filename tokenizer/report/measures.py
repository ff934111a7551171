"""How much text a token holds: the figures by which tokenizers are compared, for each text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sov.pages.content import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.charts import bars
from tokenizer.report.check import Check, is_text
from tokenizer.report.texts import NamedText


@dataclass(frozen=True)
class Measured:
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


def measure(tokenizer: Opened, text: NamedText) -> Measured:
    """Encode a text, count its tokens and decode it again."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    changed = 0
    for chunk, ids in zip(text.chunks, tokenizer.encode_many(text.chunks), strict=True):
        counts += np.bincount(np.asarray(ids, np.int64), minlength=len(counts))
        changed += tokenizer.decode(ids) != tokenizer.normalize(chunk)
    return Measured(text, counts, changed)


def check_texts(tokenizer: Opened, measured: list[Measured]) -> Check:
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
    return Check("texts", "Texts", "bad" if changed else "good", summary, {"texts": numbers},
                 [table(measured)], charts)


def table(measured: list[Measured]) -> Table:
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
    return Table(["text", "MB", "tokens", "bytes/token", "tokens/word", "tokens/character",
                  "context for 1,000 words", "% of bytes", "% of FLOPs"], rows)
