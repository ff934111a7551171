"""`sov-tokenizer compare`: several tokenizers on the same held-out text: what they cost in context and
computation, what they share, how fast they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import UserError, stop_check
from megatron_sov.base.outputs import check_output
from megatron_sov.base.pages.page import PageTable
from megatron_sov.base.settings import AboveZero, AtLeastOne, DeclaredCommand, Flag
from tokenizer.formats.reader import LoadedTokenizer, open_tokenizer
from tokenizer.report.measures import (
    HeldoutTextOptions, NamedText, TokenizerMeasures, TokenizerPath, measure_text, read_texts)


def build_text_table(comparison: dict[str, Any], key: str, form: str, title: str = "text") -> PageTable:
    """Return one figure of all tokenizers, a row for each text."""
    rows = [[text, *(_format_value(t["texts"][text][key], form) for t in comparison["tokenizers"].values())]
            for text in comparison["texts"]]
    return PageTable([title, *comparison["tokenizers"]], rows)


def _format_value(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def build_overlap_table(comparison: dict[str, Any]) -> PageTable:
    """Return what share of the row's tokens the column's tokenizer has."""
    names = list(comparison["tokenizers"])
    rows = [[a, *("–" if a == b else f"{comparison['overlap'][a][b]['num_shared']:,} "
                                     f"({comparison['overlap'][a][b]['share_of_first']:.1%})"
                  for b in names)] for a in names]
    return PageTable(["of these tokens", *(f"are in {name}" for name in names)], rows)


SPEED_BYTES = 1_000_000
"""Text on which speed is measured, of all texts together."""
SPEED_ROUNDS = 2


@dataclass(frozen=True)
class ModelSize:
    """The model that a tokenizer would serve."""

    hidden_size: int
    """Width of embedding and head."""
    body_params: float
    """Parameters that each token meets, without embedding and head."""

    def embedding_params(self, vocab_size: int) -> int:
        """Return the parameters of embedding and untied head; half of them where they are tied."""
        return 2 * vocab_size * self.hidden_size

    def inference_flops_per_token(self, vocab_size: int) -> float:
        """Return FLOPs of one token forward: 2 for each parameter that it meets,
        the head's among them (arXiv 2001.08361).

        The embedding is a look-up; attention over the context is left out, as there.
        """
        return 2 * (self.body_params + vocab_size * self.hidden_size)

    def training_flops_per_token(self, vocab_size: int) -> float:
        """Return FLOPs of one token forward and backward: three times the forward pass."""
        return 3 * self.inference_flops_per_token(vocab_size)


def choose_names(tokenizers: list[LoadedTokenizer]) -> list[str]:
    """Return a name for each tokenizer: that of its folder or file, or all of its path where
    two have the same."""
    names = [t.name for t in tokenizers]
    return [name if names.count(name) == 1 else str(t.path)
            for name, t in zip(names, tokenizers, strict=True)]


def compute_costs(tokenizer: LoadedTokenizer, measured: list[TokenizerMeasures], first: LoadedTokenizer,
          first_measured: list[TokenizerMeasures], size: ModelSize
          ) -> dict[str, dict[str, Any]]:
    """Return the figures of one tokenizer on each text, against the first tokenizer's.

    `relative_tokens` is the cost in context, in the cache of keys and values, and in generation steps;
    `relative_flops` also counts that a larger head makes each token dearer.
    """
    ours, theirs = (size.inference_flops_per_token(t.vocab_size) for t in (tokenizer, first))
    found = {}
    for m, reference in zip(measured, first_measured, strict=True):
        relative = m.num_tokens / max(1, reference.num_tokens)
        found[m.text.name] = m.numbers() | {
            "relative_tokens": relative, "relative_flops": relative * ours / theirs,
            "inference_flops_per_mb": m.num_tokens * ours / m.text.num_bytes * 1e6,
            "training_flops_per_mb": m.num_tokens * size.training_flops_per_token(tokenizer.vocab_size)
            / m.text.num_bytes * 1e6}
    return found


def measure_overlap(a: LoadedTokenizer, b: LoadedTokenizer) -> dict[str, Any]:
    """Return how many tokens two vocabularies share, by their bytes;
    special and added tokens are left out."""
    ours, theirs = set(a.tokens.values()), set(b.tokens.values())
    shared = len(ours & theirs)
    return {"num_shared": shared, "share_of_first": shared / max(1, len(ours)),
            "share_of_second": shared / max(1, len(theirs)), "jaccard": shared / max(1, len(ours | theirs))}


def measure_speeds(tokenizers: list[LoadedTokenizer], texts: list[NamedText]) -> list[float]:
    """Return MB of text per CPU second of each tokenizer, chunk after chunk;
    the best of some rounds, taken in turn."""
    chunks = [chunk for text in texts for chunk in text.part(SPEED_BYTES // len(texts))]
    num_bytes = sum(len(chunk.encode()) for chunk in chunks)
    best_s = [float("inf")] * len(tokenizers)
    for _ in range(SPEED_ROUNDS):
        for i, tokenizer in enumerate(tokenizers):
            started_s = time.process_time()
            for chunk in chunks:
                tokenizer.encode(chunk)
            best_s[i] = min(best_s[i], time.process_time() - started_s)
    return [num_bytes / 1e6 / max(s, 1e-9) for s in best_s]


DEFAULT_HIDDEN_SIZE, DEFAULT_BODY_PARAMS = 4096, 8e9


@dataclass(frozen=True, kw_only=True)
class TokenizerCompareOptions(HeldoutTextOptions):
    """Compare tokenizers on the same held-out text: bytes per token, tokens per word, cost in
    context and in FLOPs, shared vocabulary, and speed. Figures that are ratios are
    against the first tokenizer."""

    tokenizers: tuple[TokenizerPath, ...]
    hidden_size: AtLeastOne = DEFAULT_HIDDEN_SIZE
    """Width of the model's embedding and head."""
    body_params: Annotated[AboveZero, Flag(value="N")] = DEFAULT_BODY_PARAMS
    """Parameters that each token meets, without embedding and head."""
    json: Annotated[Path | None, Flag(value="FILE")] = None
    """Write all numbers here."""


