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

from data_prep.shards.assemble import ShardedWriter, ShardRecord
from data_prep.shards.encode import Encoder
from data_prep.shards.pack import PackSource, carry_tokenizer, parse_sources
from data_prep.shards.token_artifact import (
    CONTENT_VERSION, HELDOUT, KIND, TRAIN, HeldoutRule, IndexedSplit, choose_token_dtype, hash_document)
from megatron_sov.base.artifacts import check_output_folder, create_artifact, read_manifest
from megatron_sov.base.documents import Document
from megatron_sov.base.documents.shard_files import DTYPE_CODES, HEADER, MAGIC, VERSION, write_index
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.settings import (
    AtLeastOne, Flag, Fraction, ProblemCode, SettingsProblem, add_options, read_options)
from megatron_sov.work.progress.progress_bar import create_bar

BATCH_DOCUMENTS = 512
SAMPLES, SAMPLE_TOKENS, SHOWN_CHARS = 64, 512, 160
"""Documents of each source that are encoded again, from places spread over it, and how much of each."""
MIN_AGREEMENT = 0.5
"""Share of the samples' ids, up to the first that differs, below which they are another tokenizer's: its own
give all but the last few, where a sample ends inside a word."""
_REMEDY = "restore it from a copy"
_MODE_BYTES = 1
"""Of each sequence, at the end of an index of text and images."""
DESCRIPTION = """Take over .bin and .idx pairs that Megatron-LM's preprocess_data wrote, as an artifact of
token shards. Checked are every number of the index, ids against the tokenizer's vocabulary, the ends of
documents, and whether the text that they spell gives the same ids again."""
BLOCK_TOKENS = 1 << 22


# What is found in token shards of others: their range of ids, the ends of their documents, the text that
# they spell, and whether the tokenizer gives these ids for it.


@dataclass(frozen=True)
class Surveyed:
    hashes: NDArray[np.uint64]
    """Of each document's text, by which it is held out, [documents]."""
    sizes_bytes: NDArray[np.int64]
    """UTF-8 bytes of its text, [documents]."""
    ends_with_eos: bool
    """Whether documents end with the tokenizer's eos."""


def survey(name: str, prefix: Path, split: IndexedSplit, encoder: Encoder, eod: str) -> Surveyed:
    """Look through a source, and show a sample of its text.

    Args:
        name: of the source.
        prefix: its path, for messages.
        split: its documents.
        encoder: the tokenizer.
        eod: what is expected at the ends of documents: "append" (eos), "none" or "auto".

    Raises:
        UserError: ids lie outside of the vocabulary, are another tokenizer's, or documents do not end as
            expected.
    """
    # Cheap tests first: a wrong tokenizer is found before all text is decoded.
    _refuse_range(prefix, split, encoder.vocab_size)
    _refuse_other_tokenizer(name, split, encoder)
    ends_with_eos = _ends(prefix, split, encoder, eod)
    hashes = np.zeros(len(split.lengths_tokens), np.uint64)
    sizes_bytes = np.zeros(len(split.lengths_tokens), np.int64)
    done = 0
    with create_bar("reading", len(split.tokens), "token") as bar:
        for batch in _batches(split):
            # The hash is that of the text, as `pack` makes it: the same documents are held out.
            texts = encoder.decode_batch([ids[:-1] if ends_with_eos else ids for ids in batch])
            for text in texts:
                hashes[done] = hash_document(Document("text", text))
                sizes_bytes[done] = len(text.encode(errors="replace"))
                done += 1
            bar.update(sum(map(len, batch)))
    return Surveyed(hashes, sizes_bytes, ends_with_eos)


def _batches(split: IndexedSplit) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for ids in split.documents():
        batch.append(ids.tolist())
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _refuse_range(prefix: Path, split: IndexedSplit, vocab_size: int) -> None:
    block = 1 << 22
    for start in range(0, len(split.tokens), block):
        part = np.asarray(split.tokens[start:start + block])
        for id_ in (int(part.max()), int(part.min())):
            if not 0 <= id_ < vocab_size:
                at = start + int(np.flatnonzero(part == id_)[0])
                raise UserError(f"{prefix}.bin: token {at:,} has id {id_}, and the tokenizer's ids are 0 to "
                                f"{vocab_size - 1}; pass the tokenizer that it was made with")


