"""`sov-data adopt`: token shards that Megatron-LM's preprocess_data wrote become an artifact of ours."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.adopted_text import Surveyed, survey
from data_prep.encode import Encoder
from data_prep.foreign_pair import open_foreign
from data_prep.indexed import IndexedSplit, token_dtype
from data_prep.pack import Source, carry_tokenizer, parse_sources
from data_prep.sharding import ShardedWriter, ShardRecord
from data_prep.splits import HELDOUT, TRAIN, HeldoutRule
from data_prep.token_artifact import CONTENT_VERSION, KIND
from megatron_sov.artifacts import new_artifact, read_manifest, refuse_existing
from megatron_sov.documents.indexed_writer import write_index
from megatron_sov.errors import UserError
from megatron_sov.obs.warning import warn
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.settings import AtLeastOne, Code, Flag, Fraction, Problem, add_options, read_options

DESCRIPTION = """Take over .bin and .idx pairs that Megatron-LM's preprocess_data wrote, as an artifact of
token shards: every number of the index is checked, ids against the tokenizer's vocabulary, the ends of
documents, and whether the text that they spell gives the same ids again."""
BLOCK_TOKENS = 1 << 22
EODS = ("auto", "append", "none")


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """Take token shards of Megatron-LM over as they are."""

    pairs: Annotated[tuple[str, ...], Flag("[NAME=]PREFIX")]
    """Path of PREFIX.bin and PREFIX.idx; each pair is one source, named after it unless NAME is given."""
    tokenizer: Annotated[Path, Flag(value="DIR")]
    """Tokenizer that they were made with (`sov-tokenizer import` takes one over)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the token shards."""
    heldout: Annotated[Fraction, Flag(value="SHARE")] = 0.02
    """Part of the documents kept from training, chosen as `sov-data pack` does."""
    eod: Literal["auto", "append", "none"] = "auto"
    """Whether documents end with the tokenizer's eos; auto: look."""
    link: bool = False
    """Link the .bin files and copy nothing; needs --heldout 0 and the same file system."""
    shard_tokens: AtLeastOne = 2_000_000_000
    """Most tokens of one shard."""
    overwrite: bool = False
    """Replace token shards that are already there."""

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        return [] if not self.link or not self.heldout else [Problem(
            Code.RULE, "link", "keeps the files as they are, so that no document can be held out of them, "
            f"and --heldout is {self.heldout}", way_out="pass --heldout 0, or leave it out")]


@dataclass(frozen=True)
class Pair:
    """A source that is taken over."""

    source: Source
    """Name, and path without endings."""
    split: IndexedSplit
    """Its documents."""
    surveyed: Surveyed
    """What was found in them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = DESCRIPTION
    add_options(parser, AdoptOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data adopt`; returns 0."""
    args = read_options(AdoptOptions, typed)
    refuse_existing(args.output, KIND, args.overwrite)
    sources = parse_sources([_without_ending(given) for given in args.pairs])
    encoder = Encoder(args.tokenizer)
    pairs = [_opened(source, encoder, args.eod) for source in sources]
    _write(pairs, encoder, args)
    return 0


def _without_ending(given: str) -> str:
    return given.removesuffix(".bin").removesuffix(".idx")


def _opened(source: Source, encoder: Encoder, eod: str) -> Pair:
    split, num_empty = open_foreign(source.path)
    if num_empty:
        warn(f"{source.path}: {num_empty:,} documents without tokens are left out")
    return Pair(source, split, survey(source.name, source.path, split, encoder, eod))


