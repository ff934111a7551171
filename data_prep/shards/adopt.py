"""`sov-data adopt`: turn token shards from Megatron-LM's `preprocess_data` into an artifact."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.assemble import BLOCK_TOKENS, ShardedWriter, ShardRecord, iter_blocks
from data_prep.shards.encode import Encoder
from data_prep.shards.heldout import HeldoutRule, hash_document
from data_prep.shards.pack import PackSource, parse_sources
from data_prep.shards.pack_run import copy_tokenizer
from data_prep.shards.token_artifact import HELDOUT, KIND, TRAIN, IndexedSplit, choose_token_dtype, open_pair
from megatron_sov.base.artifacts import check_output_folder, create_artifact, read_manifest
from megatron_sov.base.documents import Document
from megatron_sov.base.documents.shard_files import CONTENT_VERSION, write_index
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.settings import (
    AtLeastOne, DeclaredCommand, Flag, Fraction, ProblemCode, SettingsProblem)
from megatron_sov.work.progress.progress_bar import create_bar

BATCH_DOCUMENTS = 512
NUM_SAMPLES, SAMPLE_TOKENS, SAMPLE_CHARS = 64, 512, 160
"""Documents per source that are encoded again, tokens per document, and characters printed."""
MIN_AGREEMENT = 0.5
"""Minimum share of sampled ids before the first difference. The right tokenizer differs only at the end, if a
sample ends inside a word."""
MAX_DOCUMENT_TOKENS = (1 << 31) - 1
_REMEDY = "name a pair that preprocess_data wrote, without .bin and .idx, or restore it from a copy"


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """Take over .bin and .idx pairs that Megatron-LM's preprocess_data wrote, as an artifact of token shards.
    Checked are every number of the index, ids against the tokenizer's vocabulary, the ends of documents, and
    whether the text that they spell gives the same ids again."""

    pairs: Annotated[tuple[str, ...], Flag("[NAME=]PREFIX")]
    """Path to PREFIX.bin and PREFIX.idx; each pair is one source, named after it unless NAME is given."""
    tokenizer: Annotated[Path, Flag(value="DIR")]
    """Tokenizer for the pairs (`sov-tokenizer import` converts other formats)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the token shards."""
    heldout: Annotated[Fraction, Flag(value="SHARE")] = 0.02
    """Share of documents held out from training, chosen as in `sov-data pack`."""
    eod: Literal["auto", "append", "none"] = "auto"
    """Whether documents end with the tokenizer's eos; auto: look."""
    link: bool = False
    """Link the .bin files and copy nothing; needs --heldout 0 and the same file system."""
    shard_tokens: AtLeastOne = 2_000_000_000
    """Token limit per shard."""
    overwrite: bool = False
    """Replace existing token shards."""

    def problems(self) -> list[SettingsProblem]:
        if not self.link or not self.heldout:
            return []
        return [SettingsProblem(ProblemCode.RULE, "link",
                                "keeps the files as they are, so that no document can be held out of them, "
                                f"and --heldout is {self.heldout}",
                                way_out="pass --heldout 0, or leave it out")]


@dataclass(frozen=True)
class Pair:
    """A checked `.bin` and `.idx` pair."""

    source: PackSource
    """Name, and path without endings."""
    split: IndexedSplit
    hashes: NDArray[np.uint64]
    """uint64 [documents], hash of the text for the held-out rule."""
    sizes_bytes: NDArray[np.int64]
    """int64 [documents], UTF-8 bytes of text."""
    ends_with_eos: bool