def run_compare(args: TokenizerCompareOptions) -> int:
    """Run `sov-tokenizer compare`; returns 0.

    Raises:
        UserError: fewer than two tokenizers, no text, one that cannot be read,
            or an output that cannot be written.
    """
    if len(args.tokenizers) < 2:
        raise UserError(f"{args.tokenizers[0]}: is the only tokenizer; name another one to compare "
                        "it with")
    if not args.text:
        raise UserError("--text is missing; name held-out text to compare on, e.g. "
                        "--text korean=heldout/ko.jsonl")
    check_output("--json", args.json)
    found = compare_tokenizers(args.tokenizers, read_texts(args.text, args.max_text_mb), args.hidden_size,
                    args.body_params)
    for title, table in (("bytes per token", build_text_table(found, "bytes_per_token", "{:.3f}")),
                         ("tokens per word", build_text_table(found, "tokens_per_word", "{:.3f}")),
                         ("tokens against the first", build_text_table(found, "relative_tokens", "{:.3f}")),
                         ("FLOPs against the first", build_text_table(found, "relative_flops", "{:.3f}")),
                         ("shared vocabulary", build_overlap_table(found))):
        print(f"{title}\n{_format_table(table)}")
    for name, facts in found["tokenizers"].items():
        print(f"{name}: {facts['vocab_size']:,} ids, {facts['mb_per_cpu_s']:.2f} MB per CPU second")
    if args.json is not None:
        write_output(args.json, format_json(found))
    return 0


def compare_tokenizers(paths: Sequence[Path], texts: list[NamedText], hidden_size: int,
            body_params: float) -> dict[str, Any]:
    """Return everything that is known about some tokenizers beside each other, as plain values."""
    opened = [open_tokenizer(path) for path in paths]
    stop_check()
    names, size = choose_names(opened), ModelSize(hidden_size, body_params)
    measured = [[measure_text(tokenizer, text) for text in texts]
                for tokenizer in tqdm(opened, "encoding", disable=None)]
    mb_per_s = measure_speeds(opened, texts)
    tokenizers = {}
    named = dict(zip(names, opened, strict=True))
    for name, tokenizer, m, speed in zip(names, opened, measured, mb_per_s, strict=True):
        head = tokenizer.vocab_size * hidden_size
        tokenizers[name] = {
            "path": str(tokenizer.path), "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
            "embedding_params": size.embedding_params(tokenizer.vocab_size),
            "head_share_of_flops": head / (body_params + head), "mb_per_cpu_s": speed,
            "texts": compute_costs(tokenizer, m, opened[0], measured[0], size)}
    return {"hidden_size": hidden_size, "body_params": body_params, "texts": [t.name for t in texts],
            "tokenizers": tokenizers,
            "overlap": {a: {b: measure_overlap(x, y) for b, y in named.items()} for a, x in named.items()}}


def _format_table(table: PageTable) -> str:
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    rows = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (table.head, *table.rows)]
    return "\n".join("  " + "  ".join(row) for row in rows)


COMPARE = DeclaredCommand(TokenizerCompareOptions, run_compare)
