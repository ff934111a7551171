"""`sov-data sample`: documents as the model will see them, decoded, with what is learned between marks."""

from __future__ import annotations

import argparse
import random
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.splits import SPLITS, TRAIN
from data_prep.token_artifact import Shard, read_tokens_manifest, shards_of
from megatron_sov.chat.folder import open_tokenizer
from megatron_sov.documents.visible import visible
from megatron_sov.errors import UserError

LEARNED = ("⟦", "⟧")
"""Marks around tokens that carry a loss, in data that has a mask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Print documents as the model will see them; in data with a loss mask, "
                          f"what is learned stands in {' '.join(LEARNED)}.")
    parser.add_argument("data", type=Path, metavar="DIR",
                        help="folder that `sov-data pack` or `sov-data mix` wrote")
    parser.add_argument("--source", metavar="NAME", help="one source only")
    parser.add_argument("--split", choices=SPLITS, default=TRAIN, help="which split (default %(default)s)")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="documents (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=400, metavar="N",
                        help="tokens shown of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="another seed shows other documents (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the documents; returns 0."""
    for line in sample(args.data, args.source, args.split, args.count, args.max_tokens, args.seed):
        print(line)
    return 0


def sample(data: Path, source: str | None, split: str, count: int, max_tokens: int, seed: int) -> list[str]:
    """Return a heading and the text of each of `count` documents, drawn at random without
    repeats, in their order.

    Raises:
        UserError: `data` is no artifact of token shards, or has no such source or documents, or
            a number is below 1.
    """
    for option, number in (("--count", count), ("--max-tokens", max_tokens)):
        if number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    content = read_tokens_manifest(data).content
    shards = list(shards_of(data, content, source, split))
    places = [(n, i) for n, s in enumerate(shards) for i in _drawn(s, count, seed + n)]
    if not places:
        raise UserError(f"{data}: has no documents in split {split!r}"
                        + (f" of source {source!r}" if source else ""))
    chosen = sorted(random.Random(seed).sample(places, min(count, len(places))))
    tokenizer = open_tokenizer(data / "tokenizer")
    return [line for n, i in chosen for line in _shown(shards[n], i, max_tokens, tokenizer)]


def _drawn(shard: Shard, count: int, seed: int) -> list[int]:
    """Return up to `count` documents of a shard."""
    total = shard.record["num_documents"]
    return random.Random(seed).sample(range(total), min(count, total))


def _shown(shard: Shard, document: int, max_tokens: int, tokenizer: Tokenizer) -> list[str]:
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
                   for shown in [visible(tokenizer.decode(run_ids, skip_special_tokens=False))])
    side = {0: ", chosen", 1: ", rejected"}[document % 2] if shard.source["format"] == "preference" else ""
    cut = f", the first {max_tokens:,}" if length > max_tokens else ""
    return [f"== {shard.source['name']}/{shard.split}, document {document}{side}, {length:,} tokens{cut}",
            text, ""]
