"""`sov-data sample`: print decoded documents, with marks around learned tokens."""

import random
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tokenizers import Tokenizer

from data_prep.shards.token_artifact import PackedShard, iter_shards, read_tokens_manifest
from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag
from megatron_sov.chat.folder import open_tokenizer

LEARNED = ("⟦", "⟧")
"""Marks around tokens with a loss, in data with a loss mask."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Print documents as the model will see them. In data with a loss mask, ⟦ ⟧ enclose learned tokens."""

    data: Annotated[Path, Flag("DIR")]
    """Folder from `sov-data pack` or `sov-data mix`."""
    source: Annotated[str | None, Flag(value="NAME")] = None
    """Restrict to one source."""
    split: Literal["train", "heldout"] = "train"
    """Split to print."""
    count: AtLeastOne = 3
    """Documents to show."""
    max_tokens: AtLeastOne = 400
    """Tokens printed per document."""
    seed: int = 0
    """Seed for choosing documents."""


def print_samples(options: SampleOptions) -> None:
    for line in sample_documents(options.data, options.source, split=options.split, count=options.count,
                                 max_tokens=options.max_tokens, seed=options.seed):
        print(line)


SAMPLE = DeclaredCommand(SampleOptions, print_samples)


def sample_documents(data: Path, source: str | None, split: str, count: int, max_tokens: int,
                     seed: int) -> list[str]:
    """Return heading and text of up to `count` random documents, in the artifact's order. Raises `UserError`:
    `data` is not a token artifact, or has no such source or documents."""
    content = read_tokens_manifest(data).content
    shards = list(iter_shards(data, content, source, split))
    # `count` candidates per shard suffice, without a list of all documents
    candidates = []
    for number, shard in enumerate(shards):
        total = shard.record["num_documents"]
        drawn = random.Random(seed + number).sample(range(total), min(count, total))
        candidates += [(number, document) for document in drawn]
    if not candidates:
        source_text = f" of source {source!r}" if source else ""
        raise UserError(f"{data}: has no documents in split {split!r}{source_text}")
    chosen = sorted(random.Random(seed).sample(candidates, min(count, len(candidates))))
    tokenizer = open_tokenizer(data / "tokenizer")
    return [line for number, document in chosen
            for line in _format_document(shards[number], document, max_tokens, tokenizer)]


def _format_document(shard: PackedShard, document: int, max_tokens: int, tokenizer: Tokenizer) -> list[str]:
    split = shard.open()
    first = int(split.starts_bytes[document]) // np.dtype(split.dtype).itemsize
    length = int(split.lengths_tokens[document])
    tokens = slice(first, first + min(length, max_tokens))
    ids = split.tokens[tokens].tolist()
    is_learned = np.zeros(len(ids), bool)
    if "loss" in shard.source["sidecars"]:
        is_learned = np.memmap(f"{shard.prefix}.loss", "<f4", "r")[tokens] > 0
    text = ""
    for learned, run in groupby(zip(is_learned.tolist(), ids, strict=True), key=lambda pair: pair[0]):
        run_text = escape_controls(tokenizer.decode([id_ for _, id_ in run], skip_special_tokens=False))
        text += f"{LEARNED[0]}{run_text}{LEARNED[1]}" if learned else run_text
    side = ""
    if shard.source["format"] == "preference":
        side = ", rejected" if document % 2 else ", chosen"
    cut = f", the first {max_tokens:,}" if length > max_tokens else ""
    return [f"== {shard.source['name']}/{shard.split}, document {document}{side}, {length:,} tokens{cut}",
            text, ""]