def _write(pairs: list[Pair], encoder: Encoder, args: AdoptOptions) -> None:
    eods = {pair.surveyed.ends_with_eos for pair in pairs}
    if len(eods) > 1:
        named = ", ".join(f"{p.source.name}: {'yes' if p.surveyed.ends_with_eos else 'no'}" for p in pairs)
        raise UserError(f"the pairs differ in whether documents end with eos ({named}); adopt them into "
                        "folders of their own, and mix these (`sov-data mix`)")
    dtype = token_dtype(encoder.vocab_size)
    if args.link:
        dtypes = {pair.split.dtype for pair in pairs}
        if len(dtypes) > 1:
            raise UserError(f"--link: the pairs have ids of {' and '.join(sorted(dtypes))}, and one "
                            "artifact has one dtype; leave --link out")
        dtype = next(iter(dtypes))
    rule = HeldoutRule(args.heldout)
    for pair in pairs:
        rule.learn_source(int(pair.surveyed.hashes.min()), int(pair.surveyed.hashes.max()))
    for pair in pairs:
        rule.keep_one(int(pair.surveyed.hashes.max()))
    content = read_manifest(args.tokenizer).content
    with new_artifact(args.output, KIND, overwrite=args.overwrite) as artifact:
        records = []
        with work_bar("writing", sum(len(pair.split.tokens) for pair in pairs), "token") as bar:
            for pair in pairs:
                splits = (_linked(pair, artifact.path) if args.link else
                          _copied(pair, artifact.path, dtype, rule, args.shard_tokens))
                bar.update(len(pair.split.tokens))
                records.append(_record(pair, splits))
        artifact.content = {
            "content_version": CONTENT_VERSION, "tokenizer_sha256": content["tokenizer_sha256"],
            "vocab_size": encoder.vocab_size, "eos_id": encoder.eos_id,
            "eod": "append" if eods == {True} else "none", "bos_id": None, "dtype": dtype,
            "heldout": rule.to_dict(), "sources": records}
        artifact.settings = {"heldout_share": args.heldout, "eod": args.eod, "linked": args.link,
                             "inputs": [pair.source for pair in pairs]}
        carry_tokenizer(artifact, args.tokenizer)
    for record in records:
        print(f"{record['name']}: {record['splits'][TRAIN]['num_tokens']:,} tokens to train on, "
              f"{record['splits'][HELDOUT]['num_tokens']:,} held out")
    print(f"wrote {args.output}")


def _record(pair: Pair, splits: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest's record of a source."""
    index = Path(f"{pair.source.path}.idx")
    return {"name": pair.source.name, "format": "text", "group_documents": 1, "sidecars": [],
            "input_sha256": hashlib.sha256(index.read_bytes()).hexdigest(), "num_bad": {},
            "adopted": {"prefix": str(pair.source.path)}, "splits": splits}


def _copied(pair: Pair, artifact: Path, dtype: str, rule: HeldoutRule, shard_tokens: int) -> dict[str, Any]:
    """Write the shards of both splits; returns their records."""
    heldout = rule.is_heldout(pair.surveyed.hashes)
    name = pair.source.name
    with ShardedWriter(artifact, f"{name}/{TRAIN}", dtype, {}, False, 1, shard_tokens) as train, \
            ShardedWriter(artifact, f"{name}/{HELDOUT}", dtype, {}, False, 1, shard_tokens) as held:
        for block, tokens in _blocks(pair.split.lengths_tokens):
            lengths = pair.split.lengths_tokens[block]
            ids = np.asarray(pair.split.tokens[tokens])
            for writer, chosen in ((train, ~heldout[block]), (held, heldout[block])):
                if chosen.any():
                    writer.write(lengths[chosen], pair.surveyed.sizes_bytes[block][chosen],
                                 {"bin": ids[np.repeat(chosen, lengths)]}, [])
        return {TRAIN: train.record(), HELDOUT: held.record()}


def _blocks(lengths: NDArray[np.int32]) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of documents, and of their tokens, of about `BLOCK_TOKENS` each."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = passed = 0
    while start < len(ends):
        stop = max(start + 1, int(np.searchsorted(ends, passed + BLOCK_TOKENS, side="right")))
        yield slice(start, stop), slice(passed, int(ends[stop - 1]))
        start, passed = stop, int(ends[stop - 1])


def _linked(pair: Pair, artifact: Path) -> dict[str, Any]:
    """Link the .bin as the one shard to train on; returns the records of both splits."""
    prefix = f"{pair.source.name}/{TRAIN}-00000"
    target = artifact / prefix
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # of a link what it names: a link inside of the artifact would lead out of it
        os.link(os.path.realpath(f"{pair.source.path}.bin"), f"{target}.bin")
    except OSError as e:
        raise UserError(f"--link: {pair.source.path}.bin cannot be linked into {artifact.parent} "
                        f"({e.strerror}); choose an --output on the same file system, or leave --link "
                        "out") from None
    write_index(target, pair.split.dtype, pair.split.lengths_tokens)
    record = ShardRecord(prefix, len(pair.split.lengths_tokens), len(pair.split.tokens),
                         int(pair.surveyed.sizes_bytes.sum()))
    with ShardedWriter(artifact, f"{pair.source.name}/{HELDOUT}", pair.split.dtype, {}, False, 1, 1) as held:
        pass
    return {TRAIN: {"shards": [vars(record)], "num_documents": record.num_documents,
                    "num_tokens": record.num_tokens, "num_bytes": record.num_bytes}, HELDOUT: held.record()}