def adopt_pairs(options: AdoptOptions) -> None:
    """Check the pairs and write an artifact of kind "tokens". Raises `UserError`: a pair is damaged or
    belongs to another tokenizer, pairs differ in their ends, or the output may not be written."""
    check_output_folder(options.output, KIND, options.overwrite)
    sources = parse_sources([prefix.removesuffix(".bin").removesuffix(".idx") for prefix in options.pairs])
    encoder = Encoder(options.tokenizer)
    pairs = [_open_pair(source, encoder, options.eod) for source in sources]
    dtype = _choose_dtype(pairs, encoder, options)
    rule = HeldoutRule(options.heldout)
    # the rule needs every source before the first write
    for pair in pairs:
        rule.add_source(int(pair.hashes.min()), int(pair.hashes.max()))
    for pair in pairs:
        rule.keep_for_training(int(pair.hashes.max()))
    with create_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
        records = []
        with create_bar("writing", sum(len(pair.split.tokens) for pair in pairs), "token") as bar:
            for pair in pairs:
                if options.link:
                    splits = _link_pair(pair, artifact.path)
                else:
                    splits = _copy_pair(pair, artifact.path, dtype, rule, options.shard_tokens)
                bar.update(len(pair.split.tokens))
                records.append(_build_record(pair, splits))
        artifact.content = {
            "content_version": CONTENT_VERSION,
            "tokenizer_sha256": read_manifest(options.tokenizer).content["tokenizer_sha256"],
            "vocab_size": encoder.vocab_size, "eos_id": encoder.eos_id,
            "eod": "append" if pairs[0].ends_with_eos else "none", "bos_id": None, "dtype": dtype,
            "heldout": rule.to_dict(), "sources": records}
        artifact.settings = {"heldout_share": options.heldout, "eod": options.eod, "linked": options.link,
                             "inputs": sources}
        copy_tokenizer(artifact, options.tokenizer)
    for record in records:
        print(f"{record['name']}: {record['splits'][TRAIN]['num_tokens']:,} tokens to train on, "
              f"{record['splits'][HELDOUT]['num_tokens']:,} held out")
    print(f"wrote {options.output}")


ADOPT = DeclaredCommand(AdoptOptions, adopt_pairs)


def _open_pair(source: PackSource, encoder: Encoder, eod: str) -> Pair:
    """Open a pair, print a sample text, and hash documents. `eod`: expected ends, "append" (eos), "none" or
    "auto". Raises `UserError`: a damaged pair, ids outside the vocabulary or from another tokenizer, or other
    ends than `eod`."""
    split, num_empty = open_foreign_pair(source.path)
    if num_empty:
        warn(f"{source.path}: {num_empty:,} documents without tokens are left out")
    # fast checks precede decoding, to find a wrong tokenizer early
    _check_id_range(source.path, split, encoder.vocab_size)
    _check_tokenizer(source.name, split, encoder)
    ends_with_eos = _detect_eos(source.path, split, encoder, eod)
    hashes = np.zeros(len(split.lengths_tokens), np.uint64)
    sizes_bytes = np.zeros(len(split.lengths_tokens), np.int64)
    number = 0
    with create_bar("reading", len(split.tokens), "token") as bar:
        for batch in _iter_batches(split):
            # hash the text like `pack`, to hold out the same documents
            for text in encoder.decode_batch([ids[:-1] if ends_with_eos else ids for ids in batch]):
                hashes[number] = hash_document(Document("text", text))
                sizes_bytes[number] = len(text.encode(errors="replace"))
                number += 1
            bar.update(sum(map(len, batch)))
    return Pair(source, split, hashes, sizes_bytes, ends_with_eos)


def _iter_batches(split: IndexedSplit) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for ids in split.documents():
        batch.append(ids.tolist())
        if len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_id_range(prefix: Path, split: IndexedSplit, vocab_size: int) -> None:
    for start in range(0, len(split.tokens), BLOCK_TOKENS):
        block = np.asarray(split.tokens[start:start + BLOCK_TOKENS])
        for id_ in (int(block.max()), int(block.min())):
            if not 0 <= id_ < vocab_size:
                token = start + int(np.flatnonzero(block == id_)[0])
                raise UserError(f"{prefix}.bin: token {token:,} has id {id_}, and the tokenizer's ids are 0 "
                                f"to {vocab_size - 1}; pass the tokenizer that it was made with")


