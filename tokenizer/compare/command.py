"""`sov-tokenizer compare`: several tokenizers on the same held-out text: what they cost in context and
computation, what they share, how fast they are."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output, check_page
from megatron_sov.base.pages.page import Chapter, Chart, PageSection, PageTable, render as render_page
from megatron_sov.base.settings import AboveZero, AtLeastOne, Flag, add_options, read_options
from tokenizer.formats.reader import Opened, open_tokenizer
from tokenizer.report.check import bars, cut
from tokenizer.report.measures import (
    HeldoutTextOptions, NamedText, TokenizerMeasures, TokenizerPath, read_texts)

# Words and lines that tokenizers cut differently.

SAMPLE_BYTES = 300_000
NUM_WORDS, NUM_LINES = 8, 4
MOST_FREQUENT = 3000
MIN_LINE_CHARS, MAX_LINE_CHARS = 20, 120


def different_words(tokenizers: list[Opened], text: NamedText) -> list[dict[str, Any]]:
    """Return frequent words that are not cut alike, those first where the difference costs most tokens."""
    if not text.has_words:
        return []
    counts = Counter(word for chunk in text.part(SAMPLE_BYTES) for word in chunk.split())
    frequent = [word for word, _ in counts.most_common(MOST_FREQUENT)]
    return [{"text": word, "count": counts[word], "cuts": cuts} for word, cuts, _ in _different(
        tokenizers, [f" {word}" for word in frequent], lambda text: counts[text[1:]])[:NUM_WORDS]]


def different_lines(tokenizers: list[Opened], text: NamedText) -> list[dict[str, Any]]:
    """Return lines that are not cut alike, those first where the ratio of tokens is largest."""
    lines = dict.fromkeys(line.strip() for chunk in text.part(SAMPLE_BYTES) for line in chunk.split("\n"))
    fitting = [line for line in lines if MIN_LINE_CHARS <= len(line) <= MAX_LINE_CHARS]
    return [{"text": line, "num_tokens": sizes, "cuts": cuts} for line, cuts, sizes in
            _different(tokenizers, fitting, None)[:NUM_LINES]]


def _different(tokenizers: list[Opened], samples: list[str],
               count: Any) -> list[tuple[str, list[str], list[int]]]:
    """Return (sample, cut by each, tokens of each) of those that are not cut alike,
    the largest differences first."""
    encoded = [t.encode_many(samples) for t in tokenizers]
    found = []
    for i, sample in enumerate(samples):
        pieces = [tuple(t.tokens.get(id_, b"") for id_ in ids[i])
                  for t, ids in zip(tokenizers, encoded, strict=True)]
        if len(set(pieces)) > 1:
            sizes = [len(p) for p in pieces]
            weight = count(sample) * (max(sizes) - min(sizes)) if count else max(sizes) / max(1, min(sizes))
            found.append((weight, i, sample.strip(), [cut(list(p)) for p in pieces], sizes))
    return [(sample, cuts, sizes) for _, _, sample, cuts, sizes in sorted(found, key=lambda f: (-f[0], f[1]))]


# A comparison as a page.

def render(found: dict[str, Any]) -> str:
    """Return the HTML of what `compare` found."""
    names = list(found["tokenizers"])
    sections = [PageSection(title, text, charts, tables) for title, text, charts, tables in (
        ("Bytes per token", "UTF-8 bytes of text in a token: more is cheaper in context, memory and time.",
         [_by_text(found, "bytes_per_token", "bytes per token")],
         [text_table(found, "bytes_per_token", "{:.3f}")]),
        ("Tokens per word", "Words are parted by white space; a dash stands where a text has none.", [],
         [text_table(found, "tokens_per_word", "{:.3f}"),
          text_table(found, "tokens_per_char", "{:.3f}", "tokens per character")]),
        ("Cost", f"Against {names[0]}: tokens are context, cache and generation steps; FLOPs also count the "
                 f"head of each vocabulary, in a model of {found['body_params'] / 1e9:g} B parameters "
                 f"without embedding and head and of hidden size {found['hidden_size']:,}. "
                 "Training costs three times the FLOPs of inference, so the ratios are the same.",
         [_by_text(found, "relative_flops", f"FLOPs against {names[0]}")],
         [text_table(found, "relative_tokens", "{:.3f}", "tokens"),
          text_table(found, "relative_flops", "{:.3f}", "FLOPs")]),
        ("Shared vocabulary", "Tokens with the same bytes, special ones left out.", [],
         [overlap_table(found)]),
        ("Cut differently", "Frequent words, and lines with the largest ratio of tokens.", [],
         _cut_tables(found)),
    )]
    return render_page("Tokenizer comparison", " / ".join(names),
                       f"{len(names)} tokenizers on {len(found['texts'])} texts.",
                       [Chapter("Comparison", "", [], sections)], anchor="comparison",
                       overview=("Tokenizers", model_table(found)))


def _by_text(found: dict[str, Any], key: str, axis: str) -> Chart:
    series = {name: [t["texts"][text][key] for text in found["texts"]]
              for name, t in found["tokenizers"].items()}
    return bars(found["texts"], series, axis, f"{axis[0].upper()}{axis[1:]} of each text.")


def text_table(found: dict[str, Any], key: str, form: str, title: str = "text") -> PageTable:
    """Return one figure of all tokenizers, a row for each text."""
    rows = [[text, *(_formed(t["texts"][text][key], form) for t in found["tokenizers"].values())]
            for text in found["texts"]]
    return PageTable([title, *found["tokenizers"]], rows)


def _formed(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def model_table(found: dict[str, Any]) -> PageTable:
    """Return what each tokenizer is and what it asks of a model."""
    rows = [[name, t["library"], f"{t['vocab_size']:,}", f"{t['embedding_params'] / 1e6:,.1f} M",
             f"{t['head_share_of_flops']:.1%}", f"{t['mb_per_cpu_s']:.2f}"]
            for name, t in found["tokenizers"].items()]
    return PageTable(["tokenizer", "library", "ids", "embedding and head", "FLOPs in head", "MB per CPU s"],
                     rows)


def overlap_table(found: dict[str, Any]) -> PageTable:
    """Return what share of the row's tokens the column's tokenizer has."""
    names = list(found["tokenizers"])
    rows = [[a, *("–" if a == b else f"{found['overlap'][a][b]['num_shared']:,} "
                                     f"({found['overlap'][a][b]['share_of_first']:.1%})"
                  for b in names)] for a in names]
    return PageTable(["of these tokens", *(f"are in {name}" for name in names)], rows)


def _cut_tables(found: dict[str, Any]) -> list[PageTable]:
    names = list(found["tokenizers"])
    tables = []
    for text in found["texts"]:
        words, lines = found["cut_differently"][text]["words"], found["cut_differently"][text]["lines"]
        if words:
            tables.append(PageTable([f"{text}: word", "times", *names],
                                    [[w["text"], f"{w['count']:,}", *w["cuts"]] for w in words]))
        if lines:
            rows = [[*(f"{n}: {c}" for n, c in zip(line["num_tokens"], line["cuts"], strict=True))]
                    for line in lines]
            tables.append(
                PageTable([f"{text}: line by {name}" if i == 0 else name for i, name in enumerate(names)],
                          rows))
    return tables


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


def names_of(tokenizers: list[Opened]) -> list[str]:
    """Return a name for each tokenizer: that of its folder or file, or all of its path where
    two have the same."""
    names = [t.name for t in tokenizers]
    return [name if names.count(name) == 1 else str(t.path)
            for name, t in zip(names, tokenizers, strict=True)]


def costs(tokenizer: Opened, measured: list[TokenizerMeasures], first: Opened,
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


def overlap(a: Opened, b: Opened) -> dict[str, Any]:
    """Return how many tokens two vocabularies share, by their bytes;
    special and added tokens are left out."""
    ours, theirs = set(a.tokens.values()), set(b.tokens.values())
    shared = len(ours & theirs)
    return {"num_shared": shared, "share_of_first": shared / max(1, len(ours)),
            "share_of_second": shared / max(1, len(theirs)), "jaccard": shared / max(1, len(ours | theirs))}


def speeds(tokenizers: list[Opened], texts: list[NamedText]) -> list[float]:
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
    add_options(parser, TokenizerCompareOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer compare`; returns 0.

    Raises:
        UserError: fewer than two tokenizers, no text, one that cannot be read,
            or an output that cannot be written.
    """

    args = read_options(TokenizerCompareOptions, typed)
    if len(args.tokenizers) < 2:
        raise UserError(f"{args.tokenizers[0]}: is the only tokenizer; name another one to compare "
                        "it with")
    if not args.text:
        raise UserError("--text is missing; name held-out text to compare on, e.g. "
                        "--text korean=heldout/ko.jsonl")
    check_page("--output", args.output)
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
    from tokenizer.report.measures import measure

    opened = [open_tokenizer(path) for path in paths]
    names, size = names_of(opened), ModelSize(hidden_size, body_params)
    with tqdm(total=len(opened) * len(texts) + 1 + len(texts), desc="encoding", disable=None) as bar:
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
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    rows = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (table.head, *table.rows)]
    return "\n".join("  " + "  ".join(row) for row in rows)
