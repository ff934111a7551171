"""Declare and run `sov-tokenizer compare`: cost, shared vocabulary and speed of tokenizers."""

from __future__ import annotations

import itertools
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

SPEED_BYTES = 1_000_000
"""Text for `measure_speeds`, over all --text together."""
SPEED_ROUNDS = 2
DEFAULT_HIDDEN_SIZE, DEFAULT_BODY_PARAMS = 4096, 8e9


def build_text_table(comparison: dict[str, Any], key: str, form: str, title: str = "text") -> PageTable:
    """Return the measurement `key` as a table, a row per text, a column per tokenizer (`PageTable`)."""
    rows = [[text, *(_format_value(t["texts"][text][key], form) for t in comparison["tokenizers"].values())]
            for text in comparison["texts"]]
    return PageTable([title, *comparison["tokenizers"]], rows)


def _format_value(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def build_overlap_table(comparison: dict[str, Any]) -> PageTable:
    """Return `num_shared` and `share_of_first`, a row and a column per tokenizer."""
    names = list(comparison["tokenizers"])
    rows = []
    for name in names:
        shared = comparison["overlap"][name]
        rows.append([name, *("–" if column == name else f"{shared[column]['num_shared']:,} "
                             f"({shared[column]['share_of_first']:.1%})" for column in names)])
    return PageTable(["of these tokens", *(f"are in {name}" for name in names)], rows)


@dataclass(frozen=True)
class ModelSize:
    """Model size for FLOPs estimates."""

    hidden_size: int
    """Embedding and head width."""
    body_params: float
    """Active parameters per token, without embedding and head."""

    def embedding_params(self, vocab_size: int) -> int:
        """Return embedding and untied head parameters; tied weights have half as many."""
        return 2 * vocab_size * self.hidden_size

    def inference_flops_per_token(self, vocab_size: int) -> float:
        """Return forward FLOPs: 2 per active parameter, including the head (arXiv 2001.08361).

        The embedding is a table look-up, and attention over the context is left out, as in the paper.
        """
        return 2 * (self.body_params + vocab_size * self.hidden_size)

    def training_flops_per_token(self, vocab_size: int) -> float:
        """Return forward and backward FLOPs: 3 * `inference_flops_per_token`."""
        return 3 * self.inference_flops_per_token(vocab_size)


def choose_names(tokenizers: list[LoadedTokenizer]) -> list[str]:
    """Return folder or file names; the whole path if two names are equal."""
    names = [t.name for t in tokenizers]
    return [name if names.count(name) == 1 else str(t.path)
            for name, t in zip(names, tokenizers, strict=True)]


def compute_costs(tokenizer: LoadedTokenizer, measured: list[TokenizerMeasures], first: LoadedTokenizer,
                  first_measured: list[TokenizerMeasures], size: ModelSize) -> dict[str, dict[str, Any]]:
    """Return text name -> measurements and costs relative to the first tokenizer.

    `relative_tokens` is the cost in context, KV cache and generation steps; `relative_flops` adds a
    larger head.
    """
    flops = size.inference_flops_per_token(tokenizer.vocab_size)
    first_flops = size.inference_flops_per_token(first.vocab_size)
    training_flops = size.training_flops_per_token(tokenizer.vocab_size)
    costs = {}
    for m, reference in zip(measured, first_measured, strict=True):
        relative = m.num_tokens / max(1, reference.num_tokens)
        costs[m.text.name] = m.get_numbers() | {
            "relative_tokens": relative, "relative_flops": relative * flops / first_flops,
            "inference_flops_per_mb": m.num_tokens * flops / m.text.num_bytes * 1e6,
            "training_flops_per_mb": m.num_tokens * training_flops / m.text.num_bytes * 1e6}
    return costs


def measure_overlap(a: LoadedTokenizer, b: LoadedTokenizer) -> dict[str, Any]:
    """Count the tokens with equal bytes in two vocabularies, without special and added tokens."""
    first, second = set(a.tokens.values()), set(b.tokens.values())
    shared = len(first & second)
    return {"num_shared": shared, "share_of_first": shared / max(1, len(first)),
            "share_of_second": shared / max(1, len(second)), "jaccard": shared / max(1, len(first | second))}


def measure_speeds(tokenizers: list[LoadedTokenizer], texts: list[NamedText]) -> list[float]:
    """Return MB per CPU second by tokenizer, the best in `SPEED_ROUNDS` rounds."""
    chunks = [chunk for text in texts for chunk in text.sample_chunks(SPEED_BYTES // len(texts))]
    num_bytes = sum(len(chunk.encode()) for chunk in chunks)
    best_s = [float("inf")] * len(tokenizers)
    for _ in range(SPEED_ROUNDS):
        for i, tokenizer in enumerate(tokenizers):
            started_s = time.process_time()
            for chunk in chunks:
                tokenizer.encode(chunk)
            best_s[i] = min(best_s[i], time.process_time() - started_s)
    return [num_bytes / 1e6 / max(s, 1e-9) for s in best_s]


@dataclass(frozen=True, kw_only=True)
class TokenizerCompareOptions(HeldoutTextOptions):
    """Compare tokenizers on the same held-out text: bytes per token, tokens per word, cost in context and in
    FLOPs, shared vocabulary, and speed. Ratios are relative to the first tokenizer."""

    tokenizers: tuple[TokenizerPath, ...]
    hidden_size: AtLeastOne = DEFAULT_HIDDEN_SIZE
    """The model's embedding width."""
    body_params: Annotated[AboveZero, Flag(value="N")] = DEFAULT_BODY_PARAMS
    """Active parameters per token, without embedding and head."""
    json: Annotated[Path | None, Flag(value="FILE")] = None
    """Write all numbers to a JSON file."""


def run_compare(args: TokenizerCompareOptions) -> int:
    """Compare tokenizers, print tables and write the JSON file.

    Raises:
        UserError: fewer than two tokenizers, no text, an unreadable input, or an unwritable output.
    """
    if len(args.tokenizers) < 2:
        raise UserError(f"{args.tokenizers[0]}: is the only tokenizer; name a second tokenizer")
    if not args.text:
        raise UserError("--text is missing; name held-out text to compare on, e.g. "
                        "--text korean=heldout/ko.jsonl")
    check_output("--json", args.json)
    comparison = compare_tokenizers(args.tokenizers, read_texts(args.text, args.max_text_mb),
                                    args.hidden_size, args.body_params)
    for title, key in (("bytes per token", "bytes_per_token"), ("tokens per word", "tokens_per_word"),
                       ("tokens against the first", "relative_tokens"),
                       ("FLOPs against the first", "relative_flops")):
        print(f"{title}\n{_format_table(build_text_table(comparison, key, '{:.3f}'))}")
    print(f"shared vocabulary\n{_format_table(build_overlap_table(comparison))}")
    for name, facts in comparison["tokenizers"].items():
        print(f"{name}: {facts['vocab_size']:,} ids, {facts['mb_per_cpu_s']:.2f} MB per CPU second")
    if args.json is not None:
        write_output(args.json, format_json(comparison))
    return 0


def compare_tokenizers(paths: Sequence[Path], texts: list[NamedText], hidden_size: int,
            body_params: float) -> dict[str, Any]:
    """Return all measurements as JSON values."""
    loaded = [open_tokenizer(path) for path in paths]
    stop_check()
    names, size = choose_names(loaded), ModelSize(hidden_size, body_params)
    measured = [[measure_text(tokenizer, text) for text in texts]
                for tokenizer in tqdm(loaded, "encoding", disable=None)]
    mb_per_s = measure_speeds(loaded, texts)
    tokenizers = {}
    for name, tokenizer, m, speed in zip(names, loaded, measured, mb_per_s, strict=True):
        head = tokenizer.vocab_size * hidden_size
        tokenizers[name] = {
            "path": str(tokenizer.path), "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
            "embedding_params": size.embedding_params(tokenizer.vocab_size),
            "head_share_of_flops": head / (body_params + head), "mb_per_cpu_s": speed,
            "texts": compute_costs(tokenizer, m, loaded[0], measured[0], size)}
    overlaps: dict[str, Any] = {name: {} for name in names}
    for (a, x), (b, y) in itertools.product(zip(names, loaded, strict=True), repeat=2):
        overlaps[a][b] = measure_overlap(x, y)
    return {"hidden_size": hidden_size, "body_params": body_params, "texts": [t.name for t in texts],
            "tokenizers": tokenizers, "overlap": overlaps}


def _format_table(table: PageTable) -> str:
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    rows = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (table.head, *table.rows)]
    return "\n".join("  " + "  ".join(row) for row in rows)


COMPARE = DeclaredCommand(TokenizerCompareOptions, run_compare)