def _check_tokenizer(name: str, split: IndexedSplit, encoder: Encoder) -> None:
    """Print a sample text, and check that sampled texts encode to the same ids."""
    starts = split.starts_bytes // np.dtype(split.dtype).itemsize
    chosen = np.unique(np.linspace(0, len(starts) - 1, NUM_SAMPLES).astype(np.int64))
    num_equal = num_tokens = 0
    texts = []
    for i in chosen.tolist():
        length = min(SAMPLE_TOKENS, int(split.lengths_tokens[i]))
        ids = [int(t) for t in split.tokens[starts[i]:starts[i] + length] if int(t) != encoder.eos_id]
        texts.append(encoder.decode(ids))
        num_equal += _count_equal(ids, encoder.plain.encode(texts[-1], add_special_tokens=False).ids)
        num_tokens += len(ids)
    sample = max(texts, key=len)[:SAMPLE_CHARS]
    if num_equal < MIN_AGREEMENT * num_tokens:
        raise UserError(f"{name}: is of another tokenizer: the text that it spells with this one has other "
                        f"ids (only {num_equal / num_tokens:.0%} of {len(chosen)} samples agree), and reads "
                        f"{sample!r}; pass the tokenizer that it was made with")
    print(f"{name}: reads {sample!r}; encoded again, {num_equal / max(1, num_tokens):.1%} of the ids of "
          f"{len(chosen)} samples agree up to the first that differs")


def _count_equal(ids: list[int], encoded: list[int]) -> int:
    """Count equal ids before the first difference: after a cut inside a word, ids differ for good reason."""
    for number, (first, second) in enumerate(zip(ids, encoded, strict=False)):
        if first != second:
            return number
    return min(len(ids), len(encoded))


def _detect_eos(prefix: Path, split: IndexedSplit, encoder: Encoder, eod: str) -> bool:
    """Return whether documents end with eos; raises `UserError` if only some do, or contrary to `eod`."""
    last = np.asarray(split.tokens[np.cumsum(split.lengths_tokens, dtype=np.int64) - 1])
    num_ended, num_documents = int((last == encoder.eos_id).sum()), len(last)
    if eod == "none" or (eod == "auto" and not num_ended):
        # a common last id is probably the eos of the right tokenizer
        if eod == "auto" and num_documents > 1 and (last == last[0]).all():
            raise UserError(f"{prefix}: every document ends with id {last[0]} "
                            f"({encoder.decode([int(last[0])])!r}), and the tokenizer's eos is "
                            f"{encoder.eos_id} ({encoder.decode([encoder.eos_id])!r}); pass a tokenizer "
                            "whose eos_token it is, or --eod none to take it for text")
        return False
    if num_ended < num_documents:
        first = int(np.flatnonzero(last != encoder.eos_id)[0])
        raise UserError(f"{prefix}: {num_documents - num_ended:,} of {num_documents:,} documents do not end "
                        f"with the tokenizer's eos, id {encoder.eos_id} (the first is document {first}); "
                        "pass the tokenizer that it was made with, or --eod none to take eos for text where "
                        "it stands")
    return True


def open_foreign_pair(prefix: Path) -> tuple[IndexedSplit, int]:
    """Open a pair; return documents, and the number of empty documents.

    A foreign document may have several sequences (`--split-sentences`), which are joined, or no tokens. Empty
    documents are left out, which changes no byte in `.bin`. Raises `UserError` as `open_pair`."""
    sequences, bounds = open_pair(prefix, _REMEDY)
    cumulative = np.concatenate([np.zeros(1, np.int64), np.cumsum(sequences.lengths_tokens, dtype=np.int64)])
    lengths = np.diff(cumulative[bounds])
    nonempty = lengths[lengths > 0]
    if not len(nonempty):
        raise UserError(f"{prefix}.idx: holds no document; name another pair")
    if int(nonempty.max()) > MAX_DOCUMENT_TOKENS:
        raise UserError(f"{prefix}.idx: a document has {nonempty.max():,} tokens, and at most "
                        f"{MAX_DOCUMENT_TOKENS:,} are read")
    begins = (np.cumsum(nonempty) - nonempty) * np.dtype(sequences.dtype).itemsize
    return (replace(sequences, lengths_tokens=nonempty.astype(np.int32), starts_bytes=begins),
            len(lengths) - len(nonempty))


