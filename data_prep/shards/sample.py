"""`sov-data sample`: documents as the model will see them, decoded, with what is learned between marks."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tokenizers import Tokenizer

from data_prep.shards.token_artifact import PackedShard, iter_shards, read_tokens_manifest
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.chat.folder import open_tokenizer

LEARNED = ("⟦", "⟧")
"""Marks around tokens that carry a loss, in data that has a mask."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Print documents as the model will see them."""

    data: Annotated[Path, Flag("DIR")]
    """Folder that `sov-data pack` or `sov-data mix` wrote."""
    source: Annotated[str | None, Flag(value="NAME")] = None
    """One source only."""
    split: Literal["train", "heldout"] = "train"
    """Which split."""
    count: AtLeastOne = 3
    """Documents."""
    max_tokens: AtLeastOne = 400
    """Tokens shown of each."""
    seed: int = 0
    """Another seed shows other documents."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Print documents as the model will see them. In data with a loss mask, "
                          f"{' '.join(LEARNED)} enclose what is learned.")
    add_options(parser, SampleOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(SampleOptions, typed)
    for line in sample_documents(args.data, args.source, args.split, args.count, args.max_tokens, args.seed):
        print(line)
    return 0


def sample_documents(data: Path, source: str | None, split: str, count: int, max_tokens: int,
                     seed: int) -> list[str]:
    """Return a heading and the text of each of `count` documents, drawn at random without
    repeats, in their order.

    Raises:
        UserError: `data` is no artifact of token shards, or has no such source or documents.
    """
    content = read_tokens_manifest(data).content
    shards = list(iter_shards(data, content, source, split))
    # `count` of each shard are enough to choose `count` of all, and no list of all documents is made.
    places = [(n, i) for n, s in enumerate(shards) for i in _drawn(s, count, seed + n)]
    if not places:
        raise UserError(f"{data}: has no documents in split {split!r}"
                        + (f" of source {source!r}" if source else ""))
    chosen = sorted(random.Random(seed).sample(places, min(count, len(places))))
    tokenizer = open_tokenizer(data / "tokenizer")
    return [line for n, i in chosen for line in _shown(shards[n], i, max_tokens, tokenizer)]


def _drawn(shard: PackedShard, count: AtLeastOne, seed: int) -> list[int]:
    total = shard.record["num_documents"]
    return random.Random(seed).sample(range(total), min(count, total))


def _shown(shard: PackedShard, document: int, max_tokens: int, tokenizer: Tokenizer) -> list[str]:
    opened = shard.open()
    first = int(opened.starts_bytes[document]) // np.dtype(opened.dtype).itemsize
    length = int(opened.lengths_tokens[document])
    part = slice(first, first + min(length, max_tokens))
    ids = opened.tokens[part].tolist()
    learned = (np.memmap(f"{shard.prefix}.loss", "<f4", "r")[part] > 0 if "loss" in shard.source["sidecars"]
               else np.zeros(len(ids), bool))
    pairs = zip(learned.tolist(), ids, strict=True)
    runs = [(key, [id_ for _, id_ in group]) for key, group in groupby(pairs, key=lambda pair: pair[0])]
    text = "".join(f"{LEARNED[0]}{shown}{LEARNED[1]}" if key else shown
                   for key, run_ids in runs
                   for shown in [escape_controls(tokenizer.decode(run_ids, skip_special_tokens=False))])
    side = {0: ", chosen", 1: ", rejected"}[document % 2] if shard.source["format"] == "preference" else ""
    cut = f", the first {max_tokens:,}" if length > max_tokens else ""
    return [f"== {shard.source['name']}/{shard.split}, document {document}{side}, {length:,} tokens{cut}",
            text, ""]
