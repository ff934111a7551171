"""`sov-data stats`: how long documents are, what shares the token types have,
and which special tokens occur."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from data_prep.shards.encode import TOKENIZER_JSON
from data_prep.shards.token_artifact import SPLITS, count_tokens, iter_shards, read_tokens_manifest
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.media_tokens import display_name
from megatron_sov.work.progress.progress_bar import create_bar

_BLOCK_ITEMS = 1 << 22
_BAR_CHARS = 40
PERCENTILES = (5, 50, 95)


@dataclass(frozen=True, kw_only=True)
class DataStatsOptions:
    """Show what token shards hold, per source."""

    data: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data pack` or `sov-data mix` wrote."""
    json: bool = False
    """Print the numbers as JSON."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Show, per source: a histogram of document lengths, tokens that are learned, "
                          "special tokens, unused ids.")
    add_options(parser, DataStatsOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DataStatsOptions, typed)
    found = compute_statistics(args.data)
    print(format_json(found) if args.json else "\n".join(_shown(found)))
    return 0


def compute_statistics(data: Path) -> dict[str, Any]:
    """Return the statistics of an artifact of kind "tokens", over both splits.

    Raises:
        UserError: `data` is no such artifact, or is damaged.
    """
    content = read_tokens_manifest(data).content
    special = _added_tokens(data / "tokenizer" / TOKENIZER_JSON)
    used = np.zeros(content["vocab_size"], np.int64)
    sources = {}
    with create_bar("counting", count_tokens(content), "token") as bar:
        for source in content["sources"]:
            lengths, counts, types = _counts(data, content, source, bar.update)
            used += counts
            sources[source["name"]] = _of_source(source, lengths, counts, types, special)
    unused = int((used == 0).sum() - sum(not used[i] for i in special if i < len(used)))
    return {"vocab_size": content["vocab_size"], "num_unused_ordinary_ids": unused, "sources": sources}


def _added_tokens(file: Path) -> dict[int, str]:
    try:
        return {int(token["id"]): str(token["content"])
                for token in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read as a tokenizer ({e!r}); pack the data again or restore it "
                        "from a copy") from None


def _counts(data: Path, content: dict[str, Any], source: dict[str, Any],
            done: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = np.zeros(content["vocab_size"], np.int64)
    types, lengths = np.zeros(3, np.int64), []
    for shard in iter_shards(data, content, source["name"]):
        opened = shard.open()
        lengths.append(opened.lengths_tokens)
        for i in range(0, len(opened.tokens), _BLOCK_ITEMS):
            block = opened.tokens[i : i + _BLOCK_ITEMS].astype(np.int64)
            # In blocks: `astype` would copy a whole shard.
            counts += np.bincount(block, minlength=len(counts))[: len(counts)]
            done(len(block))
        if "type" in source["sidecars"] and len(opened.tokens):
            types += np.bincount(np.memmap(f"{shard.prefix}.type", np.uint8, "r"), minlength=3)[:3]
    return np.concatenate(lengths), counts, types


def _of_source(source: dict[str, Any], lengths: np.ndarray, counts: np.ndarray, types: np.ndarray,
               special: dict[int, str]) -> dict[str, Any]:
    # The smallest power of two that is not below the length.
    powers = Counter((int(n) - 1).bit_length() for n in lengths.tolist())
    splits = [source["splits"][name] for name in SPLITS]
    return {
        "num_documents": len(lengths), "num_tokens": int(counts.sum()),
        "num_bytes": sum(s["num_bytes"] for s in splits),
        "length_percentiles_tokens": {p: int(np.percentile(lengths, p)) for p in PERCENTILES} if len(lengths)
        else {}, "longest_tokens": int(lengths.max(initial=0)),
        "documents_up_to_tokens": {2**p: powers[p]
                                   for p in range(min(powers, default=0), max(powers, default=-1) + 1)},
        "num_prompt_tokens": int(types[TYPE_PROMPT]), "num_response_tokens": int(types[TYPE_RESPONSE]),
        "special_tokens": _occurring(special, counts),
        "num_bad": source["num_bad"],
    }


def _occurring(special: dict[int, str], counts: np.ndarray) -> dict[str, int]:
    found: Counter[str] = Counter()
    for id_, token in sorted(special.items()):
        if id_ < len(counts) and counts[id_]:
            found[display_name(token)] += int(counts[id_])
    return dict(found)


def _shown(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, s in found["sources"].items():
        ratio = s["num_bytes"] / max(1, s["num_tokens"])
        lines.append(f"{name}: {s['num_documents']:,} documents, {s['num_tokens']:,} tokens, "
                     f"{ratio:.3f} bytes per token")
        if s["num_prompt_tokens"] or s["num_response_tokens"]:
            share = s["num_response_tokens"] / max(1, s["num_prompt_tokens"] + s["num_response_tokens"])
            lines.append(f"  responses: {s['num_response_tokens']:,} tokens ({share:.1%}), prompts: "
                         f"{s['num_prompt_tokens']:,}")
        percentiles = ", ".join(f"{p} %: {n:,}" for p, n in s["length_percentiles_tokens"].items())
        lines.append(f"  tokens of a document: {percentiles}, longest {s['longest_tokens']:,}")
        most = max(s["documents_up_to_tokens"].values(), default=1)
        lines += [f"  up to {limit:>10,} {n:>12,} {'#' * round(_BAR_CHARS * n / most)}"
                  for limit, n in s["documents_up_to_tokens"].items()]
        lines.append("  special tokens: "
                     + (", ".join(f"{t} {n:,}" for t, n in s["special_tokens"].items()) or "none"))
        if s["num_bad"]:
            lines.append("  left out: " + ", ".join(f"{n:,} {code}" for code, n in s["num_bad"].items()))
    lines.append(f"ordinary ids that never occur: {found['num_unused_ordinary_ids']:,} of "
                 f"{found['vocab_size']:,}")
    return lines