def _choose_dtype(pairs: list[Pair], encoder: Encoder, options: AdoptOptions) -> str:
    """Return the artifact's dtype; raises `UserError` if pairs cannot share an artifact."""
    if len({pair.ends_with_eos for pair in pairs}) > 1:
        ends = ", ".join(f"{p.source.name}: {'yes' if p.ends_with_eos else 'no'}" for p in pairs)
        raise UserError(f"the pairs differ in whether documents end with eos ({ends}); adopt them into "
                        "folders of their own, and mix these (`sov-data mix`)")
    if not options.link:
        return choose_token_dtype(encoder.vocab_size)
    dtypes = {pair.split.dtype for pair in pairs}
    if len(dtypes) > 1:
        raise UserError(f"--link: the pairs have ids of {' and '.join(sorted(dtypes))}, and one "
                        "artifact has one dtype; leave --link out")
    return next(iter(dtypes))


def _build_record(pair: Pair, splits: dict[str, Any]) -> dict[str, Any]:
    index = Path(f"{pair.source.path}.idx")
    return {"name": pair.source.name, "format": "text", "group_documents": 1, "sidecars": [],
            "input_sha256": hashlib.sha256(index.read_bytes()).hexdigest(), "num_bad": {},
            "adopted": {"prefix": str(pair.source.path)}, "splits": splits}


def _copy_pair(pair: Pair, artifact: Path, dtype: str, rule: HeldoutRule,
               shard_tokens: int) -> dict[str, Any]:
    """Copy documents into shards; return the records of both splits."""
    is_heldout = rule.is_heldout(pair.hashes)
    name, split = pair.source.name, pair.split
    settings: dict[str, Any] = {"sidecars": {}, "has_extra": False, "group": 1, "shard_tokens": shard_tokens}
    with ShardedWriter(artifact, f"{name}/{TRAIN}", dtype, **settings) as train, \
            ShardedWriter(artifact, f"{name}/{HELDOUT}", dtype, **settings) as heldout:
        for block, tokens in iter_blocks(split.lengths_tokens, 1, BLOCK_TOKENS):
            lengths = split.lengths_tokens[block]
            ids = np.asarray(split.tokens[tokens])
            for writer, chosen in ((train, ~is_heldout[block]), (heldout, is_heldout[block])):
                if chosen.any():
                    writer.write(lengths[chosen], pair.sizes_bytes[block][chosen],
                                 {"bin": ids[np.repeat(chosen, lengths)]}, [])
        return {TRAIN: train.to_record(), HELDOUT: heldout.to_record()}


def _link_pair(pair: Pair, artifact: Path) -> dict[str, Any]:
    """Link `.bin` as the only training shard; return the records of both splits."""
    prefix = f"{pair.source.name}/{TRAIN}-00000"
    target = artifact / prefix
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # resolve symbolic links: a relative link would break inside the artifact
        os.link(os.path.realpath(f"{pair.source.path}.bin"), f"{target}.bin")
    except OSError as e:
        raise UserError(f"--link: {pair.source.path}.bin cannot be linked into {artifact.parent} "
                        f"({e.strerror}); choose an --output on the same file system, or leave --link "
                        "out") from None
    write_index(target, pair.split.dtype, pair.split.lengths_tokens)
    record = vars(ShardRecord(prefix, len(pair.split.lengths_tokens), len(pair.split.tokens),
                              int(pair.sizes_bytes.sum())))
    with ShardedWriter(artifact, f"{pair.source.name}/{HELDOUT}", pair.split.dtype, sidecars={},
                       has_extra=False, group=1, shard_tokens=1) as heldout:
        pass  # an empty split has an empty shard
    counts = {name: value for name, value in record.items() if name != "prefix"}
    return {TRAIN: {"shards": [record], **counts}, HELDOUT: heldout.to_record()}