def _ends(prefix: Path, split: IndexedSplit, encoder: Encoder, eod: str) -> bool:
    """Return whether documents end with eos; `UserError` where only some do, or not as is said."""
    lasts = np.asarray(split.tokens[np.cumsum(split.lengths_tokens, dtype=np.int64) - 1])
    num_ended, num_documents = int((lasts == encoder.eos_id).sum()), len(lasts)
    if eod == "none" or (eod == "auto" and not num_ended):
        # Every document ends with the same id that is not eos: very likely the eos of another tokenizer.
        if eod == "auto" and num_documents > 1 and (lasts == lasts[0]).all():
            raise UserError(f"{prefix}: every document ends with id {lasts[0]} "
                            f"({encoder.decode([int(lasts[0])])!r}), and the tokenizer's eos is "
                            f"{encoder.eos_id} ({encoder.decode([encoder.eos_id])!r}); pass a tokenizer "
                            "whose eos_token it is, or --eod none to take it for text")
        return False
    if num_ended < num_documents:
        first = int(np.flatnonzero(lasts != encoder.eos_id)[0])
        raise UserError(f"{prefix}: {num_documents - num_ended:,} of {num_documents:,} documents do not end "
                        f"with the tokenizer's eos, id {encoder.eos_id} (the first is document {first}); "
                        "pass the tokenizer that it was made with, or --eod none to take eos for text where "
                        "it stands")
    return True


def _refuse_other_tokenizer(name: str, split: IndexedSplit, encoder: Encoder) -> None:
    """Show a sample of a source, and refuse one whose text gives other ids, with the sample."""
    starts = split.starts_bytes // np.dtype(split.dtype).itemsize
    chosen = np.unique(np.linspace(0, len(starts) - 1, SAMPLES).astype(np.int64))
    agreed = num_tokens = 0
    texts = []
    for i in chosen.tolist():
        length = min(SAMPLE_TOKENS, int(split.lengths_tokens[i]))
        ids = [int(t) for t in split.tokens[starts[i]:starts[i] + length] if int(t) != encoder.eos_id]
        texts.append(encoder.decode(ids))
        again = encoder.plain.encode(texts[-1], add_special_tokens=False).ids
        # Up to the first difference: a sample that is cut inside a word differs behind it for good reason.
        agreed += next((n for n, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b),
                       min(len(ids), len(again)))
        num_tokens += len(ids)
    shown = max(texts, key=len)[:SHOWN_CHARS]
    if agreed < MIN_AGREEMENT * num_tokens:
        raise UserError(f"{name}: is of another tokenizer: the text that it spells with this one has other "
                        f"ids (only {agreed / num_tokens:.0%} of {len(chosen)} samples agree), and reads "
                        f"{shown!r}; pass the tokenizer that it was made with")
    print(f"{name}: reads {shown!r}; encoded again, {agreed / max(1, num_tokens):.1%} of the ids of "
          f"{len(chosen)} samples agree up to the first that differs")


# A `.bin/.idx` pair that others wrote (Megatron-LM's `preprocess_data`, Megatron-Bridge, NeMo), with every
# number of its index checked. Theirs may have several sequences in a document (`--split-sentences`) and
# documents without any; here a document is all of its sequences together, and empty ones are left out,
# which changes no byte of the .bin.


