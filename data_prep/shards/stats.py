"""`sov-data stats`: document lengths, token types and special tokens per source."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from data_prep.shards.token_artifact import SPLITS, count_tokens, iter_shards, read_tokens_manifest
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.chat.media_tokens import display_name
from megatron_sov.chat.vocabulary import read_tokenizer
from megatron_sov.work.progress.progress_bar import create_bar

_BLOCK_TOKENS = 1 << 22
_BAR_CHARS = 40
PERCENTILES = (5, 50, 95)


@dataclass(frozen=True, kw_only=True)
class DataStatsOptions:
    """Show, per source: a histogram of document lengths, tokens that are learned, special tokens, unused
    ids."""

    data: Annotated[Path, Flag("DIR")]
    """Folder from `sov-data pack` or `sov-data mix`."""
    json: bool = False
    """Print the numbers as JSON."""


def print_statistics(options: DataStatsOptions) -> None:
    statistics = compute_statistics(options.data)
    print(format_json(statistics) if options.json else "\n".join(_format_statistics(statistics)))


STATS = DeclaredCommand(DataStatsOptions, print_statistics)


def compute_statistics(data: Path) -> dict[str, Any]:
    """Return statistics for an artifact of kind "tokens", over both splits. Raises `UserError`: `data` is
    another kind of folder, or damaged."""
    content = read_tokens_manifest(data).content
    added = read_tokenizer(data / "tokenizer").added
    special = {id_: token.get("content", "") for id_, token in added.items()}
    is_used = np.zeros(content["vocab_size"], bool)
    sources = {}
    with create_bar("counting", count_tokens(content), "token") as bar:
        for source in content["sources"]:
            lengths, counts, types = _count_source(data, content, source, bar.update)
            is_used |= counts > 0
            sources[source["name"]] = _summarize_source(source, lengths, counts, types, special)
    num_unused_special = sum(not is_used[i] for i in special if i < len(is_used))
    return {"vocab_size": content["vocab_size"],
            "num_unused_ordinary_ids": int((~is_used).sum() - num_unused_special), "sources": sources}


def _count_source(data: Path, content: dict[str, Any], source: dict[str, Any],
                  on_counted: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return document lengths [documents], token counts [vocab] and type counts [3]."""
    counts = np.zeros(content["vocab_size"], np.int64)
    types, lengths = np.zeros(3, np.int64), []
    for shard in iter_shards(data, content, source["name"]):
        split = shard.open()
        lengths.append(split.lengths_tokens)
        # blocks, because `astype` would copy a whole shard
        for i in range(0, len(split.tokens), _BLOCK_TOKENS):
            block = split.tokens[i : i + _BLOCK_TOKENS].astype(np.int64)
            counts += np.bincount(block, minlength=len(counts))[: len(counts)]
            on_counted(len(block))
        if "type" in source["sidecars"] and len(split.tokens):
            types += np.bincount(np.memmap(f"{shard.prefix}.type", np.uint8, "r"), minlength=3)[:3]
    return np.concatenate(lengths), counts, types


def _summarize_source(source: dict[str, Any], lengths: np.ndarray, counts: np.ndarray, types: np.ndarray,
                      special: dict[int, str]) -> dict[str, Any]:
    # exponent of the smallest power of two that is not below the length
    exponents = Counter((int(n) - 1).bit_length() for n in lengths.tolist())
    exponent_range = range(min(exponents, default=0), max(exponents, default=-1) + 1)
    percentiles = {p: int(np.percentile(lengths, p)) for p in PERCENTILES} if len(lengths) else {}
    special_counts: Counter[str] = Counter()
    for id_, token in sorted(special.items()):
        if id_ < len(counts) and counts[id_]:
            special_counts[display_name(token)] += int(counts[id_])
    return {
        "num_documents": len(lengths), "num_tokens": int(counts.sum()),
        "num_bytes": sum(source["splits"][name]["num_bytes"] for name in SPLITS),
        "length_percentiles_tokens": percentiles, "longest_tokens": int(lengths.max(initial=0)),
        "documents_up_to_tokens": {2**exponent: exponents[exponent] for exponent in exponent_range},
        "num_prompt_tokens": int(types[TYPE_PROMPT]), "num_response_tokens": int(types[TYPE_RESPONSE]),
        "special_tokens": dict(special_counts), "num_bad": source["num_bad"]}


def _format_statistics(statistics: dict[str, Any]) -> Iterator[str]:
    for name, s in statistics["sources"].items():
        ratio = s["num_bytes"] / max(1, s["num_tokens"])
        yield (f"{name}: {s['num_documents']:,} documents, {s['num_tokens']:,} tokens, "
               f"{ratio:.3f} bytes per token")
        num_typed = s["num_prompt_tokens"] + s["num_response_tokens"]
        if num_typed:
            yield (f"  responses: {s['num_response_tokens']:,} tokens "
                   f"({s['num_response_tokens'] / num_typed:.1%}), prompts: {s['num_prompt_tokens']:,}")
        percentiles = ", ".join(f"{p} %: {n:,}" for p, n in s["length_percentiles_tokens"].items())
        yield f"  tokens of a document: {percentiles}, longest {s['longest_tokens']:,}"
        lengths = s["documents_up_to_tokens"]
        for limit, n in lengths.items():
            yield f"  up to {limit:>10,} {n:>12,} {'#' * round(_BAR_CHARS * n / max(lengths.values()))}"
        special = ", ".join(f"{token} {n:,}" for token, n in s["special_tokens"].items())
        yield f"  special tokens: {special or 'none'}"
        if s["num_bad"]:
            yield "  left out: " + ", ".join(f"{n:,} {code}" for code, n in s["num_bad"].items())
    yield (f"ordinary ids that never occur: {statistics['num_unused_ordinary_ids']:,} of "
           f"{statistics['vocab_size']:,}")
