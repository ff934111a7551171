"""`sov-tokenizer compare`: several tokenizers on the same held-out text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.pages.page import PageTable
from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag, add_options, read_options
from tokenizer.formats.loaders import open_tokenizer
from tokenizer.report.measures import HeldoutTextOptions, NamedText, TokenizerPath, read_texts

DEFAULT_HIDDEN_SIZE, DEFAULT_BODY_PARAMS = 4096, 8e9


@dataclass(frozen=True, kw_only=True)
class TokenizerCompareOptions(HeldoutTextOptions):
    """Compare tokenizers on the same held-out text: bytes per token, tokens per word, cost in
    context and in FLOPs, shared vocabulary, what they cut differently, and speed. Figures that are ratios are
    against the first tokenizer."""

    tokenizers: tuple[TokenizerPath, ...]
    hidden_size: AtLeastOne = DEFAULT_HIDDEN_SIZE
    """Width of the model's embedding and head."""
    body_params: Annotated[AboveZero, Flag(value="N")] = DEFAULT_BODY_PARAMS
    """Parameters that each token meets, without embedding and head."""
    output: Annotated[Path | None, Flag(value="FILE.html")] = None
    """Write a page here."""
    json: Annotated[Path | None, Flag(value="FILE")] = None
    """Write all numbers here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_options(parser, TokenizerCompareOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer compare`; returns 0.

    Raises:
        UserError: fewer than two tokenizers, no text, one that cannot be read,
            or an output that cannot be written.
    """
    from tokenizer.compare.measuring import overlap_table, render, text_table

    args = read_options(TokenizerCompareOptions, typed)
    if len(args.tokenizers) < 2:
        raise UserError(f"{args.tokenizers[0]}: is the only tokenizer; name another one to compare "
                        "it with")
    if not args.text:
        raise UserError("--text is missing; name held-out text to compare on, e.g. "
                        "--text korean=heldout/ko.jsonl")
    check_output("--output", args.output)
    check_output("--json", args.json)
    found = compare(args.tokenizers, read_texts(args.text, args.max_text_mb), args.hidden_size,
                    args.body_params)
    for title, table in (("bytes per token", text_table(found, "bytes_per_token", "{:.3f}")),
                         ("tokens per word", text_table(found, "tokens_per_word", "{:.3f}")),
                         ("tokens against the first", text_table(found, "relative_tokens", "{:.3f}")),
                         ("FLOPs against the first", text_table(found, "relative_flops", "{:.3f}")),
                         ("shared vocabulary", overlap_table(found))):
        print(f"{title}\n{_plain(table)}")
    for name, facts in found["tokenizers"].items():
        print(f"{name}: {facts['vocab_size']:,} ids, {facts['mb_per_cpu_s']:.2f} MB per CPU second")
    if args.output is not None:
        write_output(args.output, render(found))
        print(f"{args.output}: opens in any browser without a network")
    if args.json is not None:
        write_output(args.json, to_json(found))
    return 0


def compare(paths: Sequence[Path], texts: list[NamedText], hidden_size: int,
            body_params: float) -> dict[str, Any]:
    """Return everything that is known about some tokenizers beside each other, as plain values."""
    from tokenizer.compare.measuring import (
        ModelSize, costs, different_lines, different_words, names_of, overlap, speeds)
    from tokenizer.report.measures import TokenizerMeasures, measure

    opened = [open_tokenizer(path) for path in paths]
    names, size = names_of(opened), ModelSize(hidden_size, body_params)
    with tqdm(total=len(opened) * len(texts) + 1 + len(texts), desc="encoding",
              mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        measured: list[list[TokenizerMeasures]] = [[] for _ in opened]
        for tokenizer, texts_of_it in zip(opened, measured, strict=True):
            for text in texts:
                texts_of_it.append(measure(tokenizer, text))
                bar.update()
        bar.set_description_str("speed")
        mb_per_s = speeds(opened, texts)
        bar.update()
        bar.set_description_str("cuts")
        cut = {}
        for text in texts:
            cut[text.name] = {"words": different_words(opened, text), "lines": different_lines(opened, text)}
            bar.update()
    tokenizers = {}
    named = dict(zip(names, opened, strict=True))
    for name, tokenizer, m, speed in zip(names, opened, measured, mb_per_s, strict=True):
        head = tokenizer.vocab_size * hidden_size
        tokenizers[name] = {
            "path": str(tokenizer.path), "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
            "embedding_params": size.embedding_params(tokenizer.vocab_size),
            "head_share_of_flops": head / (body_params + head), "mb_per_cpu_s": speed,
            "texts": costs(tokenizer, m, opened[0], measured[0], size)}
    return {"hidden_size": hidden_size, "body_params": body_params, "texts": [t.name for t in texts],
            "tokenizers": tokenizers,
            "overlap": {a: {b: overlap(x, y) for b, y in named.items()} for a, x in named.items()},
            "cut_differently": cut}


def _plain(table: PageTable) -> str:
    """Return a table for a terminal."""
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    rows = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (table.head, *table.rows)]
    return "\n".join("  " + "  ".join(row) for row in rows)