def open_foreign(prefix: Path) -> tuple[IndexedSplit, int]:
    """Return the pair's documents, and how many empty ones are left out.

    Args:
        prefix: path of both files without their endings.

    Raises:
        UserError: a file is missing, of another version or dtype, or the index is no sound one for the .bin.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        raw: NDArray[np.uint8] = np.memmap(index, np.uint8, mode="r") if os.path.getsize(index) else \
            np.zeros(0, np.uint8)
        size_bytes = tokens.stat().st_size
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); pass the path that both files have, "
                        "without .bin and .idx") from None
    # Layout: header, int32 length and int64 start of each sequence, int64 bounds of documents.
    dtype, num_sequences, num_bounds = _header(index, raw)
    at = HEADER.size
    lengths = np.frombuffer(raw, "<i4", num_sequences, at).astype(np.int64)
    starts = np.frombuffer(raw, "<i8", num_sequences, at + 4 * num_sequences)
    bounds = np.frombuffer(raw, "<i8", num_bounds, at + 12 * num_sequences)
    if num_sequences and int(lengths.min()) < 0:
        raise UserError(f"{index}: sequence {int(lengths.argmin())} has {lengths.min()} tokens; {_REMEDY}")
    # Starts must follow from lengths: gaps would shift every token behind them.
    ends = np.cumsum(lengths) * dtype.itemsize
    wrong = np.flatnonzero(starts != ends - lengths * dtype.itemsize)
    if len(wrong):
        raise UserError(f"{index}: sequence {wrong[0]} begins at byte {starts[wrong[0]]}, and the one "
                        f"before it ends at {int(ends[wrong[0]] - lengths[wrong[0]] * dtype.itemsize)}; "
                        f"{_REMEDY}")
    if not num_bounds or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise UserError(f"{index}: its document bounds do not go from 0 to its {num_sequences} sequences in "
                        f"order; {_REMEDY}")
    expected_bytes = int(ends[-1]) if num_sequences else 0
    if size_bytes != expected_bytes:
        raise UserError(f"{tokens}: has {size_bytes} bytes, the index says {expected_bytes}; {_REMEDY}")
    cumulative = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    documents = np.diff(cumulative[bounds])
    # An empty document takes no bytes, so the .bin stays as it is.
    kept = documents[documents > 0]
    if not len(kept):
        raise UserError(f"{index}: holds no document; name another pair")
    if int(kept.max()) >= 1 << 31:
        raise UserError(f"{index}: a document has {kept.max():,} tokens, and at most {(1 << 31) - 1:,} are "
                        "read")
    begins = (np.cumsum(kept) - kept) * dtype.itemsize
    ids = np.memmap(tokens, dtype.newbyteorder("<"), mode="r")
    return IndexedSplit(dtype.name, kept.astype(np.int32), begins, ids), len(documents) - len(kept)


def _header(index: Path, raw: NDArray[np.uint8]) -> tuple[np.dtype[np.generic], int, int]:
    if len(raw) < HEADER.size or bytes(raw[:len(MAGIC)]) != MAGIC:
        raise UserError(f"{index}: is no index of Megatron's indexed datasets; name a pair that "
                        "preprocess_data wrote (the old --dataset-impl lazy and cached are not read)")
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(bytes(raw[:HEADER.size]))
    dtypes = {c: name for name, c in DTYPE_CODES.items()}
    if version != VERSION or code not in dtypes:
        raise UserError(f"{index}: has version {version} and dtype code {code}; only version {VERSION} with "
                        f"ids of {' or '.join(DTYPE_CODES)} is read")
    size_bytes = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(raw) == size_bytes + _MODE_BYTES * num_sequences and num_sequences:
        raise UserError(f"{index}: is of text and images (it has a mode for each sequence), which is not "
                        "read; name a pair of text")
    if len(raw) != size_bytes:
        raise UserError(f"{index}: has {len(raw)} bytes, which does not fit its {num_sequences} sequences "
                        f"and {num_bounds} document bounds; {_REMEDY}")
    return np.dtype(dtypes[code]), num_sequences, num_bounds


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

    def problems(self) -> list[SettingsProblem]:
        return [] if not self.link or not self.heldout else [SettingsProblem(
            ProblemCode.RULE, "link",
            "keeps the files as they are, so that no document can be held out of them, "
            f"and --heldout is {self.heldout}", way_out="pass --heldout 0, or leave it out")]


@dataclass(frozen=True)
class Pair:
    source: PackSource
    """Name, and path without endings."""
    split: IndexedSplit
    surveyed: Surveyed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add_options(parser, AdoptOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(AdoptOptions, typed)
    check_output_folder(args.output, KIND, args.overwrite)
    sources = parse_sources([_without_ending(given) for given in args.pairs])
    encoder = Encoder(args.tokenizer)
    pairs = [_opened(source, encoder, args.eod) for source in sources]
    _write(pairs, encoder, args)
    return 0


def _without_ending(given: str) -> str:
    return given.removesuffix(".bin").removesuffix(".idx")


def _opened(source: PackSource, encoder: Encoder, eod: str) -> Pair:
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
    dtype = choose_token_dtype(encoder.vocab_size)
    if args.link:
        dtypes = {pair.split.dtype for pair in pairs}
        if len(dtypes) > 1:
            raise UserError(f"--link: the pairs have ids of {' and '.join(sorted(dtypes))}, and one "
                            "artifact has one dtype; leave --link out")
        dtype = next(iter(dtypes))
    rule = HeldoutRule(args.heldout)
    # Three rounds over all pairs: the rule needs every source's extremes before any document is placed.
    for pair in pairs:
        rule.learn_source(int(pair.surveyed.hashes.min()), int(pair.surveyed.hashes.max()))
    for pair in pairs:
        rule.keep_one(int(pair.surveyed.hashes.max()))
    content = read_manifest(args.tokenizer).content
    with create_artifact(args.output, KIND, overwrite=args.overwrite) as artifact:
        records = []
        with create_bar("writing", sum(len(pair.split.tokens) for pair in pairs), "token") as bar:
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
    index = Path(f"{pair.source.path}.idx")
    return {"name": pair.source.name, "format": "text", "group_documents": 1, "sidecars": [],
            "input_sha256": hashlib.sha256(index.read_bytes()).hexdigest(), "num_bad": {},
            "adopted": {"prefix": str(pair.source.path)}, "splits": splits}


def _copied(pair: Pair, artifact: Path, dtype: str, rule: HeldoutRule, shard_tokens: int) -> dict[str, Any]:
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
